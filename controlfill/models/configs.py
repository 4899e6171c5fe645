"""Configs of networks in the original layout, read off the names and shapes of their tensors.

What shapes don't tell (heads, activations, scaling) is that of the family's release.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from controlfill.errors import UserError
from controlfill.models.layout import InMemory
from controlfill.models.recognise import text_width
from controlfill.models.weights import Weights

Config = dict[str, Any]
# What a message says where shapes don't tell enough; not every command has the option itself.
SAY = "give `controlfill convert` a diffusers folder of the same architecture as --config_from"

# Noisy latents alone.
PLAIN_CHANNELS = 4
# Noisy latents, the mask, and the latents of the masked picture (SD's inpainting checkpoints).
INPAINT_CHANNELS = 4 + 1 + 4
# Noisy latents and those of a picture: InstructPix2Pix's, and glid-3-xl-stable's, where the picture
# is zero in open cells. Only what a file says tells one from the other.
PAIR_CHANNELS = 4 + 4
# What a UNet of so many channels is for, in the names of diffusers' pipelines.
TASKS = {INPAINT_CHANNELS: "Inpaint", PAIR_CHANNELS: "InstructPix2Pix"}
# The first width of the released UNets; by it their heads are known.
RELEASED_WIDTH = 320
HEADS_SD15, HEAD_WIDTH = 8, 64
SCALING = {"sdxl": 0.13025}
USUAL_SCALING = 0.18215
PICTURE = {"sdxl": 1024}
USUAL_PICTURE = 512
# SDXL's networks take six numbers of size and crop, each as a wave of so many values.
FRAMING_WIDTH = 256
# The parts of a CLIP config that shapes don't tell: of SD 1.5's and SDXL's first, and of OpenCLIP.
CLIP = {"hidden_act": "quick_gelu", "projection_dim": 768}
OPEN_CLIP = {"hidden_act": "gelu", "projection_dim": 512}
# ComfyUI's rule: this bias of SD 2 is spread wider where v is predicted.
V_BIAS, V_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
# Empty tensors by which A1111 and ComfyUI know v-prediction and zero terminal SNR.
MARKS = ("v_pred", "ztsnr")
# What a header says of a UNet's prediction, in its own words.
SPEC_KEY = "modelspec.prediction_type"
SPECS = {"v_prediction": "v"}
SCHEDULE: Config = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def unet_config(view: Weights, family: str, prediction_type: str = "epsilon") -> Config:
    """The config of a UNet with original names and no prefix. Raises UserError."""
    config = _encoder_config(view, family)
    attended = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    ups = ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attended)]
    size = 96 if family == "sd2" and prediction_type == "v_prediction" else _picture(family) // 8
    return {
        "_class_name": "UNet2DConditionModel", **config, "up_block_types": ups,
        "out_channels": view.shape("out.2.weight")[0], "sample_size": size,
    }  # fmt: skip


def controlnet_config(view: Weights, family: str, like: Config | None = None) -> Config:
    """The config of a ControlNet with original names and no prefix. Raises UserError.

    `like` is the config of its base's UNet, for widths that no release has.
    """
    config = _encoder_config(view, family, like)
    convolutions = [f"input_hint_block.{n}.weight" for n in range(0, 99, 2)]
    widths = [view.shape(name)[0] for name in convolutions if name in view]
    hint = view.shape("input_hint_block.0.weight")[1]
    return {
        "_class_name": "ControlNetModel", **config, "conditioning_channels": hint,
        # Two convolutions at each width, the second of which changes it; the last leaves.
        "conditioning_embedding_out_channels": [widths[0], *widths[2:-1:2]],
    }  # fmt: skip


def _encoder_config(view: Weights, family: str, like: Config | None = None) -> Config:
    """What UNet and ControlNet share: blocks, heads, text and framing."""
    first, channels = view.shape("input_blocks.0.0.weight")[:2]
    levels = _levels(view)
    widths = [level[0] for level in levels]
    depths = [level[2] for level in levels]
    config: Config = {
        "in_channels": channels,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "layers_per_block": levels[0][1],
        "transformer_layers_per_block": [d or 1 for d in depths],
        "cross_attention_dim": text_width(view),
        "attention_head_dim": _heads(first, widths, family, like),
        "use_linear_projection": len(view.shape("middle_block.1.proj_in.weight")) == 2,
        # SD 2.1 overflows without it in half precision, and nothing else minds.
        "upcast_attention": family == "sd2",
    }
    if like:
        config["norm_num_groups"] = like.get("norm_num_groups", 32)
    if "label_emb.0.0.weight" in view:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (like or {}).get("addition_time_embed_dim", FRAMING_WIDTH),
            "projection_class_embeddings_input_dim": view.shape("label_emb.0.0.weight")[1],
        }
    return config


def _levels(view: Weights) -> list[tuple[int, int, int]]:
    """(width, layers, depth of their transformers) of each resolution, finest first."""
    levels, layers, number = [], 0, 1
    width = depth = 0
    while f"input_blocks.{number}.0.op.weight" in view or _resnet(number) in view:
        if _resnet(number) in view:
            layers += 1
            width, depth = view.shape(_resnet(number))[0], _depth(view, number)
        else:
            levels.append((width, layers, depth))
            layers = 0
        number += 1
    return [*levels, (width, layers, depth)]


def _resnet(number: int) -> str:
    return f"input_blocks.{number}.0.out_layers.3.weight"


def _depth(view: Weights, number: int) -> int:
    start = re.compile(rf"input_blocks\.{number}\.1\.transformer_blocks\.(\d+)\.")
    return len({m[1] for name in view.names if (m := start.match(name))})


def _heads(first: int, widths: list[int], family: str, like: Config | None) -> Any:
    """diffusers' attention_head_dim, which (oddly) counts heads."""
    if like:
        return like["attention_head_dim"]
    if first != RELEASED_WIDTH:
        raise UserError(
            f"a network {first} wide is of no release, so that its heads can't be told; {SAY}"
        )
    return HEADS_SD15 if family == "sd15" else [width // HEAD_WIDTH for width in widths]


def vae_config(view: Weights, family: str) -> Config:
    """The config of an autoencoder with original names and no prefix."""
    blocks = [f"encoder.down.{n}.block.0.conv1.weight" for n in range(9)]
    widths = [view.shape(name)[0] for name in blocks if name in view]
    if any(width % 32 for width in widths):
        raise UserError(f"an autoencoder with widths {widths} is of no release; {SAY}")
    layers = [n for n in range(9) if f"encoder.down.0.block.{n}.conv1.weight" in view]
    return {
        "_class_name": "AutoencoderKL", "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths), "layers_per_block": len(layers),
        "latent_channels": view.shape("decoder.conv_in.weight")[1],
        "scaling_factor": SCALING.get(family, USUAL_SCALING), "sample_size": _picture(family),
    }  # fmt: skip


def _picture(family: str) -> int:
    return PICTURE.get(family, USUAL_PICTURE)


def clip_config(view: Weights, opened: bool) -> Config:
    """The config of a text encoder with original names and no prefix; OpenCLIP's when `opened`."""
    table = "positional_embedding" if opened else "text_model.embeddings.position_embedding.weight"
    words = "token_embedding.weight" if opened else "text_model.embeddings.token_embedding.weight"
    inner = "resblocks.0.mlp.c_fc.weight" if opened else "encoder.layers.0.mlp.fc1.weight"
    layer = re.compile(rf"\w+\.{'resblocks' if opened else 'encoder.layers'}\.(\d+)\.")
    layers = len({m[1] for name in view.names if (m := layer.match(name))})
    places, width = view.shape(table)
    config: Config = {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
        "vocab_size": view.shape(words)[0], "hidden_size": width,
        "intermediate_size": view.shape(f"{'transformer' if opened else 'text_model'}.{inner}")[0],
        "num_hidden_layers": layers, "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": places, "bos_token_id": 0, "eos_token_id": 2,
        "pad_token_id": 1, **(OPEN_CLIP if opened else CLIP),
    }  # fmt: skip
    if width % HEAD_WIDTH:
        raise UserError(
            f"a text encoder {width} wide is of no release, so that its heads can't be told; {SAY}"
        )
    return config


def for_part(config: Config, view: Weights, part: str, opened: bool) -> Config:
    """A text encoder's config as its place in a pipeline wants it.

    SD 2 reads the last layer but one, so that diffusers leaves its last out; SDXL's second encoder
    has a projection.
    """
    if part == "text_encoder_2":
        width = view.shape("text_projection")[1]
        return config | {
            "architectures": ["CLIPTextModelWithProjection"], "projection_dim": width,
        }  # fmt: skip
    if opened and config["num_hidden_layers"] == 24:
        return config | {"num_hidden_layers": 23}
    return config


def scheduler_config(prediction_type: str, zero_snr: bool) -> Config:
    """The noise schedule that all releases share."""
    config = SCHEDULE | {"prediction_type": prediction_type}
    if zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def marked_prediction(weights: Weights, view: Weights, family: str) -> str | None:
    """What a file says that its UNet (`view`) predicts: by mark, header or SD 2's bias."""
    spec = spec_prediction(weights.metadata)
    if "v_pred" in weights or spec == "v_prediction":
        return "v_prediction"
    plain = V_BIAS in view and view.shape("input_blocks.0.0.weight")[1] == PLAIN_CHANNELS
    if plain and family == "sd2" and SPEC_KEY not in weights.metadata:
        spread = torch.std(view[V_BIAS].float(), unbiased=False)
        return "v_prediction" if spread > V_SPREAD else "epsilon"
    return spec


def told_prediction(weights: Weights, view: Weights, family: str) -> str:
    """The same; epsilon where nothing says otherwise."""
    return marked_prediction(weights, view, family) or "epsilon"


def spec_prediction(metadata: dict[str, str]) -> str | None:
    """What a header says in its own words that a UNet predicts."""
    words = {"v": "v_prediction", "eps": "epsilon"}
    spec = metadata.get(SPEC_KEY, "")
    return next((found for start, found in words.items() if spec.startswith(start)), None)


def check_channels(where: str, config: Config) -> None:
    """Raise UserError unless a pipeline's UNet takes what one known here does."""
    channels = config.get("in_channels", PLAIN_CHANNELS)
    if channels not in (config.get("out_channels", PLAIN_CHANNELS), *TASKS):
        raise UserError(
            f"{where}: its UNet takes {channels} channels, as that of SD 2's depth model (5) or "
            "upscaler (7) does; whole models whose UNet takes 4, 8 or 9 are known here"
        )


def pipeline_class(channels: int, two: bool, told: str = "") -> str:
    """diffusers' pipeline of a UNet of so many channels, `two` text encoders or one beside it.

    Where channels don't tell, it is the one that is `told`.
    """
    if told and channels == PAIR_CHANNELS:
        return told
    return f"StableDiffusion{'XL' if two else ''}{TASKS.get(channels, '')}Pipeline"


def is_pipeline(name: object) -> bool:
    """Whether this is the class of a pipeline known here."""
    known = (PLAIN_CHANNELS, *TASKS)
    return name in [pipeline_class(channels, two) for channels in known for two in (False, True)]


def marks(scheduler: Config) -> Weights:
    """The empty tensors by which A1111 and ComfyUI know v-prediction and zero terminal SNR."""
    v = scheduler.get("prediction_type") == "v_prediction"
    wanted = dict(zip(MARKS, (v, bool(scheduler.get("rescale_betas_zero_snr"))), strict=True))
    return InMemory({name: torch.zeros(0) for name, there in wanted.items() if there})

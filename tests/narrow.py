"""Narrow, randomly initialised bases of the real classes, blocks and key layouts, made here.

`make_base("sdxl", folder)` writes a diffusers folder. Depths are those of the released models, so
the names of all tensors are too; only widths are small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from controlfill.models import embedded

WORDS = ["a", "red", "cat", "on", "mat"]
XL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 32),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (1, 2, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    # The pooled text and the six numbers of size and crop.
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "cross_attention_dim": 32 + 32,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": 2,
             "cross_attention_dim": 32},
    "sd2": {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": (1, 1, 2, 2),
            "cross_attention_dim": 32, "use_linear_projection": True},
    "sdxl": XL_BLOCKS,
}  # fmt: skip
# Layers of the text encoders: all of SD 1.5's twelve, SD 2's first 23 of 24, SDXL's 12 and 32.
LAYERS = {"sd15": (12,), "sd2": (23,), "sdxl": (12, 32)}


def make_base(family: str, folder: Path, in_channels: int = 4, seed: int = 0) -> Path:
    """Write a narrow base of `family` (sd15, sd2 or sdxl) as a diffusers folder; returns it.

    `in_channels` 9 makes it an inpaint base; SD 2 predicts v, as its 768 px checkpoints do.
    """
    import diffusers

    torch.manual_seed(seed)
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    parts = {
        "vae": make_vae(family),
        "unet": make_unet(family, in_channels),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            clip_sample=False, set_alpha_to_one=False, prediction_type=prediction,
        ),
        **make_text(family, folder),
    }  # fmt: skip
    kind = "StableDiffusionXL" if family == "sdxl" else "StableDiffusion"
    cls = getattr(diffusers, f"{kind}{'Inpaint' if in_channels == 9 else ''}Pipeline")
    if family != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    cls(**parts).save_pretrained(folder)
    return folder


def make_unet(family: str, in_channels: int = 4) -> Any:
    """A narrow UNet of `family`."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, layers_per_block=2, norm_num_groups=4,
        **UNETS[family],
    )  # fmt: skip


def make_vae(family: str) -> Any:
    """A narrow autoencoder with the depth of Stable Diffusion's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4, sample_size=64,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )  # fmt: skip


def make_text(family: str, folder: Path) -> dict[str, Any]:
    """Tokenizers and text encoders of `family`, by the names of a pipeline's parts."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, *second = LAYERS[family]
    parts: dict[str, Any] = {}
    for number, layers in enumerate([first, *second]):
        tail = f"_{number + 1}" if number else ""
        tokenizer = embedded.make_tokenizer(WORDS, folder / f"tokenizer{tail}")
        act = "quick_gelu" if family == "sd15" or (family == "sdxl" and not number) else "gelu"
        cls = CLIPTextModelWithProjection if number else CLIPTextModel
        parts[f"tokenizer{tail}"] = tokenizer
        parts[f"text_encoder{tail}"] = cls(text_config(tokenizer, layers, act))
    return parts


def text_config(tokenizer: Any, layers: int, act: str) -> Any:
    """The config of a CLIP text encoder 32 wide."""
    from transformers import CLIPTextConfig

    bos, eos = (int(i) for i in tokenizer("").input_ids)
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=32, hidden_act=act,
        bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip

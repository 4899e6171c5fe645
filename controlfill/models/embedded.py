"""The embedded base: a whole Stable Diffusion small enough to ship, of the usual diffusers classes.

Only its proportions differ from SD 1.5: the same five folders, the same keys, the same code path.
Prediction is v with zero terminal SNR and trailing timesteps (Lin et al. 2023, "Common Diffusion
Noise Schedules and Sample Steps are Flawed"), which a small network learns much faster.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

# The base of coloured shapes, its sibling that sees masks itself, and the base of keyboard skins.
EMBEDDED, INPAINT, SKINS = "embedded", "embedded-inpaint", "embedded-skins"
ASSETS = Path(__file__).parent.parent / "assets"
FOLDERS = {
    EMBEDDED: ASSETS / "embedded",
    INPAINT: ASSETS / "embedded_inpaint",
    SKINS: ASSETS / "embedded_skins",
}
# The ControlNets beside them.
CONTROLS = {
    EMBEDDED: FOLDERS[EMBEDDED] / "controlnet_inpaint",
    SKINS: FOLDERS[SKINS] / "controlnet_skins",
}
IMAGE_SIZE = 64
MAX_TOKENS = 32
TEXT_WIDTH = 128
# Measured on held-out pictures: see docs/embedded.md.
GUIDANCE = 2.0


def make_vae() -> AutoencoderKL:
    """A fresh autoencoder: RGB to 4 latents at a quarter of the size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        # The library declares these as tuples of one.
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        block_out_channels=(24, 48, 64),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        # Attention over all latents would make the memory of large pictures grow quadratically.
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """A fresh UNet with attention at a half and a quarter of the latent size only.

    The prompt also scales and shifts the features of every block, as in DeepFloyd IF: so it reaches
    the full latent size, where outlines are drawn and attention would be slow on a CPU.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96, 176),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        resnet_time_scale_shift="scale_shift",
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh two-layer CLIP text encoder for the vocabulary of `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    bos, eos = (int(i) for i in tokenizer("").input_ids)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )
    # CLIP starts with words fifty times smaller than what attention adds to them: each place then
    # says the mean of all words before it, and a small UNet learns shapes very slowly from that.
    words: Any = encoder.get_input_embeddings()
    torch.nn.init.normal_(words.weight)
    return encoder


def make_scheduler() -> DDPMScheduler:
    """The noise schedule of the embedded base."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # what SD 1.5 has; trailing timesteps have no use for it
    )


def make_tokenizer(words: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in `folder` where each of `words` is one token and any text has some."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Whitespace
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(words, trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["".join(merge.split()) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_index(folder: Path) -> None:
    """Write the model_index.json that makes `folder` a diffusers pipeline folder."""
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", "utf-8")


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

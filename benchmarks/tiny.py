"""A narrow SD 1.5 and pairs of pictures, both made from a seed: what the benchmarks train on.

All widths are a fifth of SD 1.5's (3/16 in the VAE), those of the ControlNet's hint too, and
attention heads are as wide as there, so that every part keeps about its share of a training step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

WORDS = ["a", "red", "green", "blue", "round", "square", "house", "cloud", "river", "on", "grass"]
WIDTH = 64
PAIRS = 64
SIZE = (480, 640)


def unet_config(width: int) -> dict[str, Any]:
    """SD 1.5's UNet at first width `width` instead of 320."""
    return {
        "sample_size": 32,
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "layers_per_block": 2,
        "attention_head_dim": 2,  # the number of heads, as diffusers calls it: 32 channels each
        "cross_attention_dim": 3 * width,
        "norm_num_groups": min(32, width // 2),
    }


def vae_config(width: int) -> dict[str, Any]:
    """SD 1.5's VAE at first width 3/8 of `width` instead of 128."""
    first = 3 * width // 8
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (first, 2 * first, 4 * first, 4 * first),
        "layers_per_block": 2,
        "norm_num_groups": first // 3,
        "sample_size": 256,
    }


def make_base(folder: Path, width: int = WIDTH, seed: int = 0) -> Path:
    """A diffusers folder of a randomly initialised narrow SD 1.5; kept if it is there."""
    if (folder / "model_index.json").is_file():
        return folder
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel

    from controlfill.models import embedded

    torch.manual_seed(seed)
    tokenizer = embedded.make_tokenizer(WORDS, folder / "tokenizer")
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    make_text_encoder(tokenizer, 3 * width).save_pretrained(folder / "text_encoder")
    AutoencoderKL(**vae_config(width)).save_pretrained(folder / "vae")
    unet = UNet2DConditionModel(**unet_config(width))
    unet.save_pretrained(folder / "unet")
    # Both trainers start from it: one of their own would have hint layers of SD 1.5's full width.
    hint = tuple(width * full // 320 for full in (20, 40, 100, 260))
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint).save_pretrained(
        folder / "controlnet"
    )
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ).save_pretrained(folder / "scheduler")
    embedded.write_index(folder)
    return folder


def make_text_encoder(tokenizer: Any, width: int) -> Any:
    """Three layers of CLIP for the vocabulary of `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    first, last = (int(i) for i in tokenizer("").input_ids)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=3, num_attention_heads=width // 32, max_position_embeddings=77,
            projection_dim=width, bos_token_id=first, eos_token_id=last, pad_token_id=last,
        )
    )  # fmt: skip


def draw_picture(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture with the detail of a photograph, uint8 RGB (H, W, 3): noise of all scales."""
    height, width = size
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64, 256, 640):
        coarse = rng.standard_normal((cells * height // width + 1, cells, 3)).astype(np.float32)
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / cells**0.3
    return (128 + 40 * picture).clip(0, 255).astype(np.uint8)


def make_pairs(folder: Path, count: int = PAIRS, seed: int = 0) -> Path:
    """`count` JPEG pairs of 640x480 in the layouts of both trainers; kept if they are there.

    `pairs/train.jsonl` is the layout of fill50k, `imagefolder/metadata.jsonl` that of the datasets
    library, which the stock script reads. The pictures are the same files.
    """
    ready = folder / "ready"
    if ready.is_file() and ready.read_text() == str(count):
        return folder
    rng = np.random.default_rng(seed)
    for layout in ("pairs", "imagefolder"):
        for kind in ("source", "target"):
            (folder / layout / kind).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        target = draw_picture(rng)
        regions = cv2.blur(target, (9, 9)) // 64 * 64
        rows.append([f"{kind}/{number}.jpg" for kind in ("target", "source")])
        for name, picture in zip(rows[-1], (target[..., ::-1], regions), strict=True):
            place(folder, name, picture)
        rows[-1].append(" ".join(rng.choice(WORDS, 6)))
    write_rows(folder, rows)
    ready.write_text(str(count))
    return folder


def place(folder: Path, name: str, picture: np.ndarray) -> None:
    """Write a picture once and link it into the second layout."""
    first, second = (folder / layout / name for layout in ("pairs", "imagefolder"))
    cv2.imwrite(str(first), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
    second.unlink(missing_ok=True)
    os.link(first, second)


def write_rows(folder: Path, rows: list[list[str]]) -> None:
    """The tables of both layouts."""
    fill50k = ("image", "conditioning_image", "text")
    library = ("file_name", "conditioning_image_file_name", "text")
    tables = {"pairs/train.jsonl": fill50k, "imagefolder/metadata.jsonl": library}
    for name, columns in tables.items():
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n")

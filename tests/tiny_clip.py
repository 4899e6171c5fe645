"""A tiny, randomly initialised CLIP of the real classes, made here."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from controlfill.models import embedded


def make_clip(folder: Path, seed: int = 0) -> str:
    """Write a CLIP that sees 16 px at once, so that its opinion is a smooth one; its folder."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tokenizer = embedded.make_tokenizer(["a", "red", "star", "cat"], folder)
    bos, eos = (int(i) for i in tokenizer("").input_ids)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **small}
    vision = {"image_size": 16, "patch_size": 16, **small}
    config = CLIPConfig(
        text_config={**text, "bos_token_id": bos, "eos_token_id": eos},
        vision_config=vision,
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    colours = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    return str(folder)

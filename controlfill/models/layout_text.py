"""CLIP text encoders: transformers' names, which SD 1.5 kept, and OpenCLIP's of SD 2 and SDXL."""

from __future__ import annotations

import re
from collections.abc import Iterable

from controlfill.models.layout import How, Row

# Newer versions of transformers leave this out in the state of a CLIPTextModel; files keep it.
NESTED = "text_model."
OPEN_FIXED = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_LAYER = {
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.", "self_attn.out_proj.": "attn.out_proj.",
}  # fmt: skip
FUSED: dict[str, How] = {"q": "query", "k": "key", "v": "value"}
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")


def full_name(name: str) -> str:
    """A tensor's name in files; the state of a model may name it without its start."""
    bare = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return NESTED + name if bare else name


def clip_rows(names: Iterable[str]) -> tuple[list[Row], list[str]]:
    """The rows of a CLIP text encoder that the original holds under transformers' names."""
    return [Row(name, name) for name in names], []


def open_clip_rows(names: Iterable[str]) -> tuple[list[Row], list[str]]:
    """The rows of a text encoder that the original holds as OpenCLIP, and names that have none."""
    rows, unknown = [], []
    for name in names:
        row = open_clip_row(name)
        if row is None:
            unknown.append(name)
        else:
            rows.append(row)
    return rows, unknown


def open_clip_row(name: str) -> Row | None:
    """The row of one tensor; None where OpenCLIP has none."""
    if name == "text_projection.weight":
        return Row(name, "text_projection", "turned")
    if name in OPEN_FIXED:
        return Row(name, OPEN_FIXED[name])
    found = LAYER.match(name)
    if not found:
        return None
    head, tail = f"transformer.resblocks.{found[1]}.", name[found.end() :]
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", tail):
        return Row(name, f"{head}attn.in_proj_{fused[2]}", FUSED[fused[1]])
    start = next((old for old in OPEN_LAYER if tail.startswith(old)), None)
    return None if start is None else Row(name, head + OPEN_LAYER[start] + tail[len(start) :])

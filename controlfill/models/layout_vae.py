"""Autoencoders: what diffusers calls their tensors, and what Stable Diffusion did."""

from __future__ import annotations

import re
from collections.abc import Iterable

from controlfill.models.layout import Row

# Older versions of diffusers called the parts of the middle's attention so; files of theirs are
# everywhere.
OLD_ATTENTION = {
    "query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0.",
}  # fmt: skip
ATTENTION = {
    "group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out.",
}  # fmt: skip
ATTENDED = re.compile(r"((?:en|de)coder)\.mid_block\.attentions\.0\.")
MIDDLE = re.compile(r"((?:en|de)coder)\.mid_block\.resnets\.(\d)\.")
BLOCK = re.compile(
    r"((?:en|de)coder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\."
)
SAME = ("encoder.conv_in.", "encoder.conv_out.", "decoder.conv_in.", "decoder.conv_out.",
        "quant_conv.", "post_quant_conv.")  # fmt: skip


def vae_rows(names: Iterable[str]) -> tuple[list[Row], list[str]]:
    """The rows of an autoencoder with these diffusers `names`, and names that have none."""
    names = list(names)
    found = [m for name in names if (m := BLOCK.match(name)) and m[2] == "up"]
    top = max((int(m[3]) for m in found), default=0)
    rows, unknown = [], []
    for name in names:
        original = vae_name(name, top)
        attended = ATTENDED.match(name) and name.endswith(".weight") and "group_norm" not in name
        if original is None:
            unknown.append(name)
        else:
            rows.append(Row(name, original, "conv" if attended else "same"))
    return rows, unknown


def vae_name(name: str, top: int) -> str | None:
    """The original name of a tensor, None where it has none; `top` is the last up block's number.

    The original counts its up blocks from the finest, diffusers from the coarsest.
    """
    if name.startswith(SAME):
        return name
    if found := re.match(r"((?:en|de)coder)\.conv_norm_out\.", name):
        return f"{found[1]}.norm_out.{name[found.end() :]}"
    if found := MIDDLE.match(name):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{_resnet(name[found.end() :])}"
    if found := ATTENDED.match(name):
        tail = name[found.end() :]
        start = next((old for old in ATTENTION if tail.startswith(old)), None)
        return start and f"{found[1]}.mid.attn_1.{ATTENTION[start]}{tail[len(start) :]}"
    found = BLOCK.match(name)
    return found and _block_name(found, name[found.end() :], top)


def _block_name(found: re.Match[str], tail: str, top: int) -> str:
    number = int(found[3])
    head = f"{found[1]}.{found[2]}.{number if found[2] == 'down' else top - number}"
    if found[4] == "resnets":
        return f"{head}.block.{found[5]}.{_resnet(tail)}"
    return f"{head}.{found[4].removesuffix('rs')}.{tail}"


def _resnet(tail: str) -> str:
    return tail.replace("conv_shortcut.", "nin_shortcut.")


def newer_name(name: str) -> str:
    """What diffusers of today calls the tensor that an older version called `name`."""
    found = ATTENDED.match(name)
    if not found:
        return name
    tail = name[found.end() :]
    start = next((old for old in OLD_ATTENTION if tail.startswith(old)), None)
    return (
        name if start is None else name[: found.end()] + OLD_ATTENTION[start] + tail[len(start) :]
    )

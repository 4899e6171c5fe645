"""Weights of their own for the blocks of a UNet, as in the community's block-weighted merges.

Blocks are called BASE (text encoders, VAE, what SDXL embeds beside the time: all that is no block),
IN00 to IN11, M00, OUT00 to OUT11; SDXL has IN00 to IN08 and OUT00 to OUT08. The time embedding
belongs to IN00 and the last convolution to the last OUT, as in sd-webui-supermerger, so its lists
mean the same here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from controlfill.errors import UserError
from controlfill.models.recognise import UNET

BASE, MIDDLE = "BASE", "M00"
# Resnets in each block, and what changes its size; Stable Diffusion has two and one.
USUAL_LAYERS = 3


def find_blocks(names: Iterable[str]) -> dict[str, str]:
    """The block of each tensor, by its name in either layout."""
    short = {name: name.removeprefix("unet/").removeprefix(UNET) for name in names}
    layers = count_layers(short.values())
    found = {name: block_of(key, layers) for name, key in short.items()}
    last = max((b for b in found.values() if b.startswith("OUT") and b != "OUT"), default=BASE)
    return {name: last if block == "OUT" else block for name, block in found.items()}


def count_layers(keys: Iterable[str]) -> int:
    """How many of the community's blocks one of diffusers' blocks is."""
    found = [int(m[1]) for key in keys if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", key))]
    return max(found) + 2 if found else USUAL_LAYERS


def block_of(key: str, layers: int) -> str:
    """The block of a UNet's tensor; plain OUT is the end of the network."""
    if re.match(r"(conv_in|time_embed|time_embedding)\.", key):
        return "IN00"
    if re.match(r"(conv_norm_out|conv_out|out)\.", key):
        return "OUT"
    if re.match(r"(mid_block|middle_block)\.", key):
        return MIDDLE
    if found := re.match(r"(input|output)_blocks\.(\d+)\.", key):
        return f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02}"
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.", key):
        way, block, kind, number = found[1], int(found[2]), found[3], int(found[4])
        # A sampler is IN03 behind IN01 and IN02, but belongs to OUT02 on the way up.
        sampler = layers - 1
        inside = sampler if kind.endswith("samplers") else number
        return (
            f"IN{1 + block * layers + inside:02}"
            if way == "down"
            else (f"OUT{block * layers + inside:02}")
        )
    return BASE


def read_block_alphas(text: str, blocks: dict[str, str]) -> dict[str, float]:
    """The alphas that `text` gives to some of `blocks`: numbers with commas, or a YAML file.

    Raises UserError for unknown blocks, wrong counts and what is no number.
    """
    order = block_order(blocks.values())
    values = read_values(text)
    if isinstance(values, list):
        return from_list(values, order)
    alphas: dict[str, float] = {}
    known = group_blocks(blocks, order)
    for key, value in values.items():
        if str(key) not in known:
            raise UserError(f"--block_alphas: {key} is no block; there are: {', '.join(known)}")
        number = as_number(value, str(key))
        # What names a single block wins over a group that it lies in.
        for block in known[str(key)]:
            if len(known[str(key)]) == 1 or block not in alphas:
                alphas[block] = number
    return alphas


def read_values(text: str) -> list[Any] | dict[Any, Any]:
    """A list or a mapping of numbers, from a YAML file or from words."""
    import yaml

    path = Path(text)
    if not text.strip():
        raise UserError(
            "--block_alphas is empty; give numbers with commas, or a YAML file of `block: alpha` "
            "lines"
        )
    if path.suffix not in (".yaml", ".yml"):
        return [part.strip() for part in text.split(",")]
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--block_alphas {text} can't be read: {reason}") from error
    if not isinstance(values, (list, dict)) or not values:
        raise UserError(f"--block_alphas {text} holds neither a list nor `block: alpha` lines")
    return values


def from_list(values: list[Any], order: list[str]) -> dict[str, float]:
    """The alphas of a list: all blocks, or all but BASE."""
    named = order[len(order) - len(values) :]
    fits = len(values) in (len(order), len(order) - 1)
    where = named if fits else [f"number {place + 1}" for place in range(len(values))]
    numbers = [as_number(value, place) for value, place in zip(values, where, strict=True)]
    if not fits:
        raise UserError(
            f"--block_alphas has {len(values)} numbers; this UNet takes {len(order)} ("
            f"{order[0]}, {order[1]} to {order[-1]}), or {len(order) - 1} without {BASE}"
        )
    return dict(zip(named, numbers, strict=True))


def as_number(value: Any, where: str) -> float:
    """`value` as a finite number. Raises UserError that names `where`."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        seen = repr(value) if value not in ("", None) else "empty"
        raise UserError(f"--block_alphas: {where} is {seen}; give a finite number, such as 0.5")
    return number


def block_order(found: Iterable[str]) -> list[str]:
    """All blocks of a UNet in the order of lists: BASE, IN, M, OUT."""
    known = set(found) - {BASE}
    ways = (sorted(b for b in known if b.startswith(way)) for way in ("IN", "M", "OUT"))
    return [BASE, *(block for way in ways for block in way)]


def group_blocks(blocks: dict[str, str], order: list[str]) -> dict[str, list[str]]:
    """The blocks that each known name means: their own names, and those of diffusers' blocks."""
    groups = {block: [block] for block in order}
    for name, block in blocks.items():
        if found := re.search(r"(?:^|/)((?:down|up)_blocks\.\d+|mid_block)\.", name):
            members = groups.setdefault(found[1], [])
            if block not in members:
                members.append(block)
    return groups

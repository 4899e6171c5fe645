"""Options of the commands that write data in other layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from controlfill.options.data import DataOptions

HintName = Literal["edges", "none"]
ImageFormat = Literal["jpg", "png"]


@dataclass(frozen=True, kw_only=True)
class PrepareTableOptions(DataOptions):
    """Write pictures with conditioning pictures beside them: train.jsonl, as fill50k has it."""

    data: Positional[str]
    """Any data that training reads: a folder, `world:shapes`, `hf:NAME`, tar shards."""
    out: Positional[Path]
    """The folder to write."""
    count: int | None = None
    """Pictures to write, the first ones; all of them otherwise."""
    make_hint: HintName = "edges"
    """Conditioning picture of data that has none: `edges` (Canny), or `none`."""
    image_format: ImageFormat = "png"
    """Format of the pictures: png keeps every pixel, jpg takes a tenth of the space."""


@dataclass(frozen=True, kw_only=True)
class PrepareShardsOptions(DataOptions):
    """Write pictures into tar shards, which training streams; run it again to go on."""

    data: Positional[str]
    """Any data that training reads: a folder, COCO with its files, `world:shapes`, `hf:NAME`."""
    out: Positional[Path]
    """The folder to write."""
    count: int | None = None
    """Pictures to write, the first ones; all of them otherwise."""
    per_shard: int = 1000
    """Pictures per tar."""
    make_hint: HintName = "none"
    """Conditioning picture of data that has none: `edges` (Canny), or `none`."""
    image_format: ImageFormat = "jpg"
    """Format of the pictures: png keeps every pixel, jpg takes a tenth of the space."""

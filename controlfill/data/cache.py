"""Caches of what frozen encoders say: posteriors of pictures, vectors of prompts.

    cache/
      index.json                what was encoded, by which encoders, and which shard holds what
      latents-00000.safetensors one tensor per picture and cut, "<index>.<variant>": (2, C, h, w)
      texts.safetensors         all prompts, (N, tokens, width), and for SDXL their `pooled` words
                                (N, width); their order is in index.json

The index carries the encoders' hashes: other weights are refused, never mixed. Shards are opened as
memory maps, so worker processes share them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from controlfill.data.sample import Latents, Source
from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.options import DataOptions

INDEX = "index.json"
TEXTS = "texts.safetensors"
VERSION = 1
# Data options that decide what a cut is; a cache made with others is stale.
CUT_OPTIONS = ("image_size", "crop", "random_flip", "seed", "max_train_samples")


@dataclass(kw_only=True)
class LatentCache:
    """Posteriors by picture and cut, read from shards as they are needed."""

    folder: Path
    shard_of: dict[str, str]
    variants: int
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def read(self, index: int, variant: int) -> np.ndarray:
        """Mean and deviation (2, C, h, w) of cut `variant` of picture `index`.

        Raises UserError for a picture that could not be read when the cache was made.
        """
        key = f"{index}.{variant}"
        name = self.shard_of.get(key)
        if name is None:
            raise UserError(f"picture {index} is not in the cache {self.folder}: it was unreadable")
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="numpy")
        return self._open[name].get_tensor(key)

    def __getstate__(self) -> dict[str, Any]:
        """Maps are opened anew in each worker process."""
        return {**self.__dict__, "_open": {}}


@dataclass(frozen=True, kw_only=True)
class JoinedLatents:
    """Latents of two caches: those of pictures from number `first` on are in `others`."""

    own: Latents
    others: Latents
    first: int

    @property
    def variants(self) -> int:
        """Cuts per picture, in both."""
        return self.own.variants

    def read(self, index: int, variant: int) -> np.ndarray:
        """Mean and deviation (2, C, h, w) of cut `variant` of picture `index`."""
        return (self.own if index < self.first else self.others).read(index, variant)


@dataclass(frozen=True, kw_only=True)
class TextCache:
    """The vectors of all prompts of a data set, and of the empty one, as one memory map."""

    place: dict[str, int]
    vectors: Tensor
    pooled: Tensor | None = None

    def get(self, prompts: list[str]) -> tuple[Tensor, Tensor | None] | None:
        """The vectors (B, tokens, width) of `prompts`; None unless all of them are there.

        Beside them those of each prompt as a whole (B, width), where the base has such.
        """
        places = [self.place.get(prompt) for prompt in prompts]
        if any(place is None for place in places):
            return None
        rows = torch.tensor(places)
        return self.vectors[rows].float(), None if self.pooled is None else self.pooled[
            rows
        ].float()


@dataclass(frozen=True, kw_only=True)
class Cache:
    """An opened cache: latents, and texts if they were encoded too."""

    latents: LatentCache
    texts: TextCache | None


def describe(where: str, source: Source, options: DataOptions, buckets: bool) -> dict[str, Any]:
    """What a cache of `source` is made from, encoders apart; equal in caching and in training."""
    cuts = {name: getattr(options, name) for name in CUT_OPTIONS}
    about = {"version": VERSION, "data": where, "pictures": len(source)}
    return {**about, **cuts, "aspect_ratio_buckets": buckets}


def open_cache(folder: Path, wanted: dict[str, Any]) -> Cache:
    """The cache in `folder`. Raises UserError when it is none, or was made from something else.

    `wanted` is what the training would write into the index: data, cuts, encoders' hashes.
    """
    if not (folder / INDEX).is_file():
        raise UserError(
            f"--cache_dir {folder} holds no cache; make one with `controlfill cache` first"
        )
    index = read_json(folder / INDEX)
    check_fresh(index, wanted, folder)
    latents = LatentCache(
        folder=folder, shard_of=index["shards"], variants=index["made_from"]["variants"]
    )
    texts = None
    if index["prompts"]:
        with safe_open(folder / TEXTS, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        place = {prompt: i for i, prompt in enumerate(index["prompts"])}
        texts = TextCache(place=place, vectors=kept["texts"], pooled=kept.get("pooled"))
    return Cache(latents=latents, texts=texts)


def check_fresh(index: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise UserError that names the first thing in which a cache differs from what is wanted."""
    made = index["made_from"]
    for name, value in wanted.items():
        if made.get(name) != value:
            raise UserError(
                f"the cache {folder} is stale: it was made with {name} {made.get(name)}, this run "
                f"has {value}; run `controlfill cache` again into another --cache_dir"
            )

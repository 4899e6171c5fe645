"""Caches of what frozen encoders say: posteriors of pictures, vectors of prompts.

    cache/
      index.json                what was encoded, by which encoders, and which shard holds what
      latents-00000.safetensors one tensor per picture and cut, "<index>.<variant>": (2, C, h, w)
      texts.safetensors         all prompts, (N, tokens, width), and for SDXL their `pooled` words
                                (N, width); their order is in index.json

The index carries the encoders' hashes and one of the pictures' names, sizes and times: others are
refused, never mixed. Shards are opened as memory maps, so worker processes share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from controlfill.data.coco import CocoSource
from controlfill.data.sample import Latents, Source
from controlfill.data.sources import FolderSource
from controlfill.data.tables import TableSource
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
    mark = hash_files(files_of(source, len(source)))
    files = {"files": mark} if mark else {}
    return {**about, **cuts, "aspect_ratio_buckets": buckets, **files}


def files_of(source: Source, count: int) -> Iterator[Path]:
    """The first `count` pictures and their masks; none where data has no files for them.

    Captions are not among them: a prompt that no cache has is encoded when it is met.
    """
    if (inner := getattr(source, "source", None)) is not None:
        yield from files_of(inner, count)
    elif isinstance(source, FolderSource):
        yield from source.files[:count]
        yield from (source.masks[file] for file in source.files[:count] if source.masks)
    elif isinstance(source, TableSource):
        yield from (source.folder / source.images[i] for i in range(count))
    elif isinstance(source, CocoSource):
        yield from (source.image_dir / source.index.name(int(i)) for i in source.kept[:count])


def hash_files(files: Iterator[Path]) -> str:
    """A fingerprint of names, sizes and times (in seconds, as archives keep them); "" of none."""
    digest, some = hashlib.sha256(), False
    for file in files:
        try:
            state = file.stat()
            told = f"{file.name} {state.st_size} {int(state.st_mtime)}"
        except OSError:
            told = f"{file.name} is absent"
        digest.update(f"{told}\n".encode(errors="surrogateescape"))
        some = True
    return digest.hexdigest()[:16] if some else ""


def open_cache(folder: Path, wanted: dict[str, Any]) -> Cache:
    """The cache in `folder`. Raises UserError for none, for half of one, and for a stale one.

    `wanted` is what the training would write into the index: data, cuts, encoders' hashes.
    """
    if not (folder / INDEX).is_file():
        raise UserError(
            f"--cache_dir {folder} holds no cache; make one with `controlfill cache` first"
        )
    index = read_json(folder / INDEX)
    check_fresh(index, wanted, folder)
    has_texts = (folder / TEXTS).is_file()
    # Indices without the mark are from before there was one: texts came last.
    if not index.get("whole", has_texts or not index["prompts"]):
        raise UserError(
            f"the cache {folder} is not finished; `controlfill cache` with the options that it was "
            "begun with goes on where it was"
        )
    latents = LatentCache(
        folder=folder, shard_of=index["shards"], variants=index["made_from"]["variants"]
    )
    texts = None
    if has_texts:
        with safe_open(folder / TEXTS, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        place = {prompt: i for i, prompt in enumerate(index["prompts"])}
        texts = TextCache(place=place, vectors=kept["texts"], pooled=kept.get("pooled"))
    return Cache(latents=latents, texts=texts)


def check_fresh(index: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise UserError that names the first thing in which a cache differs from what is wanted."""
    made = index["made_from"]
    if (name := first_change(made, wanted)) is not None:
        raise UserError(
            f"the cache {folder} is stale: it was made with {name} {made[name]}, this run has "
            f"{wanted[name]}; run `controlfill cache` again into another --cache_dir"
        )


def first_change(made: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first thing in which two descriptions differ.

    What `made` doesn't know, as caches from before files were looked at don't, is no difference.
    """
    return next((name for name, value in wanted.items() if made.get(name, value) != value), None)

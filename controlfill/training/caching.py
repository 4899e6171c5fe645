"""`controlfill cache`: latents and texts encoded once, for every later run on the same data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from controlfill.data.cache import INDEX, TEXTS, describe
from controlfill.data.sample import PreparedSource
from controlfill.data.shards import ShardStream
from controlfill.data.sources import make_preparation, open_source
from controlfill.errors import UserError
from controlfill.files import read_json, whole_file, write_json
from controlfill.images import to_tensor
from controlfill.inference.pipeline import DTYPES, pick_device
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.text import join_words
from controlfill.options import CacheOptions
from controlfill.training.batches import calm_worker
from controlfill.training.start import open_buckets

PER_SHARD = 2048
Report = Callable[[str, int, int], None]


class Cuts(Dataset[tuple[str, np.ndarray | str, list[str]]]):
    """Every cut of every picture: its key, its pixels or why there are none, and its prompts."""

    def __init__(self, data: PreparedSource, keys: list[tuple[int, int]], texts: bool) -> None:
        self.data, self.keys, self.texts = data, keys, texts

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> tuple[str, np.ndarray | str, list[str]]:
        index, variant = self.keys[place]
        try:
            cut, prompts = self.data.cut(index, variant)
        except UserError as error:
            return f"{index}.{variant}", str(error), []
        return f"{index}.{variant}", cut, prompts if self.texts and variant == 0 else []


def build_cache(options: CacheOptions, report: Report) -> tuple[Path, list[str]]:
    """Encode all that is not in the cache yet; returns its folder and why pictures were skipped.

    Shards are written whole, the index last, so an interrupted pass goes on where it was.
    """
    source = open_source(options.data, options)
    if isinstance(source, ShardStream):
        raise UserError("tar shards can't be cached: their pictures have no fixed places")
    bundle = load_bundle(options.pretrained_model_name_or_path, inpainting=True)
    bundle.check_size(options.image_size)
    about = {
        **describe(options.data, source, options, options.aspect_ratio_buckets),
        **bundle.fingerprints(),
        "variants": options.variants,
        "dtype": options.mixed_precision,
    }
    folder = options.cache_dir
    index = start_index(folder, about)
    buckets = open_buckets(options, source, bundle)
    data = PreparedSource(source, make_preparation(options), options.seed, buckets)
    bundle.to(pick_device(options.device), DTYPES[options.mixed_precision])
    skipped = encode_cuts(options, bundle, data, index, report)
    if options.text:
        encode_texts(folder, bundle, index, report)
    write_json(folder / INDEX, index)
    return folder, skipped


def start_index(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The index of a cache that goes on, or an empty one. Raises UserError for another's folder."""
    if not (folder / INDEX).is_file():
        return {"made_from": about, "shards": {}, "prompts": []}
    index = read_json(folder / INDEX)
    if index["made_from"] != about:
        other = next(k for k, v in about.items() if index["made_from"].get(k) != v)
        raise UserError(
            f"{folder} holds a cache made with {other} {index['made_from'].get(other)}, not "
            f"{about[other]}; give another --cache_dir"
        )
    return index


def encode_cuts(
    options: CacheOptions,
    bundle: Bundle,
    data: PreparedSource,
    index: dict[str, Any],
    report: Report,
) -> list[str]:
    """Encode the cuts that are missing, shard by shard; returns why pictures were skipped."""
    keys = [(i, v) for v in range(options.variants) for i in range(len(data.source))]
    missing = [(i, v) for i, v in keys if f"{i}.{v}" not in index["shards"]]
    prompts, skipped = dict.fromkeys(index["prompts"]), []
    done = len(keys) - len(missing)
    shards = len(set(index["shards"].values()))
    for number, start in enumerate(range(0, len(missing), PER_SHARD), shards):
        part = missing[start : start + PER_SHARD]
        tensors: dict[str, Tensor] = {}
        for batch in read_cuts(options, data, part):
            for _, cut, words in batch:
                prompts |= dict.fromkeys(words)
                skipped += [cut] if isinstance(cut, str) else []
            tensors |= encode_batch(bundle, [(k, c) for k, c, _ in batch if not isinstance(c, str)])
            done += len(batch)
            report("latents", done, len(keys))
        name = f"latents-{number:05d}.safetensors"
        save_tensors(tensors, options.cache_dir / name)
        index["shards"] |= dict.fromkeys(tensors, name)
        index["prompts"] = list(prompts)
        write_json(options.cache_dir / INDEX, index)
    return skipped


def read_cuts(
    options: CacheOptions, data: PreparedSource, keys: list[tuple[int, int]]
) -> Iterator[list[tuple[str, np.ndarray | str, list[str]]]]:
    """Batches of cuts, read by worker processes."""
    yield from DataLoader(
        Cuts(data, keys, options.text),
        batch_size=options.batch_size,
        num_workers=min(options.num_workers, os.cpu_count() or 1),
        collate_fn=list,
        worker_init_fn=calm_worker,
    )


def encode_batch(bundle: Bundle, cuts: list[tuple[str, np.ndarray]]) -> dict[str, Tensor]:
    """The posteriors of cuts by key; those of one size are encoded together."""
    moments: dict[str, Tensor] = {}
    for size in {cut.shape for _, cut in cuts}:
        same = [(key, cut) for key, cut in cuts if cut.shape == size]
        image = to_tensor(np.stack([cut for _, cut in same])).to(bundle.device)
        encoded = bundle.encode_moments(image * 2 - 1).cpu()
        # Arrays know no bfloat16, and means of latents are small numbers.
        encoded = encoded if encoded.dtype == torch.float32 else encoded.half()
        parts = zip(same, encoded, strict=True)
        moments |= {key: one.contiguous().clone() for (key, _), one in parts}
    return moments


def encode_texts(folder: Path, bundle: Bundle, index: dict[str, Any], report: Report) -> None:
    """Encode every wording once, and the empty prompt, which dropping prompts needs."""
    prompts = list(dict.fromkeys(["", *index["prompts"]]))
    parts = []
    for start in range(0, len(prompts), 64):
        parts.append(bundle.text.encode(prompts[start : start + 64]).each(Tensor.cpu))
        report("texts", min(start + 64, len(prompts)), len(prompts))
    words = join_words(parts)
    pooled = {} if words.pooled is None else {"pooled": words.pooled}
    save_tensors({"texts": words.tokens, **pooled}, folder / TEXTS)
    index["prompts"] = prompts


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file whole or not at all."""
    with whole_file(file) as temporary:
        save_file(tensors, temporary)

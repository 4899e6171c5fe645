"""`controlfill cache`: latents and texts encoded once, for every later run on the same data.

Class pictures, which a run may have to paint first, are encoded by the run, beside that cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from controlfill.data.cache import INDEX, TEXTS, describe, first_change
from controlfill.data.concepts import Joined, tell
from controlfill.data.sample import PreparedSource, Source
from controlfill.data.shards import ShardStream
from controlfill.data.sources import make_preparation, open_source
from controlfill.errors import UserError
from controlfill.files import read_json, whole_file, write_json
from controlfill.images import to_tensor
from controlfill.inference.pipeline import DTYPES, pick_device
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.text import join_words
from controlfill.options import CacheOptions, FinetuneOptions
from controlfill.training.batches import calm_worker
from controlfill.training.start import open_buckets

SHARD = "latents-"
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
    write_json(folder / INDEX, index | {"whole": True})
    return folder, skipped


def cache_classes(
    options: FinetuneOptions, bundle: Bundle, data: PreparedSource, report: Report
) -> Path:
    """Encode the class pictures of joined `data` that are not there yet; returns their folder.

    It lies in --cache_dir and is a cache like that one, named by all that decides what is in it: so
    other class pictures find another folder, and an interrupted pass goes on. Where texts are in
    the cache and their encoders are frozen, it has those that the run tells and the cache lacks.
    """
    joined, buckets, beside = data.source, data.buckets, options.cache_dir
    assert isinstance(joined, Joined)
    assert buckets is not None
    assert beside is not None
    index, first = read_json(beside / INDEX), len(joined.own)
    # Class pictures have a place in every size that there may be; few sizes are met.
    met = first + np.nonzero(np.isin(buckets.of[first:] - joined.times, buckets.of[:first]))[0]
    digest, own_words = look_at(joined.others, report)
    prompts: list[str] = []
    if not options.train_text_encoder and (beside / TEXTS).is_file():
        told = [tell(words, options.instance_prompt) for words in index["prompts"]]
        lacking = dict.fromkeys([*told, *own_words]).keys() - set(index["prompts"])
        prompts = ["", *sorted(lacking)] if lacking else []
    about = {
        **index["made_from"],
        "dtype": str(bundle.vae.dtype),
        "text_dtype": str(bundle.text.encoder.dtype),
        "class_pictures": digest,
        "class_texts": hash_of(json.dumps(prompts).encode()),
        "class_sizes": sorted({"{}x{}".format(*buckets.size_of(int(i))) for i in met}),
    }
    folder = beside / f"class_pictures-{hash_of(json.dumps(about).encode())}"
    asked = CacheOptions(
        data=options.pictures, cache_dir=folder, variants=about["variants"], text=False,
        batch_size=min(CacheOptions.batch_size, options.batch_size),
        num_workers=options.num_workers,
    )  # fmt: skip
    fresh = start_index(folder, about)
    classes = copy(data)
    classes.indices = met
    encode_cuts(asked, bundle, classes, fresh, report)
    if prompts and not (folder / TEXTS).is_file():
        encode_texts(folder, bundle, {"prompts": prompts}, report)
    write_json(folder / INDEX, fresh | {"prompts": prompts, "whole": True})
    return folder


def look_at(pictures: Source, report: Report) -> tuple[str, list[str]]:
    """A hash of what is cut of all `pictures`, and their prompts."""
    seen: list[str] = []
    prompts: list[str] = []
    for number in range(len(pictures)):
        try:
            sample = pictures[number]
        except UserError:
            seen.append("can't be used")
            continue
        parts = [part for part in (sample.image, sample.mask) if part is not None]
        seen += [f"{part.shape} {hash_of(part.tobytes())}" for part in parts]
        prompts += sample.prompts or [sample.prompt]
        report("class pictures read", number + 1, len(pictures))
    return hash_of(json.dumps(seen).encode()), prompts


def hash_of(data: bytes) -> str:
    """A fingerprint of `data`: 16 hex digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def start_index(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The index of a cache that goes on, or an empty one; it says that the cache is not whole.

    Raises UserError for another's folder.
    """
    start = {"made_from": about, "whole": False}
    if not (folder / INDEX).is_file():
        return {**start, "shards": {}, "prompts": []}
    index = read_json(folder / INDEX)
    made = index["made_from"]
    if (other := first_change(made, about)) is not None:
        raise UserError(
            f"{folder} holds a cache made with {other} {made[other]}, not {about[other]}; give "
            "another --cache_dir"
        )
    return {**index, **start}


def encode_cuts(
    options: CacheOptions,
    bundle: Bundle,
    data: PreparedSource,
    index: dict[str, Any],
    report: Report,
) -> list[str]:
    """Encode the cuts that are missing, shard by shard; returns why pictures were skipped."""
    keys = [(int(i), v) for v in range(options.variants) for i in data.indices]
    missing = [(i, v) for i, v in keys if f"{i}.{v}" not in index["shards"]]
    prompts, skipped = dict.fromkeys(index["prompts"]), []
    done = len(keys) - len(missing)
    first = 1 + max((number_of(name) for name in index["shards"].values()), default=-1)
    for number, start in enumerate(range(0, len(missing), PER_SHARD), first):
        part = missing[start : start + PER_SHARD]
        tensors: dict[str, Tensor] = {}
        for batch in read_cuts(options, data, part):
            for _, cut, words in batch:
                prompts |= dict.fromkeys(words)
                skipped += [cut] if isinstance(cut, str) else []
            tensors |= encode_batch(bundle, [(k, c) for k, c, _ in batch if not isinstance(c, str)])
            done += len(batch)
            report("latents", done, len(keys))
        if not tensors:
            continue
        name = f"{SHARD}{number:05d}.safetensors"
        save_tensors(tensors, options.cache_dir / name)
        index["shards"] |= dict.fromkeys(tensors, name)
        index["prompts"] = list(prompts)
        write_json(options.cache_dir / INDEX, index)
    return skipped


def number_of(shard: str) -> int:
    """The number in a shard's name."""
    return int(Path(shard).stem.removeprefix(SHARD))


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

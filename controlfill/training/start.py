"""The start of a run: what all runs share, options that become data in order, and a folder."""

from __future__ import annotations

import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from controlfill.data.buckets import Buckets, make_buckets
from controlfill.data.cache import LatentCache, describe, open_cache
from controlfill.data.hints import Spec
from controlfill.data.sample import Batch, PreparedSource, Source
from controlfill.data.shards import ShardStream
from controlfill.data.sources import make_preparation
from controlfill.data.streams import PreparedStream
from controlfill.diffusion.objective import Objective
from controlfill.errors import UserError
from controlfill.inference.pipeline import Pipeline
from controlfill.models.bundle import Bundle
from controlfill.options import CacheOptions, LearnOptions, RunOptions
from controlfill.training.batches import (
    Beside,
    Order,
    Places,
    StreamBeside,
    Streamed,
    collate_prepared,
    count_steps,
    make_batches,
    make_order,
    make_stream,
    steps_per_epoch,
)
from controlfill.training.team import Team

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)
Asked = TypeVar("Asked", bound=RunOptions)
# Apart from all seeds of training, so that the validation split is the same for every seed.
SPLIT_SEED = 20_231


def quiet(what: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: pictures to learn from in their order, and some kept apart to measure.

    A stream has no places: its order is its own.
    """

    learn: PreparedSource | PreparedStream
    keep: PreparedSource | None
    order: Order


@dataclass(kw_only=True)
class Run(ABC, Generic[Asked]):
    """A prepared run: everything an engine needs, wired. `step` is the one it starts after."""

    options: Asked
    team: Team
    bundle: Bundle
    spec: Spec
    network: Any
    data: Data
    folder: Path
    step: int = 0

    @property
    @abstractmethod
    def header(self) -> Any:
        """What the saved network says of itself, a dataclass."""

    @property
    def config(self) -> dict[str, Any]:
        """What says how the network is built, where its weights alone don't."""
        return {}

    @abstractmethod
    def objective(self) -> Objective:
        """The loss that the options ask for."""

    @abstractmethod
    def pipeline(self, network: Any) -> Pipeline:
        """What draws with `network` as it is now."""

    @abstractmethod
    def write(self, folder: Path, weights: dict[str, Tensor], name: str) -> None:
        """Write whole `weights` of the network into a checkpoint, as WEIGHTS or AVERAGE."""

    @abstractmethod
    def read(self, folder: Path, name: str) -> dict[str, Tensor]:
        """What `write` wrote."""

    @abstractmethod
    def take(self, weights: dict[str, Tensor]) -> None:
        """Give the network what was read."""

    @abstractmethod
    def finish(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the final model, which has `weights`, and its card."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the pictures."""
        return steps_per_epoch(self.data.order, self.options, self.team.ranks)

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(self.data.order, self.options, self.team.ranks)

    @property
    def class_pictures(self) -> int:
        """How many pictures there are to stand beside those to learn from, in turn."""
        order, learn = self.data.order, self.data.learn
        if isinstance(learn, StreamBeside):
            return len(learn.others)
        return order.others if isinstance(order, Beside) else 0

    def batches(self, start: int, stop: int) -> DataLoader[Any]:
        """The batches of this process for the optimizer steps from `start` to `stop`."""
        options, team, data = self.options, self.team, self.data
        first, last = (step * options.gradient_accumulation_steps for step in (start, stop))
        if isinstance(data.learn, PreparedStream):
            return make_stream(data.learn.between(first, last), self.spec, options.num_workers)
        places = Places(data.order, team.rank, team.ranks, options.overfit_batches)
        return make_batches(data.learn, places.between(first, last), self.spec, options.num_workers)

    def first_batch(self, most: int) -> Batch:
        """At most `most` of the pictures to learn from, of one size, always the same ones."""
        learn = self.data.learn
        if isinstance(learn, PreparedStream):
            alone = PreparedStream(learn.stream, learn.preparation, learn.seed, most)
            items = next(iter(alone.between(0, 1)))
        else:
            count, of = min(most, len(learn)), learn.bucket_of()
            same = np.arange(count) if of is None else np.nonzero(of == of[0])[0][:count]
            items = [learn[0, int(place)] for place in same]
        return collate_prepared(items, self.spec).to("cpu")


def open_data(options: RunOptions, source: Source, bundle: Bundle) -> Data:
    """The pictures of `source`, in buckets and with cached latents where asked, and their order."""
    buckets = open_buckets(options, source, bundle)
    if buckets is not None:
        say_buckets(buckets.counts())
    latents = None
    if options.cache_dir is not None:
        latents = use_cache(options, source, bundle)
    learn, keep = split(len(source), options.val_split)
    preparation = make_preparation(options)
    whole = PreparedSource(source, preparation, options.seed, buckets, latents, learn)
    whole[0, 0]  # data that can't be used at all is said now, not after some steps
    rest = copy(whole)
    rest.indices = keep
    return Data(learn=whole, keep=rest if len(keep) else None, order=make_order(whole, options))


def open_buckets(
    options: LearnOptions | CacheOptions, source: Source, bundle: Bundle
) -> Buckets | None:
    """The buckets of `source`, if they are asked for; the same in training and in caching."""
    if not options.aspect_ratio_buckets:
        return None
    return make_buckets(sizes_of(source), options.image_size, bundle.size_multiple)


def open_streamed(options: RunOptions, stream: ShardStream, team: Team) -> Data:
    """A stream as data. Raises UserError for what needs every picture to have its place."""
    for name in ("aspect_ratio_buckets", "cache_dir", "val_split", "overfit_batches"):
        if getattr(options, name):
            raise UserError(
                f"--{name} needs data whose pictures can be read in any order, which tar shards "
                "are not; unpack them, or leave it out"
            )
    if stream.length is None and options.max_steps is None:
        raise UserError("the length of this stream is not known; give --max_steps")
    order = Streamed(stream.length or 0, options.batch_size)
    preparation = make_preparation(options)
    learn = PreparedStream(
        stream, preparation, options.seed, options.batch_size, team.rank, team.ranks
    )
    return Data(learn=learn, keep=None, order=order)


def split(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to learn from and to keep apart, each sorted; the same for every seed."""
    kept = min(count - 1, math.ceil(count * share))
    turn = np.random.default_rng(SPLIT_SEED).permutation(count) if kept else np.arange(count)
    return np.sort(turn[kept:]), np.sort(turn[:kept])


def use_cache(options: RunOptions, source: Source, bundle: Bundle) -> LatentCache:
    """Open the cache of `options`, let the bundle read texts from it, and return its latents."""
    assert options.cache_dir is not None
    wanted = describe(options.pictures, source, options, options.aspect_ratio_buckets)
    cache = open_cache(options.cache_dir, {**wanted, **bundle.fingerprints()})
    bundle.text.cache = cache.texts
    log.info("latents%s come from %s", " and texts" if cache.texts else "", options.cache_dir)
    return cache.latents


def sizes_of(source: Source) -> np.ndarray:
    """Height and width (N, 2) of all pictures, known without decoding them. Raises UserError."""
    sizes = getattr(source, "sizes", lambda: None)()
    if sizes is None:
        raise UserError(
            "--aspect_ratio_buckets needs the pictures' sizes beforehand, which this data does not "
            "tell; give a folder, a table or COCO, or leave it out"
        )
    return sizes


def say_buckets(counts: dict[tuple[int, int], int]) -> None:
    """Say how the pictures fell into buckets."""
    words = ", ".join(f"{width}x{height}: {n}" for (height, width), n in counts.items())
    log.info("buckets (width x height: pictures): %s", words)


def say_missing(source: Source) -> None:
    """Say how many annotated pictures are not there, and name the first."""
    missing = getattr(source, "missing", [])
    if missing:
        log.warning(
            "%d pictures that the data names are absent and left out: %s%s",
            len(missing), ", ".join(missing[:5]), ", ..." if len(missing) > 5 else "",
        )  # fmt: skip


def spare_memory(options: RunOptions, *networks: Any) -> None:
    """Turn on what the options ask of the networks' own code. Raises UserError."""
    if options.gradient_checkpointing:
        for network in networks:
            network.enable_gradient_checkpointing()
            network.train()  # checkpointing works in this mode only; nothing here drops out
    if options.enable_xformers_memory_efficient_attention:
        if find_spec("xformers") is None:
            raise UserError(
                "--enable_xformers_memory_efficient_attention needs xformers: "
                "pip install 'controlfill[xformers]'; torch's own attention is used without it"
            )
        for network in networks:
            network.enable_xformers_memory_efficient_attention()
    if options.torch_compile:
        for network in networks:
            network.compile()
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def new_folder(options: LearnOptions, team: Team) -> Path:
    """A new folder such as `controlnet_inpainting_<time>`, the same for all processes."""
    output_dir = options.output_dir
    name = ""
    if team.main:
        stamp = f"{options.RUN}{time.strftime('%Y%m%d_%H%M%S')}"
        names = itertools.chain([stamp], (f"{stamp}_{n}" for n in itertools.count(2)))
        name = next(n for n in names if not (output_dir / n).exists())
        (output_dir / name / "logs").mkdir(parents=True)
    return output_dir / team.tell(name)

"""Batches: which pictures each forward pass sees, read by as many processes as wanted."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from controlfill.data.buckets import batches_per_epoch, epoch_of_buckets
from controlfill.data.hints import Spec
from controlfill.data.sample import PreparedSource, Sample, Stack, stack
from controlfill.data.streams import Ahead, PreparedStream
from controlfill.options import RunOptions

Place = tuple[int, int]


class Order(Protocol):
    """An endless sequence of batches of (epoch, index), a function of the batch's number."""

    def batch(self, number: int) -> list[Place]: ...

    def batches_per_epoch(self) -> float: ...


class Shuffled:
    """Every picture once per epoch in a fresh order; an epoch may end within a batch."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self._turn = functools.lru_cache(2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.count)

    def batch(self, number: int) -> list[Place]:
        """The pictures of batch number `number`, counted over all epochs."""
        first = number * self.size
        places = (divmod(p, self.count) for p in range(first, first + self.size))
        return [(epoch, int(self._turn(epoch)[place])) for epoch, place in places]

    def batches_per_epoch(self) -> float:
        """Batches in an epoch, with a fraction."""
        return self.count / self.size


class Bucketed:
    """Batches of one aspect ratio each, every picture once per epoch."""

    def __init__(self, bucket_of: np.ndarray, size: int, seed: int) -> None:
        self.bucket_of, self.size, self.seed = bucket_of, size, seed
        self.per_epoch = batches_per_epoch(bucket_of, size)
        self._turn = functools.lru_cache(2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        return list(epoch_of_buckets(self.bucket_of, self.size, rng))

    def batch(self, number: int) -> list[Place]:
        """The pictures of batch number `number`, counted over all epochs."""
        epoch, place = divmod(number, self.per_epoch)
        return [(epoch, int(index)) for index in self._turn(epoch)[place]]

    def batches_per_epoch(self) -> float:
        """Batches in an epoch."""
        return self.per_epoch


class Beside:
    """Batches of `order`, and beside them as many of `others` pictures, all of one size.

    Others come once each per turn, in a fresh order. Their places follow those of the `bucket_of`
    pictures in order: all of them in the first size, then all in the second.
    """

    def __init__(self, order: Order, bucket_of: np.ndarray, others: int, seed: int) -> None:
        self.order, self.bucket_of, self.others, self.seed = order, bucket_of, others, seed

    def batch(self, number: int) -> list[Place]:
        """The pictures of batch number `number`, and those beside them."""
        own = self.order.batch(number)
        first = len(self.bucket_of) + int(self.bucket_of[own[0][1]]) * self.others
        beside = in_turn(number, len(own), self.others, self.seed)
        return own + [(epoch, first + place) for epoch, place in beside]

    def batches_per_epoch(self) -> float:
        """Batches in which each picture of the order comes once."""
        return self.order.batches_per_epoch()


def in_turn(number: int, size: int, count: int, seed: int) -> list[Place]:
    """Batch number `number` of `size` out of `count` pictures, once each per turn, shuffled."""
    places = [divmod(n, count) for n in range(number * size, (number + 1) * size)]
    # Apart from the order of the pictures that they stand beside.
    turns = {
        epoch: np.random.default_rng((seed, epoch, 1)).permutation(count)
        for epoch in {epoch for epoch, _ in places}
    }
    return [(epoch, int(turns[epoch][place])) for epoch, place in places]


class StreamBeside(PreparedStream):
    """Micro-batches of a `stream`, and beside each as many of `others` pictures, once per turn."""

    def __init__(self, stream: PreparedStream, others: PreparedSource) -> None:
        super().__init__(
            stream.stream, stream.preparation, stream.seed, stream.batch, stream.rank, stream.ranks
        )
        self.others = others

    def _micro_batch(self, ahead: Ahead, number: int) -> list[tuple[Sample, list[str]]]:
        own = number * self.ranks + self.rank
        beside = in_turn(own, self.batch, len(self.others), self.seed)
        return super()._micro_batch(ahead, number) + [self.others[place] for place in beside]


class Streamed:
    """What is known of the order of a stream: only how long an epoch is."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def batch(self, number: int) -> list[Place]:
        """Raise TypeError: a stream can't be asked for places."""
        raise TypeError("a stream gives its batches in its own order")

    def batches_per_epoch(self) -> float:
        """Batches in an epoch, with a fraction."""
        return self.count / self.size


class Remaining:
    """The batches left of an epoch, told of as the whole epoch: Lightning counts from its start."""

    def __init__(self, loader: Any, length: int) -> None:
        self.loader, self.length = loader, length

    def __iter__(self) -> Any:
        return iter(self.loader)

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: the place in the data is a function of the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up; having this method tells Lightning that resuming is exact."""


class Places:
    """The part of an order that one process reads: each batch goes to exactly one process.

    A function of (seed, rank, position), so a run can start anywhere in it. With `overfit` the
    first so many batches of each process come again and again, with the same cuts and masks.
    """

    def __init__(self, order: Order, rank: int, ranks: int, overfit: int = 0) -> None:
        self.order, self.rank, self.ranks, self.overfit = order, rank, ranks, overfit
        self.range = range(0)

    def between(self, start: int, stop: int) -> Places:
        """The same order for the forward passes from `start` to `stop`."""
        self.range = range(start, stop)
        return self

    def __len__(self) -> int:
        return len(self.range)

    def __iter__(self) -> Iterator[list[Place]]:
        for number in self.range:
            own = number % self.overfit if self.overfit else number
            yield self.order.batch(own * self.ranks + self.rank)


def make_order(data: PreparedSource, options: RunOptions) -> Order:
    """The order of `data`: by buckets where it has some."""
    bucket_of = data.bucket_of()
    if bucket_of is not None:
        return Bucketed(bucket_of, options.batch_size, options.seed)
    return Shuffled(len(data), options.batch_size, options.seed)


def steps_per_epoch(order: Order, options: RunOptions, ranks: int) -> int:
    """Optimizer steps in which each picture is seen once or more; epochs hold whole steps."""
    batches = options.overfit_batches or order.batches_per_epoch() / ranks
    return max(1, math.ceil(batches / options.gradient_accumulation_steps))


def count_steps(order: Order, options: RunOptions, ranks: int) -> int:
    """Optimizer steps of the whole run."""
    if options.max_steps is not None:
        return options.max_steps
    return options.num_epochs * steps_per_epoch(order, options, ranks)


def collate_prepared(items: Sequence[tuple[Sample, list[str]]], spec: Spec) -> Stack:
    """A batch of what PreparedSource gives, still in bytes."""
    skipped = [name for _, names in items for name in names]
    return stack([sample for sample, _ in items], spec, skipped)


def calm_worker(_: int) -> None:
    """One thread per worker process: more would fight each other for the same cores."""
    cv2.setNumThreads(0)


def reading(spec: Spec, workers: int) -> dict[str, Any]:
    """How a DataLoader reads: at most one process per core, batches as bytes, pinned for a GPU."""
    return {
        "num_workers": min(workers, os.cpu_count() or 1),
        "collate_fn": functools.partial(collate_prepared, spec=spec),
        "worker_init_fn": calm_worker,
        "pin_memory": torch.cuda.is_available(),
    }


def make_stream(stream: PreparedStream, spec: Spec, workers: int) -> DataLoader[Any]:
    """The micro-batches of a stream."""
    return DataLoader(stream, batch_size=None, **reading(spec, workers))


def make_batches(data: PreparedSource, places: Places, spec: Spec, workers: int) -> DataLoader[Any]:
    """Batches in the order of `places`."""
    return DataLoader(data, batch_sampler=places, **reading(spec, workers))

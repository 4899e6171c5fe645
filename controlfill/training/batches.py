"""Batches: which pictures each forward pass sees, read by as many processes as wanted."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from controlfill.data.hints import Spec
from controlfill.data.sample import Batch, PreparedSource, Sample, collate
from controlfill.options import TrainOptions


class Places:
    """The data order: for each forward pass of a process, the (epoch, index) of its pictures.

    A function of (seed, rank, position), so a run can start anywhere in it and no two processes
    see the same picture of an epoch.
    """

    def __init__(self, count: int, options: TrainOptions, rank: int, ranks: int) -> None:
        self.count, self.seed, self.batch = count, options.seed, options.batch_size
        self.rank, self.ranks = rank, ranks
        self.range = range(0)

    def between(self, start: int, stop: int) -> Places:
        """The same order for the forward passes from `start` to `stop`."""
        self.range = range(start, stop)
        return self

    def __len__(self) -> int:
        return len(self.range)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        turn, turned = np.zeros(0, np.int64), -1
        for number in self.range:
            first = (number * self.ranks + self.rank) * self.batch
            places = []
            for position in range(first, first + self.batch):
                epoch, place = divmod(position, self.count)
                if epoch != turned:
                    turn = np.random.default_rng((self.seed, epoch)).permutation(self.count)
                    turned = epoch
                places.append((epoch, int(turn[place])))
            yield places


def collate_prepared(items: Sequence[tuple[Sample, list[str]]], spec: Spec) -> Batch:
    """A batch of what PreparedSource gives."""
    skipped = [name for _, names in items for name in names]
    return collate([sample for sample, _ in items], spec, skipped)


def calm_worker(_: int) -> None:
    """One thread per worker process: more would fight each other for the same cores."""
    cv2.setNumThreads(0)


def make_batches(data: PreparedSource, places: Places, spec: Spec, workers: int) -> DataLoader[Any]:
    """Batches in the order of `places`, read by at most one process per core."""
    return DataLoader(
        data,
        batch_sampler=places,
        num_workers=min(workers, os.cpu_count() or 1),
        collate_fn=functools.partial(collate_prepared, spec=spec),
        worker_init_fn=calm_worker,
        pin_memory=torch.cuda.is_available(),
    )

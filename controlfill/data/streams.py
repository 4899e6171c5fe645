"""A stream as micro-batches: the same for any number of worker processes, resumable anywhere."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from controlfill.data.sample import Preparation, Sample
from controlfill.data.shards import Decode, ShardStream
from controlfill.errors import UserError

# Samples in a row that may be unusable where the length of the stream is not known.
MOST_BROKEN = 10_000


@dataclass(frozen=True, kw_only=True)
class Place:
    """A sample not yet decoded, and where it stands: number `number` of epoch `epoch`."""

    epoch: int
    number: int
    decode: Decode


def endless(stream: ShardStream, start: int = 0) -> Iterator[Place]:
    """The samples of epoch 0, 1, 2, ... in one sequence, from position `start` on.

    Whole epochs are skipped by counting where the length is known; within an epoch samples are
    passed over without being decoded. Raises UserError for a stream of nothing.
    """
    length = stream.length
    first = start // length if length else 0
    position = first * (length or 0)
    for epoch in itertools.count(first):
        before = position
        for number, decode in stream.epoch(epoch):
            if position >= start:
                yield Place(epoch=epoch, number=number, decode=decode)
            position += 1
        if position == before:
            raise UserError(f"{stream.where} holds no samples with a picture")


class Ahead:
    """An iterator that can be looked into before one goes on."""

    def __init__(self, places: Iterator[Place]) -> None:
        self.places, self.seen = places, deque[Place]()

    def __getitem__(self, index: int) -> Place:
        while len(self.seen) <= index:
            self.seen.append(next(self.places))
        return self.seen[index]

    def go_on(self, count: int) -> None:
        """Leave the next `count` behind."""
        for _ in range(count):
            if self.seen:
                self.seen.popleft()
            else:
                next(self.places)


class PreparedStream(IterableDataset[list[tuple[Sample, list[str]]]]):
    """Micro-batches of a stream for one of `ranks` processes.

    Micro-batch n of rank r is samples (n * ranks + r) * batch to + batch of the endless sequence of
    epochs. With a DataLoader of `batch_size=None`, worker w of W makes numbers start + w,
    start + w + W, ..., which the loader takes in turn: any number of workers gives the same order.
    Every worker walks the whole stream: past headers for local files, but over all the bytes of an
    address, so those are better read by one worker.

    A sample that can't be used is named, and replaced by the next of its micro-batch that can, with
    a cut and a mask of its own; when there is none, by the next after it. No other micro-batch
    changes. Samples are functions of (seed, epoch, number within the epoch).
    """

    def __init__(
        self,
        stream: ShardStream,
        preparation: Preparation,
        seed: int,
        batch: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.stream, self.preparation, self.seed = stream, preparation, seed
        self.batch, self.rank, self.ranks = batch, rank, ranks
        self.range = range(0)

    def between(self, start: int, stop: int) -> PreparedStream:
        """The same order for the micro-batches from `start` to `stop`."""
        self.range = range(start, stop)
        return self

    def __len__(self) -> int:
        return len(self.range)

    def __iter__(self) -> Iterator[list[tuple[Sample, list[str]]]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = self.range[first::stride]
        if not mine:
            return
        ahead = Ahead(endless(self.stream, (mine[0] * self.ranks + self.rank) * self.batch))
        for number in mine:
            if number != mine[0]:
                ahead.go_on(stride * self.ranks * self.batch)
            yield self._micro_batch(ahead, number)

    def _micro_batch(self, ahead: Ahead, number: int) -> list[tuple[Sample, list[str]]]:
        """The next micro-batch, `number` of this process."""
        broken: set[int] = set()
        return [self._sample(ahead, slot, broken) for slot in range(self.batch)]

    def _sample(self, ahead: Ahead, slot: int, broken: set[int]) -> tuple[Sample, list[str]]:
        """The sample at `slot`, or the next one that is not `broken`, and what was found to be."""
        own, reasons = ahead[slot], []
        around = [(slot + step) % self.batch for step in range(self.batch)]
        beyond = range(self.batch, self.batch + (self.stream.length or MOST_BROKEN))
        for place in itertools.chain(around, beyond):
            if place in broken:
                continue
            rng = np.random.default_rng((self.seed, own.epoch, own.number))
            try:
                return self.preparation(ahead[place].decode(), rng), reasons
            except UserError as error:
                broken.add(place)
                reasons.append(str(error))
        raise UserError(f"none of the samples in {self.stream.where} can be used: {reasons[0]}")

"""Aspect-ratio buckets: pictures are trained on in sizes near their own shape, not only as squares.

All pictures of a batch share a bucket. Areas stay at or below that of the square, so that one
batch costs what another does (NovelAI 2022, "Improvements on Stable Diffusion").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MOST_LENGTHY = 2.0


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """`sizes` (height, width) of the buckets, and for each picture which of them it is `of`."""

    sizes: tuple[tuple[int, int], ...]
    of: np.ndarray

    def size_of(self, index: int) -> tuple[int, int]:
        """The size that picture number `index` is cut to."""
        return self.sizes[self.of[index]]

    def counts(self) -> dict[tuple[int, int], int]:
        """How many pictures each bucket holds, empty ones left out."""
        count = np.bincount(self.of, minlength=len(self.sizes))
        return {size: int(n) for size, n in zip(self.sizes, count, strict=True) if n}


def bucket_sizes(side: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Sizes whose sides are multiples of `multiple`, of at most the area of `side` squared.

    For each height the widest width that fits, up to an aspect of 2 to 1 either way.
    """
    sizes = set()
    for short in range(multiple, side + 1, multiple):
        long = side * side // short // multiple * multiple
        if short <= long <= MOST_LENGTHY * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes | {(side, side)}))


def make_buckets(pictures: np.ndarray, side: int, multiple: int) -> Buckets:
    """Put pictures of sizes (N, 2), height and width, into the buckets of the nearest aspect."""
    sizes = bucket_sizes(side, multiple)
    aspects = np.log([height / width for height, width in sizes])
    own = np.log(pictures[:, 0] / pictures[:, 1])
    edges = np.argsort(aspects)
    middles = (aspects[edges][1:] + aspects[edges][:-1]) / 2
    return Buckets(sizes=sizes, of=edges[np.searchsorted(middles, own)])


def epoch_of_buckets(of: np.ndarray, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Index batches of one epoch, each from one bucket, in mixed order.

    Every picture comes once; the last batch of a bucket is filled up with its first pictures.
    """
    batches = []
    for bucket in np.unique(of):
        turn = rng.permutation(np.nonzero(of == bucket)[0])
        filled = np.resize(turn, -(-len(turn) // batch) * batch)
        batches += list(filled.reshape(-1, batch))
    yield from (batches[i] for i in rng.permutation(len(batches)))


def batches_per_epoch(of: np.ndarray, batch: int) -> int:
    """How many batches `epoch_of_buckets` gives."""
    counts = np.bincount(of)
    return int(sum(-(-counts // batch)))

"""What a base is to learn: pictures with their words, and beside them pictures of the class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from controlfill.data.buckets import Buckets
from controlfill.data.sample import PreparedSource, Sample, Source
from controlfill.data.shards import ShardStream
from controlfill.options import DataOptions

OWN = "{}"


class Worded:
    """A source of which every picture has a prompt, and none a hint.

    A picture without words of its own gets `prompt`; with {} in it, every picture gets it, its own
    words in the place of the {}.
    """

    def __init__(self, source: Source, prompt: str) -> None:
        self.source, self.prompt = source, prompt
        self.missing: list[str] = getattr(source, "missing", [])
        self.sizes: Any = getattr(source, "sizes", lambda: None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return say(self.source[index], self.prompt)


class WordedStream(ShardStream):
    """The same of tar shards."""

    def __init__(self, where: str, options: DataOptions, prompt: str) -> None:
        super().__init__(where, options)
        self.prompt = prompt

    def _decode(self, group: dict[str, Any]) -> Sample:
        return say(super()._decode(group), self.prompt)


def say(sample: Sample, prompt: str) -> Sample:
    """`sample` with words, by `prompt` as Worded has it."""
    own = sample.prompts or (sample.prompt,)
    if OWN in prompt:
        told = tuple(prompt.replace(OWN, words).strip(" ,") for words in own)
    else:
        told = tuple(words or prompt for words in own)
    return replace(sample, prompt=told[0], prompts=told if len(told) > 1 else (), hint=None)


class Joined:
    """`own` pictures, and after them all of `others`, `times` over, which count `weight`."""

    def __init__(self, own: Source, others: Source, times: int, weight: float) -> None:
        self.own, self.others, self.times, self.weight = own, others, times, weight

    def __len__(self) -> int:
        return len(self.own) + self.times * len(self.others)

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.own):
            return self.own[index]
        other = self.others[(index - len(self.own)) % len(self.others)]
        return replace(other, weight=self.weight)


def join(data: PreparedSource, others: Source, weight: float) -> PreparedSource:
    """The places of `data`, and after them those of `others` in every size that `data` has.

    Other pictures of size number b stand at places len(data) + b * len(others) and on, in buckets
    of their own: one that can't be used is replaced by another of its kind.
    """
    count, side = len(data.source), data.preparation.side
    own = data.buckets or Buckets(sizes=((side, side),), of=np.zeros(count, int))
    times = len(own.sizes)
    classes = np.repeat(np.arange(times), len(others)) + times
    buckets = Buckets(sizes=own.sizes * 2, of=np.concatenate([own.of, classes]))
    source = Joined(data.source, others, times, weight)
    indices = np.concatenate([data.indices, np.arange(count, len(source))])
    return PreparedSource(source, data.preparation, data.seed, buckets, indices=indices)

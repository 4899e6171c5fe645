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
    words in the place of the {}. Each counts `weight` times what it does anyway in the loss.
    """

    def __init__(self, source: Source, prompt: str, weight: float = 1.0) -> None:
        self.source, self.prompt, self.weight = source, prompt, weight
        self.missing: list[str] = getattr(source, "missing", [])
        self.sizes: Any = getattr(source, "sizes", lambda: None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = say(self.source[index], self.prompt)
        return replace(sample, weight=sample.weight * self.weight)


class WordedStream(ShardStream):
    """The same of tar shards."""

    def __init__(self, where: str, options: DataOptions, prompt: str) -> None:
        super().__init__(where, options)
        self.prompt = prompt

    def _decode(self, group: dict[str, Any]) -> Sample:
        return say(super()._decode(group), self.prompt)


def say(sample: Sample, prompt: str) -> Sample:
    """`sample` with words, by `prompt` as Worded has it."""
    told = tuple(tell(words, prompt) for words in sample.prompts or (sample.prompt,))
    return replace(sample, prompt=told[0], prompts=told if len(told) > 1 else (), hint=None)


def tell(words: str, prompt: str) -> str:
    """What a picture with `words` of its own, or none, is told by, as Worded has it."""
    return prompt.replace(OWN, words).strip(" ,") if OWN in prompt else words or prompt


class Joined:
    """`own` pictures, and after them all of `others`, `times` over."""

    def __init__(self, own: Source, others: Source, times: int) -> None:
        self.own, self.others, self.times = own, others, times

    def __len__(self) -> int:
        return len(self.own) + self.times * len(self.others)

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.own):
            return self.own[index]
        return self.others[(index - len(self.own)) % len(self.others)]


def join(data: PreparedSource, others: Source) -> PreparedSource:
    """The places of `data`, and after them those of `others` in every size that `data` has.

    Other pictures of size number b stand at places len(data) + b * len(others) and on, in buckets
    of their own: one that can't be used is replaced by another of its kind.
    """
    count, side = len(data.source), data.preparation.side
    own = data.buckets or Buckets(sizes=((side, side),), of=np.zeros(count, int))
    times = len(own.sizes)
    classes = np.repeat(np.arange(times), len(others)) + times
    buckets = Buckets(sizes=own.sizes * 2, of=np.concatenate([own.of, classes]))
    source = Joined(data.source, others, times)
    indices = np.concatenate([data.indices, np.arange(count, len(source))])
    return PreparedSource(source, data.preparation, data.seed, buckets, indices=indices)

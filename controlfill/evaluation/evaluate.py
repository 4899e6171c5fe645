"""Measure fills on pictures whose truth is known: ours beside the classical ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from controlfill.data.masks import box_around
from controlfill.data.sample import PreparedSource, Sample, collate
from controlfill.data.sources import WorldSource, make_preparation, open_source
from controlfill.data.worlds import HELD_OUT, PATTERNED, World
from controlfill.evaluation.judge import Verdict, judge
from controlfill.evaluation.metrics import Scores, score, summarize
from controlfill.images import to_uint8
from controlfill.inference.fill import check_fills, fill_with
from controlfill.inference.generate import generate_batch, guidance_scale
from controlfill.inference.holes import finish
from controlfill.inference.pipeline import Pipeline, Report
from controlfill.options import EvaluateOptions, SampleOptions

OURS = "controlfill"
# Pictures kept for the report, and where the judged objects start among the held-out seeds.
SHOWN = 16
OBJECTS_FROM = 500_000


@dataclass(kw_only=True)
class Evaluation:
    """What was measured: scores by method and group, verdicts, and pictures for the report."""

    settings: dict[str, Any]
    scores: dict[str, dict[str, list[Scores]]] = field(default_factory=dict)
    verdicts: list[tuple[Verdict, str]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, method: str, groups: Sequence[str], scores: Scores) -> None:
        """Add one picture's scores to each of its groups."""
        for group in groups:
            self.scores.setdefault(group, {}).setdefault(method, []).append(scores)

    def summary(self) -> dict[str, Any]:
        """Plain numbers: settings, figures by group and method, and object accuracy."""
        figures = {
            group: {method: summarize(scores) for method, scores in methods.items()}
            for group, methods in self.scores.items()
        }
        return {
            "settings": self.settings,
            "figures": figures,
            "objects": self.accuracy(),
            "skipped": self.skipped,
        }

    def accuracy(self) -> dict[str, float]:
        """Shares of wholly masked objects that came back in the right colour, and shape too."""
        if not self.verdicts:
            return {}
        return {
            "pictures": len(self.verdicts),
            "colour": float(np.mean([v.colour for v, _ in self.verdicts])),
            "colour_and_shape": float(np.mean([v.colour and v.shape for v, _ in self.verdicts])),
        }


def evaluate(pipeline: Pipeline, options: EvaluateOptions, report: Report) -> Evaluation:
    """Measure `pipeline` as `options` ask; `report` hears how far it is. Raises UserError."""
    check_fills(options.classical)
    pipeline.bundle.check_size(options.image_size)
    source = open_source(options.data, options, held_out=True)
    data = PreparedSource(source, make_preparation(options), options.seed)
    settings = {
        **options.as_dict(),
        "base": pipeline.bundle.name,
        "control": pipeline.control,
        "guidance_scale": guidance_scale(pipeline, sample_options(options)),
    }
    result = Evaluation(settings=settings)
    count = min(options.num_samples, len(source))
    samples = []
    for index in range(count):
        sample, skipped = data[0, index]
        result.skipped += skipped
        samples.append((sample, groups_of(source, index)))
    measure_fills(pipeline, options, samples, result, report)
    if options.objects and isinstance(source, WorldSource):
        measure_objects(pipeline, options, source.world, result, report)
    return result


def sample_options(options: EvaluateOptions) -> SampleOptions:
    """The sampling part of `options`."""
    return SampleOptions(
        num_inference_steps=options.num_inference_steps,
        scheduler=options.scheduler,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
    )


def groups_of(source: Any, index: int) -> list[str]:
    """The groups of a picture: all, and on a world patterned or smooth, and its ground."""
    if not isinstance(source, WorldSource):
        return ["all"]
    ground = source.picture(index).truth.ground
    return ["all", "patterned" if ground in PATTERNED else "smooth", ground]


def measure_fills(
    pipeline: Pipeline,
    options: EvaluateOptions,
    samples: list[tuple[Sample, list[str]]],
    result: Evaluation,
    report: Report,
) -> None:
    """Score our fill and the classical ones on `samples`."""
    pictures = fill_all(pipeline, [s for s, _ in samples], options, report)
    for number, ((sample, groups), ours) in enumerate(zip(samples, pictures, strict=True), 1):
        mask = known_mask(sample)
        outputs = {OURS: ours}
        for name in options.classical:
            outputs[name] = fill_with(name, sample.image, mask)
        for method, output in outputs.items():
            result.add(method, groups, score(output, sample.image, mask))
        if len(result.shown) < SHOWN:
            result.shown.append({"sample": sample, "outputs": outputs})
        report("classical fills and scores", number, len(samples))


def fill_all(
    pipeline: Pipeline, samples: Sequence[Sample], options: EvaluateOptions, report: Report
) -> Iterator[np.ndarray]:
    """Our fills of `samples` (all of one size), sampled in batches, pasted."""
    settings = sample_options(options)
    size, factor = options.eval_batch_size, pipeline.bundle.factor
    for first in range(0, len(samples), size):
        part = samples[first : first + size]
        batch = collate(part, pipeline.spec)
        # Each batch starts from noise of its own, so no two pictures of the set share it.
        seeded = replace(settings, seed=settings.seed + first)
        generated = to_uint8(generate_batch(pipeline, batch, seeded))
        report("sampling", first + len(part), len(samples))
        for sample, picture in zip(part, generated, strict=True):
            yield finish(picture, sample.image, known_mask(sample), settings, factor)


def known_mask(sample: Sample) -> np.ndarray:
    """The mask of a prepared sample, which always has one."""
    assert sample.mask is not None
    return sample.mask


def measure_objects(
    pipeline: Pipeline,
    options: EvaluateOptions,
    world: World,
    result: Evaluation,
    report: Report,
) -> None:
    """Mask objects wholly, by a box that does not betray the shape, and judge what comes back."""
    source = WorldSource(world, options.image_size, first=HELD_OUT + OBJECTS_FROM)
    margin = max(1, options.image_size // 20)
    pictures = [source.picture(index) for index in range(options.num_samples)]
    samples = [
        Sample(image=p.image, mask=box_around(p.object_mask, margin), prompt=p.truth.caption)
        for p in pictures
    ]

    def say(_: str, done: int, total: int) -> None:
        report("wholly masked objects", done, total)

    for number, filled in enumerate(fill_all(pipeline, samples, options, say)):
        mask = known_mask(samples[number])
        verdict = judge(filled, mask, pictures[number].truth, world)
        result.verdicts.append((verdict, samples[number].prompt))
        if number < SHOWN:
            shown = {"sample": samples[number], "outputs": {OURS: filled}, "verdict": verdict}
            result.shown.append(shown)

"""Validation: a loss that compares between steps, and pictures in fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from controlfill.diffusion.objective import Measured, Objective, step_rng
from controlfill.diffusion.text_loss import PARTS
from controlfill.errors import UserError
from controlfill.images import as_mask, as_photo, as_rgb, grid, resize
from controlfill.inference.complete import follow, inpaint
from controlfill.inference.pipeline import Pipeline
from controlfill.models.ocr import READERS
from controlfill.options import HoleOptions, RunOptions
from controlfill.training.batches import Place, make_batches
from controlfill.training.start import Run

# The noise of validation is apart from that of any training seed.
SEED = 2_000_000_011
BINS = 4
# What is measured of labels: their cost, that of the true picture, and how many each reader reads.
TEXTS = (*PARTS, *(f"read_{name}" for name in READERS))
STEPS = 20
PANEL = 256


class Fixed:
    """The batches kept apart: each process measures its share, always with the same masks."""

    def __init__(self, run: Run) -> None:
        assert run.data.keep is not None
        self.count, self.size = len(run.data.keep), run.options.batch_size
        self.rank, self.ranks = run.team.rank, run.team.ranks
        self.bucket_of = run.data.keep.bucket_of()

    def numbers(self) -> list[int]:
        """The numbers of this process's batches."""
        return list(range(len(self._all())))[self.rank :: self.ranks]

    def __len__(self) -> int:
        return len(self.numbers())

    def __iter__(self) -> Iterator[list[Place]]:
        batches = self._all()
        yield from (batches[number] for number in self.numbers())

    def _all(self) -> list[list[Place]]:
        of = np.zeros(self.count, int) if self.bucket_of is None else self.bucket_of
        groups = [np.nonzero(of == bucket)[0] for bucket in np.unique(of)]
        return [
            [(0, int(i)) for i in group[start : start + self.size]]
            for group in groups
            for start in range(0, len(group), self.size)
        ]


class Tally:
    """Sums of measured errors, over batches and processes, that become means by name."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # Rows: all, hole, known, then a row per bin of timesteps, then so many for each number that
        # labels have; columns: sum, count.
        self.sums = torch.zeros(3 + BINS * (1 + len(TEXTS)), 2, dtype=torch.float64)

    def add(self, measured: Measured) -> None:
        """Add a batch."""
        parts = (measured.loss, measured.hole, measured.known)
        for row, values in enumerate(parts):
            self._add(row, values)
        self._add_bins(3, measured.loss, measured.timesteps)
        for number, name in enumerate(TEXTS, 1):
            if name in measured.texts:
                self._add_bins(3 + number * BINS, measured.texts[name], measured.text_times)

    def _add_bins(self, row: int, values: Tensor, timesteps: Tensor) -> None:
        bins = timesteps.to(values.device) * BINS // self.steps
        for place in range(BINS):
            self._add(row + place, values[bins == place])

    def _add(self, row: int, values: Tensor) -> None:
        there = values[torch.isfinite(values) | (row not in (1, 2))].double().cpu()
        self.sums[row] += torch.tensor([float(there.sum()), len(there)], dtype=torch.float64)

    def means(self, sums: Tensor) -> dict[str, float]:
        """`sums` as means; parts that nothing belongs to are left out."""
        names = ["val/loss", "val/loss_hole", "val/loss_known"]
        edges = [self.steps * place // BINS for place in range(BINS + 1)]
        parts = ["loss", *(f"text_{name}" for name in TEXTS)]
        names += [f"val/{p}_t{low:03d}-{high - 1}" for p in parts for low, high in pairwise(edges)]
        return {
            name: float(total / count)
            for name, (total, count) in zip(names, sums.tolist(), strict=True)
            if count
        }


def measure(run: Run, objective: Objective, network: nn.Module) -> dict[str, float]:
    """Mean errors on the pictures kept apart: whole, hole, known, and per quarter of the times.

    Masks, noise and times are always the same, so the numbers compare between steps and runs.
    """
    assert run.data.keep is not None
    places: Any = Fixed(run)
    batches = make_batches(run.data.keep, places, run.spec, 0)
    tally = Tally(objective.schedule.steps)
    for number, batch in zip(places.numbers(), batches, strict=True):
        with run.team.autocast():
            rng = step_rng(SEED, 0, number)
            first = number * run.options.batch_size
            tally.add(objective.measure(network, batch.to(run.team.device), rng, first))
    return tally.means(run.team.total(tally.sums))


@contextmanager
def averaged(network: nn.Module, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """`network` in evaluation mode, with `weights` (its average) in place of its own, if given."""
    own = {name: p.data for name, p in network.named_parameters()}
    network.eval()
    try:
        for name, parameter in network.named_parameters():
            if weights is not None and name in weights:
                parameter.data = weights[name].to(parameter)
        yield
    finally:
        for name, parameter in network.named_parameters():
            parameter.data = own[name]
        network.train()


def check_requests(options: RunOptions, given: bool) -> None:
    """Raise UserError unless pictures, masks and prompts of validation belong together."""
    pictures, masks = len(options.validation_image), len(options.validation_mask)
    if masks != (0 if given else pictures):
        wanted = "no --validation_mask" if given else f"{pictures} --validation_mask"
        raise UserError(
            f"{pictures} --validation_image and {masks} --validation_mask were given; "
            f"with this conditioning there should be {wanted}"
        )
    prompts = len(options.validation_prompt)
    if pictures and prompts not in (0, 1, pictures):
        raise UserError(
            f"{prompts} --validation_prompt for {pictures} --validation_image; give one for each, "
            "or one for all"
        )


def draw_requests(pipeline: Pipeline, options: RunOptions) -> np.ndarray | None:
    """A row per validation picture: what is given, then results in as many seeds as asked."""
    rows = []
    prompts = options.validation_prompt or ("",)
    for place, file in enumerate(options.validation_image):
        photo = as_photo(file)
        prompt = prompts[place % len(prompts)]
        seeds = range(options.seed, options.seed + options.num_validation_images)
        row = [photo.rgb]
        for seed in seeds:
            sampling = HoleOptions(prompt=prompt, seed=seed, num_inference_steps=STEPS)
            if pipeline.spec.given:
                result = follow(pipeline, file, sampling)
            else:
                result = inpaint(pipeline, file, options.validation_mask[place], sampling)
            row.append(result.image)
        if not pipeline.spec.given:
            row.insert(1, as_rgb(as_mask(options.validation_mask[place], photo.size)))
        rows.append([_fit(picture) for picture in row])
    return grid(rows) if rows else None


def _fit(picture: np.ndarray) -> np.ndarray:
    """`picture` on a grey square of PANEL pixels, as large as it fits."""
    scale = PANEL / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    square = np.full((PANEL, PANEL, 3), 128, np.uint8)
    square[:height, :width] = resize(picture, (height, width))
    return square

"""The text loss of a batch: labels are cut out of what one step predicts, decoded, and read.

Only windows around labels are decoded, those of the true latents beside them, so that both bear the
same error of the autoencoder (after Tuo et al. 2024, "AnyText", who decode whole pictures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from controlfill.data.sample import Batch
from controlfill.diffusion.legibility import (
    TextErrors,
    TextWeighting,
    combine,
    text_errors,
    time_weights,
)
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.models.bundle import Bundle
from controlfill.models.ocr import Reader, around, decode, fit_crops
from controlfill.skins.layout import Box

if TYPE_CHECKING:
    from controlfill.diffusion.objective import Seen

T = TypeVar("T")
# Latent cells around a label that are decoded with it.
HALO = 4
PARTS = ("ctc", "floor", "excess", "feature")


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A label to read: the row of its picture in the batch, what it says, its box in pixels."""

    row: int
    text: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Labels as they were predicted and as they should be, each (3, h, w) about in [0, 1]."""

    predicted: list[Tensor]
    reference: list[Tensor]


class TextLoss:
    """Reads labels; the first of `readers` is the one that is learned from, the others only judge.

    `signs` is the alphabet of the data; labels with signs that a reader does not know are left out.
    At most `most` labels of a batch are read, on a quarter of its pictures.
    """

    def __init__(
        self, readers: Sequence[Reader], weighting: TextWeighting, signs: str, most: int = 8
    ) -> None:
        self.readers, self.weighting, self.most = readers, weighting, most
        self.signs = "".join(s for s in signs if all(s in reader.index for reader in readers))

    def draw(self, batch: Batch, rng: torch.Generator) -> list[Spot]:
        """The labels to learn from in this batch."""
        legible = self.legible(batch)
        rows = shuffled(sorted({spot.row for spot in legible}), rng)[: ceil(len(batch.prompts) / 4)]
        return shuffled([spot for spot in legible if spot.row in rows], rng)[: self.most]

    def draw_times(self, schedule: NoiseSchedule, count: int, rng: torch.Generator) -> Tensor:
        """`count` timesteps at which what is predicted can be read."""
        last = max(1, round(self.weighting.most_t * schedule.steps))
        return torch.randint(0, last, (count,), generator=rng)

    def cost(
        self, bundle: Bundle, schedule: NoiseSchedule, seen: Seen, spots: Sequence[Spot]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cost of `spots`, whose rows count in `seen`, and what it is made of."""
        errors = self._errors(cut_labels(bundle, schedule, seen, spots), spots)
        times = seen.timesteps[[spot.row for spot in spots]]
        weights = time_weights(schedule, times, self.weighting.by_time).to(errors.ctc)
        parts = {name: getattr(errors, name).detach().mean() for name in PARTS}
        return (combine(errors, self.weighting) * weights).mean(), parts

    def measure(
        self, bundle: Bundle, schedule: NoiseSchedule, seen: Seen, batch: Batch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What each label costs and whether each reader reads it, by name (N,), and their times."""
        spots = self.spread(batch)
        if not spots:
            return {}, seen.timesteps[:0]
        crops = cut_labels(bundle, schedule, seen, spots)
        errors = self._errors(crops, spots)
        values = {name: getattr(errors, name) for name in PARTS}
        for reader in self.readers:
            texts = decode(reader, reader(fit_crops(crops.predicted)).logits, self.signs)
            right = [text == spot.text for text, spot in zip(texts, spots, strict=True)]
            values[f"read_{reader.name}"] = torch.tensor(right, dtype=torch.float32)
        return values, seen.timesteps[[spot.row for spot in spots]]

    def spread(self, batch: Batch) -> list[Spot]:
        """At most `most` labels of a batch, always the same ones, from all over it."""
        spots = self.legible(batch)
        return spots[:: ceil(len(spots) / self.most)] if spots else []

    def legible(self, batch: Batch) -> list[Spot]:
        """All labels of a batch that can be read."""
        return [
            Spot(row=row, text=label.text, box=label.box)
            for row, labels in enumerate(batch.labels)
            for label in labels
            if label.text and set(label.text) <= set(self.signs)
        ]

    def _errors(self, crops: Crops, spots: Sequence[Spot]) -> TextErrors:
        texts = [spot.text for spot in spots]
        return text_errors(self.readers[0], crops.predicted, crops.reference, texts, self.signs)


def shuffled(items: Sequence[T], rng: torch.Generator) -> list[T]:
    """`items` in an order that `rng` draws."""
    return [items[place] for place in torch.randperm(len(items), generator=rng).tolist()]


def gather(spots: Sequence[Spot]) -> tuple[list[int], list[Spot]]:
    """The rows that `spots` are in, and the same spots with rows counted among those."""
    rows = sorted({spot.row for spot in spots})
    return rows, [replace(spot, row=rows.index(spot.row)) for spot in spots]


def cut_labels(bundle: Bundle, schedule: NoiseSchedule, seen: Seen, spots: Sequence[Spot]) -> Crops:
    """Each label out of the latents that the prediction implies, and out of the true ones."""
    implied = schedule.to_x0(seen.prediction.float(), seen.noisy.float(), seen.timesteps)
    windows = place_windows(spots, (implied.shape[2], implied.shape[3]), bundle.factor)
    predicted = bundle.decode_freely(cut_windows(implied, spots, windows))
    with torch.no_grad():
        # Not clamped either: a decoder that overshoots would make the true picture cost something.
        reference = bundle.decode_freely(cut_windows(seen.latents, spots, windows))
    size = (predicted.shape[2], predicted.shape[3])
    boxes = [
        around(moved(spot.box, window, bundle.factor), size)
        for spot, window in zip(spots, windows, strict=True)
    ]
    return Crops(
        predicted=[cut_box(picture, box) for picture, box in zip(predicted, boxes, strict=True)],
        reference=[cut_box(picture, box) for picture, box in zip(reference, boxes, strict=True)],
    )


def place_windows(spots: Sequence[Spot], canvas: tuple[int, int], factor: int) -> list[Box]:
    """A window of latent cells around each label, all of one size, within `canvas`."""
    cells = [spot.box.size for spot in spots]
    height = min(canvas[0], ceil(max(h for h, _ in cells) / factor) + 2 * HALO)
    width = min(canvas[1], ceil(max(w for _, w in cells) / factor) + 2 * HALO)
    windows = []
    for spot in spots:
        x, y = spot.box.middle
        top = min(max(0, round(y / factor - height / 2)), canvas[0] - height)
        left = min(max(0, round(x / factor - width / 2)), canvas[1] - width)
        windows.append(Box(left, top, left + width, top + height))
    return windows


def cut_windows(latents: Tensor, spots: Sequence[Spot], windows: Sequence[Box]) -> Tensor:
    """The window (N, C, h, w) of each spot."""
    pairs = zip(spots, windows, strict=True)
    return torch.stack([latents[s.row, :, w.top : w.bottom, w.left : w.right] for s, w in pairs])


def moved(box: Box, window: Box, factor: int) -> Box:
    """`box`, in pixels of the canvas, in pixels of its window of cells."""
    left, top = window.left * factor, window.top * factor
    return Box(box.left - left, box.top - top, box.right - left, box.bottom - top)


def cut_box(picture: Tensor, box: Box) -> Tensor:
    """The part (3, h, w) of a picture (3, H, W)."""
    return picture[:, box.top : box.bottom, box.left : box.right]

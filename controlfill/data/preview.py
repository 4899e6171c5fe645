"""A grid of samples, to see with one's own eyes what training will see."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from controlfill.data.hints import Spec, show_hint
from controlfill.data.sample import PreparedSource, Sample, collate
from controlfill.images import as_rgb, grid, to_uint8

# Pixels of each picture in the grid, whatever the size of the samples.
SIDE = 176


def preview(
    data: PreparedSource, spec: Spec, count: int, side: int = SIDE
) -> tuple[np.ndarray, list[str]]:
    """One row per sample with two epochs side by side: picture, mask, hint; prompt below.

    Returns the grid, uint8, and the reasons of pictures that were skipped.
    """
    rows, skipped = [], []
    for index in range(min(count, len(data))):
        row = []
        for epoch in (0, 1):
            sample, reasons = data[epoch, index]
            row += panels(sample, spec, side)
            skipped += reasons
        rows.append(row)
    return grid(rows), list(dict.fromkeys(skipped))


def panels(sample: Sample, spec: Spec, side: int) -> list[np.ndarray]:
    """Picture, mask and hint (hole in magenta) of one sample, with its prompt under the picture."""
    batch = collate([sample], spec)
    shown = show_hint(batch.hint, spec)[0]
    size = (side, side)
    pictures = (sample.image, as_rgb(to_uint8(batch.mask)[0, ..., 0]), shown)
    scaled = [cv2.resize(p, size, interpolation=cv2.INTER_NEAREST) for p in pictures]
    texts = (sample.prompt or "(no prompt)", f"mask {float(batch.mask.mean()):.0%}", spec.label)
    return [with_text(p, text) for p, text in zip(scaled, texts, strict=True)]


def with_text(picture: np.ndarray, text: str) -> np.ndarray:
    """`picture` with a line of small text below, cut to its width."""
    line = Image.new("RGB", (picture.shape[1], 16), "white")
    ImageDraw.Draw(line).text((2, 1), text, fill="black", font=ImageFont.load_default(10.5))
    return np.vstack([picture, np.asarray(line)])

"""The judge: is the object that was asked for in the picture, in colour and in shape?

It knows the world's palette and outlines, and nothing of the network that painted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from controlfill.data.worlds import COLOURS, Truth, World, outlines

# A pixel has a palette colour when it is nearest to it and within this CIELAB distance.
NEAR = 22.0
# Objects cover 6.5 % of the picture or more; half of the smallest is no object.
SMALLEST = 0.035
LARGEST = 0.4
# The share of overlap with the best template below which a blob has no shape at all.
FIT = 0.8


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an object of the right colour is there, and whether its shape is the right one."""

    colour: bool
    shape: bool


def judge(image: np.ndarray, hole: np.ndarray, truth: Truth, world: World) -> Verdict:
    """Look in the white part of `hole` for the object that `truth` names."""
    blob = find_blob(image, hole, truth.colour, world)
    share = blob.mean()
    if not SMALLEST <= share <= LARGEST:
        return Verdict(colour=False, shape=False)
    return Verdict(colour=True, shape=shape_of(blob, world) == truth.shape)


def find_blob(image: np.ndarray, hole: np.ndarray, colour: str, world: World) -> np.ndarray:
    """The largest connected patch of `colour` within the hole, bool (H, W)."""
    lab = _lab(image.reshape(-1, 3)).reshape(image.shape)
    names = list(world.colours)
    palette = _lab(np.array([COLOURS[name] for name in names], np.uint8))
    distances = np.linalg.norm(lab[:, :, None] - palette, axis=3)
    mine = distances[..., names.index(colour)]
    found = (distances.argmin(axis=2) == names.index(colour)) & (mine < NEAR) & (hole > 0)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        found.astype(np.uint8), connectivity=4
    )
    if count < 2:
        return np.zeros(found.shape, bool)
    return labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


def _lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB of uint8 RGB rows (N, 3)."""
    return cv2.cvtColor(colours[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]


def shape_of(blob: np.ndarray, world: World) -> str | None:
    """The shape whose outline, at the blob's own size and place, overlaps it best."""
    best, fit = None, FIT
    for shape in world.shapes:
        for turn in np.arange(-24, 25, 4):
            overlap = _overlap(blob, shape, float(np.deg2rad(turn)))
            if overlap > fit:
                best, fit = shape, overlap
    return best


def _overlap(blob: np.ndarray, shape: str, turn: float) -> float:
    """Intersection over union of `blob` with a template of its area about its centre."""
    area, offset = _unit(shape, turn)
    radius = float(np.sqrt(blob.sum() / area))
    rows, columns = np.nonzero(blob)
    centre = np.array([rows.mean(), columns.mean()]) - offset * radius
    plane = np.zeros(blob.shape, np.uint8)
    for ring, value in outlines(shape, radius, turn):
        points = np.rint((ring + centre)[:, ::-1] * 16).astype(np.int32)
        cv2.fillPoly(plane, [points], value, shift=4)
    template = plane > 0
    return float((template & blob).sum() / (template | blob).sum())


@lru_cache(maxsize=256)
def _unit(shape: str, turn: float) -> tuple[float, np.ndarray]:
    """Area and centre of gravity (y, x) of a shape of radius 1."""
    plane, scale = np.zeros((512, 512), np.uint8), 200.0
    for ring, value in outlines(shape, scale, turn):
        cv2.fillPoly(plane, [np.rint((ring + 256)[:, ::-1]).astype(np.int32)], value)
    rows, columns = np.nonzero(plane)
    return float(plane.sum()) / scale**2, np.array(
        [rows.mean() - 256, columns.mean() - 256]
    ) / scale

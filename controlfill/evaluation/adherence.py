"""How well a picture keeps to a layout, in numbers that mean something: beside floor and ceiling.

The ceiling is what a clean drawing of the layout scores, the floor what the picture itself scores
for the same keys dealt out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from controlfill.evaluation.keyfit import KeyFit, find_reach, key_fit
from controlfill.skins.draw import LABEL, key_masks
from controlfill.skins.layout import Box, Layout, Slot

# Canny's thresholds and how many pixels an edge may lie beside the layout's.
CANNY = (50, 80)
BESIDE = 2
# Colours of a clean drawing: of its ground and its keys.
GROUND, KEY = 110, 200
# Least side of a key that is measured, in pixels.
LEAST_KEY = 3
# Least distance from floor to ceiling that tells anything.
LEAST_WAY = 0.05
# Least distance in Lab between a key and its gap for a split between them to mean anything.
LEAST_SPLIT = 2.0


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """How well a picture keeps to a layout.

    `edges` is the share of the keys' outlines that the picture has (recall), `ious` the overlap of
    each key with what has its colour, by key.
    """

    fit: KeyFit
    edges: float
    ious: dict[str, float]

    def figures(self) -> dict[str, float]:
        """Plain numbers: shares in [0, 1], and how far sides are off, in pixels.

        What was not found anywhere has no number.
        """
        off = np.abs(self.fit.offsets)
        found = {
            "key_fit": self.fit.share,
            "edge_recall": self.edges,
            "key_iou": float(np.mean(list(self.ious.values()))) if self.ious else 0.0,
            "sides_found": len(off) / max(1, 4 * len(self.fit.fits)),
        }
        if len(off):
            found["offset_median"] = float(np.median(off))
            found["offset_p95"] = float(np.percentile(off, 95))
        return found


def adherence(image: np.ndarray, layout: Layout, truth: Layout | None = None) -> Adherence:
    """Measure a uint8 picture (H, W, 3) as large as `layout`.

    Labels are looked away from where `truth`, the layout that was painted, has them.
    """
    return Adherence(
        fit=key_fit(image, layout),
        edges=edge_recall(image, layout, label_areas(truth or layout)),
        ious=key_ious(image, layout),
    )


def normalised(value: float, floor: float, ceiling: float) -> float:
    """How far `value` is on the way from the floor to the ceiling, at most 1 and at least -1.

    (F - F0) / (F1 - F0); 0 where there is hardly any way, as in noise, which has edges everywhere.
    """
    way = ceiling - floor
    return float(np.clip((value - floor) / way, -1, 1)) if way >= LEAST_WAY else 0.0


def edge_recall(image: np.ndarray, layout: Layout, hidden: np.ndarray | None = None) -> float:
    """The share of the outlines of keys with an edge of the picture (H, W, 3) within two pixels.

    What is `hidden`, bool (H, W), counts on neither side.
    """
    wanted = key_outlines(layout)
    found = cv2.Canny(np.ascontiguousarray(image), *CANNY)
    if hidden is not None:
        wanted, found = wanted & ~hidden, np.where(hidden, np.uint8(0), found)
    side = 2 * BESIDE + 1
    near = cv2.dilate(found, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))) > 0
    return float(near[wanted].mean()) if wanted.any() else 0.0


def key_outlines(layout: Layout) -> np.ndarray:
    """Where the outlines of keys are, one pixel thin, bool (H, W)."""
    lines = np.zeros(layout.size, bool)
    for mask in key_masks(layout.keys, layout.size):
        whole = mask.astype(np.uint8)
        lines |= whole > cv2.erode(whole, np.ones((3, 3), np.uint8), borderValue=0)
    return lines


def label_areas(layout: Layout) -> np.ndarray:
    """Where labels may be in whatever font, bool (H, W): the most that `draw_labels` gives them."""
    areas = np.zeros(layout.size, bool)
    for slot in layout.labelled:
        (x, y), (height, width) = slot.box.middle, slot.box.size
        down, right = LABEL[0] * height / 2 + BESIDE, LABEL[1] * width / 2 + BESIDE
        Box(round(x - right), round(y - down), round(x + right), round(y + down)).of(areas)[:] = (
            True
        )
    return areas


def key_ious(image: np.ndarray, layout: Layout) -> dict[str, float]:
    """How much of each key and of what has its colour around it is the same, in [0, 1].

    A pixel within reach of a key is its own when it is nearer to the key's median colour than to
    that around it; the largest piece of those counts, with what it encloses. It saturates where
    gaps are narrow, and is no more than a second opinion.
    """
    lab = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2LAB).astype(np.float32)
    masks = key_masks(layout.keys, layout.size)
    reach = find_reach(layout)
    return {
        slot.name: split_iou(lab, slot, mask, reach)
        for slot, mask in zip(layout.keys, masks, strict=True)
    }


def split_iou(lab: np.ndarray, slot: Slot, mask: np.ndarray, reach: int) -> float:
    """The overlap of a key's `mask` (H, W) with the piece of its colour in its cell."""
    box = slot.box
    cell = Box(box.left - reach, box.top - reach, box.right + reach, box.bottom + reach).clipped(
        (lab.shape[0], lab.shape[1])
    )
    colours, inside = cell.of(lab), cell.of(mask)
    if inside.all():
        return 0.0
    own, around = np.median(colours[inside], axis=0), np.median(colours[~inside], axis=0)
    if np.linalg.norm(own - around) < LEAST_SPLIT:
        return 0.0
    nearer = np.linalg.norm(colours - own, axis=2) < np.linalg.norm(colours - around, axis=2)
    piece = largest_piece(nearer)
    return float((piece & inside).sum() / (piece | inside).sum())


def largest_piece(where: np.ndarray) -> np.ndarray:
    """The largest connected piece of a mask, bool (H, W), holes in it filled."""
    contours, _ = cv2.findContours(where.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(where.shape, np.uint8)
    if contours:
        cv2.drawContours(filled, [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return filled > 0


def plain_skin(layout: Layout) -> np.ndarray:
    """A clean drawing of a layout, grey keys on a darker ground, uint8 (H, W, 3)."""
    keys = np.any(key_masks(layout.keys, layout.size), axis=0) if layout.keys else False
    grey = np.where(keys, np.uint8(KEY), np.uint8(GROUND))
    return np.repeat(np.broadcast_to(grey, layout.size)[..., None], 3, axis=2)


def shuffled_layout(layout: Layout, seed: int = 0) -> Layout:
    """The same keys at other places: shuffled and dealt into more or fewer rows of their panel.

    What a picture scores for it is the floor of its score for `layout`.
    """
    rng = np.random.default_rng([seed, 83])
    gap, moved = 2 * find_reach(layout) + 1, {}
    for keys in panels(layout):
        moved |= dealt_anew(keys, gap, rng)
    slots = (replace(slot, box=moved.get(slot.name, slot.box)) for slot in layout.slots)
    return replace(layout, name=f"{layout.name}, shuffled", slots=tuple(slots))


def panels(layout: Layout) -> list[list[Slot]]:
    """The keys of each region, those of none last."""
    regions = sorted(
        (slot for slot in layout.slots if slot.role == "region"),
        key=lambda slot: slot.box.size[0] * slot.box.size[1],
    )
    found: dict[str, list[Slot]] = {region.name: [] for region in regions}
    for key in layout.keys:
        home = next((r.name for r in regions if key.box.inside(r.box)), "")
        found.setdefault(home, []).append(key)
    return [keys for keys in found.values() if keys]


def dealt_anew(keys: Sequence[Slot], gap: int, rng: np.random.Generator) -> dict[str, Box]:
    """New boxes for the keys of a panel, within the room that they took together, by name.

    Where there is no room for another row they stay in as many.
    """
    left, top = min(k.box.left for k in keys), min(k.box.top for k in keys)
    right, bottom = max(k.box.right for k in keys), max(k.box.bottom for k in keys)
    old = len({key.box.top for key in keys})
    rows = old + 1 if old == 1 or rng.random() < 0.5 else old - 1
    if rows > len(keys) or (bottom + gap - top) / rows < gap + LEAST_KEY:
        rows = old
    edges = np.linspace(top, bottom + gap, rows + 1).round().astype(int).tolist()
    order, moved = rng.permutation(len(keys)), {}
    for numbers, upper, lower in zip(
        np.array_split(order, rows), edges[:-1], edges[1:], strict=True
    ):
        row = [keys[number] for number in numbers]
        shares = np.cumsum([0, *(key.box.size[1] for key in row)])
        ends = (left + shares / shares[-1] * (right + gap - left)).round().astype(int).tolist()
        for key, start, end in zip(row, ends[:-1], ends[1:], strict=True):
            width = max(LEAST_KEY, end - gap - start)
            moved[key.name] = Box(start, upper, start + width, max(upper + LEAST_KEY, lower - gap))
    return moved

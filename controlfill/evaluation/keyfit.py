"""Does a picture keep to a layout? Edges of keys where they should be, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from controlfill.skins.layout import Box, Layout

# Pixels by which a side may be off, and how much stronger than the rest of the profile its step is.
TOLERANCE = 1
STRONGER = 3.0
# Share of each side, at both ends, that is left out, since corners are round.
CORNER = 0.3


@dataclass(frozen=True, kw_only=True)
class KeyFit:
    """Which keys have all four sides in place; `offsets` are those of all sides, in pixels.

    A side without any clear step has none.
    """

    fits: dict[str, bool]
    offsets: list[float]

    @property
    def share(self) -> float:
        """The share of keys that fit, in [0, 1]."""
        return float(np.mean(list(self.fits.values()))) if self.fits else 0.0


def key_fit(image: np.ndarray, layout: Layout) -> KeyFit:
    """KeyFit of a uint8 picture (H, W, 3) as large as the layout.

    For each side the Lab profile along its normal is averaged over the side; its strongest step
    within reach must lie within a pixel of the layout's and be thrice the median step.
    """
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    reach, fits, offsets = find_reach(layout), {}, []
    for slot in layout.keys:
        found = [strongest_step(profile, reach) for profile in profiles(lab, slot.box, reach)]
        offsets += [offset for offset in found if offset is not None]
        fits[slot.name] = all(o is not None and abs(o) <= TOLERANCE for o in found)
    return KeyFit(fits=fits, offsets=offsets)


def find_reach(layout: Layout) -> int:
    """How far from a side its step is looked for: less than half of the gap, or the next key is."""
    gaps = [
        other.box.left - slot.box.right
        for slot in layout.keys
        for other in layout.keys
        if slot.box.top == other.box.top and other.box.left >= slot.box.right
    ]
    return max(2, (min(gaps, default=6) - 1) // 2)


def profiles(lab: np.ndarray, box: Box, reach: int) -> Iterator[np.ndarray]:
    """Colours (2 * (reach + 4), 3) across each side of `box`, its step in the middle."""
    far = reach + 4
    down, along = (round(CORNER * side) for side in box.size)
    middle = lab[box.top + down : box.bottom - down], lab[:, box.left + along : box.right - along]
    for edge in (box.left, box.right):
        yield around(middle[0].mean(axis=0), edge, far)
    for edge in (box.top, box.bottom):
        yield around(middle[1].mean(axis=1), edge, far)


def around(line: np.ndarray, edge: int, far: int) -> np.ndarray:
    """The `far` colours on either side of `edge`; borders of the picture repeat."""
    return line[np.clip(np.arange(edge - far, edge + far), 0, len(line) - 1)]


def strongest_step(profile: np.ndarray, reach: int) -> int | None:
    """How far from its middle a profile changes most, in pixels; None if nowhere clearly."""
    steps = np.linalg.norm(np.diff(profile, axis=0), axis=1)
    middle = len(profile) // 2 - 1
    near = steps[middle - reach : middle + reach + 1]
    strongest = int(near.argmax())
    floor = max(float(np.median(steps)), 0.25)
    return strongest - reach if near[strongest] >= STRONGER * floor else None

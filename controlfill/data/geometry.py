"""Where a picture is cut, and where everything on it goes: masks, hints and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import ge

import numpy as np

from controlfill.images import resize, resize_mask
from controlfill.skins.layout import Box, Size


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text in a picture: what it says, None where nobody knows, and its box in pixels."""

    text: str | None
    box: Box


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One cut, resize and flip, the same for a picture and all that lies on it.

    The largest part of the aspect of `size` (height, width) is cut at the share `place` (0 to 1,
    down and across) of what is left over, then resized: cutting first keeps long thin pictures from
    growing beyond all memory. A `patch` is cut as it is, at the picture's own scale.
    """

    size: Size
    place: tuple[float, float]
    flip: bool
    patch: bool = False

    def of_image(self, image: np.ndarray) -> np.ndarray:
        """The (*size, 3) cut of a picture of any size."""
        return resize(self._cut(image), self.size)

    def of_mask(self, mask: np.ndarray) -> np.ndarray:
        """The cut of a mask of any size, as large as `size`."""
        return resize_mask(self._cut(mask), self.size)

    def of_labels(self, labels: Sequence[Label], shape: Size) -> tuple[Label, ...]:
        """The labels of a picture of `shape` where they lie in its cut.

        Those cut through or mirrored can't be read any more and are left out, unknown ones aren't.
        """
        top, left, height, width = self._frame(shape)
        down, right = self.size[0] / height, self.size[1] / width
        found = []
        for label in labels:
            b = label.box
            box = Box(b.left - left, b.top - top, b.right - left, b.bottom - top)
            if self.flip:
                box = replace(box, left=width - box.right, right=width - box.left)
            whole = box.inside(Box(0, 0, width, height)) and not self.flip
            box = box.scaled(down, right).clipped(self.size)
            if min(box.size) > 0 and (whole or label.text is None):
                found.append(Label(text=label.text, box=box))
        return tuple(found)

    def framing(self, shape: Size) -> tuple[int, ...]:
        """What SDXL is told of a cut: size of the whole picture, corner of the cut, its size.

        The corner counts in pixels of the resized, mirrored picture (Podell et al. 2023, "SDXL",
        section 2.2).
        """
        top, left, height, width = self._frame(shape)
        left = shape[1] - left - width if self.flip else left
        corner = (round(top * self.size[0] / height), round(left * self.size[1] / width))
        return (*shape, *corner, *self.size)

    def part(self, shape: Size) -> Size:
        """Height and width of what is cut from an array of `shape`."""
        scale = min(length / wanted for length, wanted in zip(shape, self.size, strict=True))
        if self.patch and all(map(ge, shape, self.size)):
            scale = 1.0
        height, width = (max(1, round(scale * wanted)) for wanted in self.size)
        return min(height, shape[0]), min(width, shape[1])

    def _frame(self, shape: Size) -> tuple[int, int, int, int]:
        """Top, left, height and width of what is cut from an array of `shape`."""
        height, width = self.part(shape)
        down, across = self.place
        return round(down * (shape[0] - height)), round(across * (shape[1] - width)), height, width

    def _cut(self, array: np.ndarray) -> np.ndarray:
        top, left, height, width = self._frame((array.shape[0], array.shape[1]))
        part = array[top : top + height, left : left + width]
        # OpenCV reads a view as fast as a copy, but not one that runs backwards.
        return np.ascontiguousarray(part[:, ::-1]) if self.flip else part


def draw_geometry(
    size: Size,
    rng: np.random.Generator,
    crop: str = "random",
    random_flip: bool = False,
) -> Geometry:
    """A cut of `size` at random, from the centre or as a patch; half of them mirrored if asked."""
    down = 0.5 if crop == "center" else float(rng.uniform())
    # Other cuts have something left over on one side only, so one share does for both.
    across = float(rng.uniform()) if crop == "patch" else down
    flip = random_flip and bool(rng.uniform() < 0.5)
    return Geometry(size=size, place=(down, across), flip=flip, patch=crop == "patch")


def move_to_hole(geometry: Geometry, mask: np.ndarray, rng: np.random.Generator) -> Geometry:
    """`geometry`, moved so that its cut shows some of the mask's white."""
    if geometry.of_mask(mask).any():
        return geometry
    shape = (mask.shape[0], mask.shape[1])
    white = np.argwhere(mask)
    spot = white[rng.integers(len(white))]
    place = tuple(
        float(np.clip((at - cut / 2) / max(1, length - cut), 0, 1))
        for at, length, cut in zip(spot, shape, geometry.part(shape), strict=True)
    )
    return replace(geometry, place=(place[0], place[1]))

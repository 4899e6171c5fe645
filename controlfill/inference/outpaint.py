"""Outpainting: any number of pixels on any side, known pixels untouched, sizes exact."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from controlfill.errors import UserError
from controlfill.images import Photo, as_photo
from controlfill.inference.complete import Result, check_fills, complete, make_result
from controlfill.inference.pipeline import Pipeline, Progress
from controlfill.options import GrowOptions, read_size

# Where the old picture lies in the new one: shares of what is added that go above and to the left.
ANCHORS = {
    "top-left": (0.0, 0.0), "top": (0.0, 0.5), "top-right": (0.0, 1.0),
    "left": (0.5, 0.0), "center": (0.5, 0.5), "right": (0.5, 1.0),
    "bottom-left": (1.0, 0.0), "bottom": (1.0, 0.5), "bottom-right": (1.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Pixels to be added on each side."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def any(self) -> bool:
        """Whether anything is added at all."""
        return bool(self.left or self.right or self.top or self.bottom)


def outpaint(
    pipeline: Pipeline, image: Any, options: GrowOptions, progress: Progress | None = None
) -> Result:
    """A larger picture around `image`: a path, PIL picture, numpy array or tensor, of any size.

    Raises UserError when nothing is added, and InterruptedError when `progress` returns False.
    """
    check_fills(pipeline)
    photo = as_photo(image)
    sides = choose_sides(photo.size, options)
    canvas, hole = enlarge(photo, sides)
    old = (sides.top, sides.left)
    made = complete(pipeline, canvas.rgb, hole, options, progress, old)
    return make_result(pipeline, canvas, hole, made, options)


def choose_sides(size: tuple[int, int], options: GrowOptions) -> Sides:
    """What `options` add to a picture of `size` (height, width). Raises UserError."""
    asked = sides_asked(options)
    if sum([asked.any(), options.expand is not None, options.to is not None]) != 1:
        raise UserError(
            "say how large the picture shall be in one way: --left, --right, --top, --bottom in "
            "pixels, or --expand 50%, or --to 1920x1080"
        )
    if options.expand is not None:
        down, right = (round(side * read_share(options.expand)) for side in size)
        return Sides(left=right, right=right, top=down, bottom=down)
    return reach(size, options.to, options.anchor) if options.to is not None else asked


def sides_asked(options: GrowOptions) -> Sides:
    """The pixels that `options` name side by side."""
    return Sides(left=options.left, right=options.right, top=options.top, bottom=options.bottom)


def wants_more(options: GrowOptions) -> bool:
    """Whether `options` ask for a larger picture at all."""
    return sides_asked(options).any() or options.expand is not None or options.to is not None


def read_share(text: str) -> float:
    """The share that "50%" or "0.5" is. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else 0
    if not 0 < share <= 10:
        raise UserError(f"--expand {text!r} is no share; 50% or 0.5 adds half a side on each side")
    return share


def reach(size: tuple[int, int], to: str, anchor: str) -> Sides:
    """What must be added to `size` to reach "WIDTHxHEIGHT" `to`. Raises UserError."""
    height, width = size
    down, right = (wanted - side for wanted, side in zip(read_size("to", to), size, strict=True))
    if right < 0 or down < 0 or not right + down:
        raise UserError(
            f"--to {to} is not larger than the picture, which is {width}x{height}; outpainting "
            "never shrinks"
        )
    above, before = ANCHORS[anchor]
    top, left = round(down * above), round(right * before)
    return Sides(left=left, right=right - left, top=top, bottom=down - top)


def enlarge(photo: Photo, sides: Sides) -> tuple[Photo, np.ndarray]:
    """The canvas with `photo` in its place, and the mask of what is new."""
    frame = ((sides.top, sides.bottom), (sides.left, sides.right))
    rgb = np.pad(photo.rgb, (*frame, (0, 0)))
    alpha = None if photo.alpha is None else np.pad(photo.alpha, frame, constant_values=255)
    hole = np.pad(np.zeros(photo.size, np.uint8), frame, constant_values=255)
    return Photo(rgb=rgb, alpha=alpha), hole

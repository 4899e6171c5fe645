"""What a layout looks like: edge and glyph hints, label masks, labels on finished skins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, floor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from controlfill.errors import UserError
from controlfill.skins.layout import Box, Layout, Size, Slot

# Share of a key's height that its label may take, and of its width.
LABEL = (0.46, 0.8)
# Share of a key's shorter side that is the radius of its corners.
RADIUS = 0.14
SANS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc")
HAN = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc")
NO_SIGN = "\U0010fffe"


def edge_hint(layout: Layout) -> np.ndarray:
    """White outlines, one pixel thin, of all slots on black, uint8 (H, W, 3)."""
    picture = np.zeros((*layout.size, 3), np.uint8)
    for slot in layout.slots:
        radius = 0 if slot.role == "region" else round(RADIUS * min(slot.box.size))
        outline(picture, slot.box, radius)
    return picture


def outline(picture: np.ndarray, box: Box, radius: int) -> None:
    """Draw the inner border of `box` with round corners into `picture` (H, W, 3)."""
    filled = np.zeros(box.size, np.uint8)
    filled[rounded(box.size, radius)] = 255
    inner = cv2.erode(filled, np.ones((3, 3), np.uint8), borderValue=0)
    box.of(picture)[filled != inner] = 255


def rounded(size: Size, radius: int) -> np.ndarray:
    """Where a rectangle of `size` with round corners is, bool (H, W)."""
    image = Image.new("1", (size[1], size[0]))
    ImageDraw.Draw(image).rounded_rectangle((0, 0, size[1] - 1, size[0] - 1), radius, fill=1)
    return np.array(image)


def glyph_hint(layout: Layout, font: Path | None = None) -> np.ndarray:
    """The edge hint with the labels in white, uint8 (H, W, 3). Raises UserError."""
    return draw_labels(edge_hint(layout), layout, font, (255, 255, 255))


def draw_labels(
    picture: np.ndarray,
    layout: Layout,
    font: Path | None = None,
    colour: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """A copy of `picture` (H, W, 3), as large as the layout, with the labels on their keys.

    Without a `colour` those of one kind of key are all dark or all light, whichever can be read
    better. Raises UserError for signs that the font lacks.
    """
    check_size(picture, layout)
    inks = {} if colour else choose_inks(picture, layout)
    image = Image.fromarray(np.ascontiguousarray(picture))
    pen = ImageDraw.Draw(image)
    for slot in layout.labelled:
        own = colour or inks[slot.part]
        pen.text(slot.box.middle, slot.label, fill=own, font=fitting(slot, font), anchor="mm")
    return np.array(image)


def check_size(picture: np.ndarray, layout: Layout) -> None:
    """Raise UserError unless `picture` is as large as the canvas."""
    if picture.shape[:2] != layout.size:
        (height, width), (h, w) = picture.shape[:2], layout.size
        raise UserError(f"the skin is {width}x{height}; the layout's canvas is {w}x{h}")


def choose_inks(picture: np.ndarray, layout: Layout) -> dict[str, tuple[int, int, int]]:
    """The colour of labels on each kind of key (part), from all of its keys in `picture`."""
    keys: dict[str, list[np.ndarray]] = {}
    for slot in layout.labelled:
        keys.setdefault(slot.part, []).append(slot.box.inset(0.15).of(picture).reshape(1, -1, 3))
    return {part: readable_on(np.concatenate(areas, axis=1)) for part, areas in keys.items()}


def readable_on(key: np.ndarray) -> tuple[int, int, int]:
    """Near-black or near-white, the one further from the median brightness of a key."""
    grey = float(np.median(cv2.cvtColor(np.ascontiguousarray(key), cv2.COLOR_RGB2GRAY)))
    return (24, 24, 28) if grey > 127 else (245, 245, 245)


def fitting(slot: Slot, font: Path | None) -> Any:
    """The font at the largest size at which the slot's label fits its key."""
    height, width = slot.box.size
    size = max(6, round(LABEL[0] * height))
    found = open_font(font, is_han(slot.label), size)
    check_signs(slot.label, found)
    while size > 6 and found.getlength(slot.label) > LABEL[1] * width:
        size -= 1
        found = open_font(font, is_han(slot.label), size)
    return found


def is_han(text: str) -> bool:
    """Whether `text` has Chinese, Japanese or Korean signs."""
    return any(ord(sign) >= 0x2E80 for sign in text)


@lru_cache(maxsize=512)
def open_font(font: Path | None, han: bool, size: int) -> Any:
    """The font in a file, or one of the system's, or Pillow's own. Raises UserError."""
    for name in [str(font)] if font else HAN if han else SANS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    if font:
        raise UserError(f"--font {font} is no font that can be read (.ttf, .otf, .ttc)")
    return ImageFont.load_default(size)


def check_signs(text: str, font: Any) -> None:
    """Raise UserError that names the signs of `text` for which `font` has only a box."""
    missing = [sign for sign in text if not sign.isspace() and not has_sign(font, sign)]
    if missing:
        raise UserError(
            f"the font {font.getname()[0]} has no {' '.join(missing)} for the label {text!r}; "
            "name one that has with --font"
        )


def has_sign(font: Any, sign: str) -> bool:
    """Whether `font` draws `sign` otherwise than what it does not know."""
    return bytes(font.getmask(sign)) != bytes(font.getmask(NO_SIGN))


def label_boxes(layout: Layout, font: Path | None = None) -> list[tuple[str, Box]]:
    """Each label with the box of its ink."""
    found = []
    for slot in layout.labelled:
        left, top, right, bottom = fitting(slot, font).getbbox(slot.label, anchor="mm")
        x, y = slot.box.middle
        edges = (floor(x + left), floor(y + top), ceil(x + right), ceil(y + bottom))
        found.append((slot.label, Box(*edges)))
    return found


def position_mask(layout: Layout, font: Path | None = None) -> np.ndarray:
    """White where labels are, uint8 (H, W)."""
    mask = np.zeros(layout.size, np.uint8)
    for _, box in label_boxes(layout, font):
        box.of(mask)[:] = 255
    return mask


def key_masks(slots: Sequence[Slot], size: Size) -> np.ndarray:
    """Where each of `slots` is on a canvas of `size`, bool (slots, H, W)."""
    masks = np.zeros((len(slots), *size), bool)
    for mask, slot in zip(masks, slots, strict=True):
        slot.box.of(mask)[rounded(slot.box.size, round(RADIUS * min(slot.box.size)))] = True
    return masks

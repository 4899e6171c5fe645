"""From parts to a skin and back: element images laid out on one canvas, a canvas cut into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from controlfill.errors import UserError
from controlfill.files import check_empty, write_folder
from controlfill.images import SUFFIXES, Photo, as_photo, save_image
from controlfill.skins.draw import check_size
from controlfill.skins.layout import Layout, Sides, Size, Slot

# An element whose proportions differ by more from its slot's is reported when it is stretched.
ASKEW = 0.1
PRESSED = 0.8


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A skin (H, W, 3), and what its parts left to be desired."""

    image: np.ndarray
    reports: list[str]


def compose(layout: Layout, folder: Path, background: int = 255) -> Composed:
    """The skin that the element images in `folder` make, those of higher slots over lower ones.

    A slot's picture is the one of its own name, or else that of its part. What misses or does not
    line up is reported. Raises UserError when nothing of the folder is a part.
    """
    files = find_parts(folder)
    canvas = np.full((*layout.size, 3), background, np.uint8)
    reports: list[str] = []
    opened: dict[Path, Photo] = {}  # many keys share one picture
    for slot in layout.slots:
        file = files.get(slot.name) or files.get(slot.part)
        if file is None:
            reports.append(missing(slot, folder))
            continue
        if file not in opened:
            opened[file] = as_photo(file)
        element = opened[file]
        reports += [f"{file.name}: {text}" for text in askew(element.size, slot)]
        lay(canvas, slot, element)
    if not opened:
        raise UserError(
            f"{folder} holds no part of layout {layout.name}; expected pictures called "
            + ", ".join(sorted({slot.part for slot in layout.slots}))
        )
    spare = sorted(f.name for f in files.values() if f not in opened and not is_pressed(f))
    reports += [f"{name}: no slot of layout {layout.name} has that name" for name in spare]
    return Composed(image=canvas, reports=list(dict.fromkeys(reports)))


def missing(slot: Slot, folder: Path) -> str:
    """What is said of a slot without a picture."""
    names = dict.fromkeys((f"{slot.name}.png", f"{slot.part}.png"))
    return f"{slot.name}: neither of {', '.join(names)} is in {folder}"


def is_pressed(file: Path) -> bool:
    """Whether a picture shows a key that is held down."""
    return file.stem.endswith("-pressed")


def find_parts(folder: Path) -> dict[str, Path]:
    """The element images in `folder` by their names. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one with the element images of a skin")
    found = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES)
    return {path.stem: path for path in found}


def askew(size: Size, slot: Slot) -> list[str]:
    """What is to be said of an element of `size` stretched into `slot`."""
    if slot.fit != "stretch":
        return []
    (height, width), (wanted, broad) = size, slot.box.size
    ratio = (width / height) / (broad / wanted)
    if max(ratio, 1 / ratio) <= 1 + ASKEW:
        return []
    return [f"{width}x{height} is stretched to {broad}x{wanted} for {slot.name}"]


def lay(canvas: np.ndarray, slot: Slot, element: Photo) -> None:
    """Put `element` into its slot, through its alpha."""
    alpha = element.alpha if element.alpha is not None else np.full(element.size, 255, np.uint8)
    picture = np.dstack([element.rgb, alpha])
    fitted = FITS[slot.fit](picture, slot)
    here = slot.box.of(canvas)
    opacity = fitted[..., 3:].astype(np.float32) / 255
    here[:] = np.rint(fitted[..., :3] * opacity + here * (1 - opacity)).astype(np.uint8)


def resized(picture: np.ndarray, size: Size) -> np.ndarray:
    """`picture` (H, W, 4) at another size; itself at its own."""
    if picture.shape[:2] == size:
        return picture
    shrinks = size[0] * size[1] < picture.shape[0] * picture.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(picture, (max(1, size[1]), max(1, size[0])), interpolation=how)


def stretch(picture: np.ndarray, slot: Slot) -> np.ndarray:
    """As large as the slot, whatever its proportions."""
    return resized(picture, slot.box.size)


def cover(picture: np.ndarray, slot: Slot) -> np.ndarray:
    """The slot is full, what stands out is cut off on both sides alike."""
    height, width = slot.box.size
    scale = max(height / picture.shape[0], width / picture.shape[1])
    large = resized(picture, (round(picture.shape[0] * scale), round(picture.shape[1] * scale)))
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]


def contain(picture: np.ndarray, slot: Slot) -> np.ndarray:
    """All of it is seen, in the middle of the slot."""
    height, width = slot.box.size
    scale = min(height / picture.shape[0], width / picture.shape[1])
    small = resized(picture, (round(picture.shape[0] * scale), round(picture.shape[1] * scale)))
    whole = np.zeros((height, width, 4), np.uint8)
    top, left = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
    whole[top : top + small.shape[0], left : left + small.shape[1]] = small
    return whole


def nine_slice(picture: np.ndarray, slot: Slot) -> np.ndarray:
    """Corners in one scale, edges stretched along themselves, the middle both ways.

    The slot's `insets` are the widths of left, top, right and bottom edges in the picture's pixels,
    its `edges` those on the canvas, which shrink and grow with it.
    """
    left, top, right, bottom = slot.insets
    west, north, east, south = drawn_edges(slot)
    (height, width), (tall, broad) = slot.box.size, picture.shape[:2]
    across, down = width - west - east, height - north - south
    if min(across, down, broad - left - right, tall - top - bottom) <= 0:
        raise UserError(
            f"line {slot.line}: insets {list(slot.insets)} of {slot.name} leave nothing between "
            f"them of a picture of {broad}x{tall} in a slot of {width}x{height}"
        )
    rows = [(0, top), (top, tall - bottom), (tall - bottom, tall)]
    columns = [(0, left), (left, broad - right), (broad - right, broad)]
    heights, widths = (north, down, south), (west, across, east)
    return np.concatenate(
        [
            np.concatenate(
                [
                    resized(picture[r[0] : r[1], c[0] : c[1]], (h, w))
                    for c, w in zip(columns, widths, strict=True)
                    if w
                ],
                axis=1,
            )
            for r, h in zip(rows, heights, strict=True)
            if h
        ]
    )


def drawn_edges(slot: Slot) -> Sides:
    """How wide the edges of a nine-slice picture are on the canvas; none where it has none."""
    wide = slot.insets if slot.edges is None else slot.edges
    left, top, right, bottom = (w if has else 0 for w, has in zip(wide, slot.insets, strict=True))
    return left, top, right, bottom


def cut(image: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """The part of a skin (H, W, 3) in each slot, by name. Raises UserError."""
    check_size(image, layout)
    return {slot.name: slot.box.of(image) for slot in layout.slots}


def pressed(key: np.ndarray) -> np.ndarray:
    """The look of a key that is held down."""
    return np.rint(key * PRESSED).astype(np.uint8)


def write_parts(image: np.ndarray, layout: Layout, folder: Path, with_pressed: bool) -> list[Path]:
    """Write what `cut` finds, with the pressed look of each key if asked; all or nothing.

    Composed again, the parts give the same bytes. Raises UserError when `folder` holds something.
    """
    check_empty(folder, "parts")
    keys = {slot.name for slot in layout.keys}
    with write_folder(folder) as written:
        for name, part in cut(image, layout).items():
            save_image(written / f"{name}.png", part)
            if with_pressed and name in keys:
                save_image(written / f"{name}-pressed.png", pressed(part))
    return sorted(folder.glob("*.png"))


FITS = {"stretch": stretch, "cover": cover, "contain": contain, "nine-slice": nine_slice}

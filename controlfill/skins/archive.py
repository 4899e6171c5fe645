"""What all theme formats share: tiles of a skin, its colours, and archives handled with care."""

from __future__ import annotations

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import yaml
from PIL import Image

from controlfill.errors import UserError
from controlfill.images import open_image
from controlfill.options import check_values
from controlfill.skins.compose import pressed
from controlfill.skins.draw import draw_labels, key_masks, readable_on
from controlfill.skins.layout import Box, Layout, Size, Slot, read_layout

OWN = "controlfill.yaml"
# Width of a phone in the points (dp) that the formats count in.
POINTS = 390
# The most that is read of a theme: bytes in all, files, and pixels along a side of a picture.
LONGEST, MOST, WIDEST = 128 << 20, 1000, 8192
DATE = (2026, 1, 1, 0, 0, 0)
# What the decoders of zip raise for damaged, encrypted or foreign archives.
BROKEN = (
    OSError, zipfile.BadZipFile, RuntimeError, zlib.error, lzma.LZMAError, EOFError, ValueError,
)  # fmt: skip
Colour = tuple[int, int, int]
Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Tones:
    """Median colours of a skin: of its kinds of keys, of what lies above them and around them."""

    key: Colour
    function: Colour
    space: Colour
    enter: Colour
    bar: Colour
    ground: Colour


def find_rows(layout: Layout) -> tuple[Slot, list[list[Slot]]]:
    """The region that holds the keys, and those row by row. Raises UserError."""
    keys = [slot for slot in layout.keys if slot.role != "candidate"]
    panels = [
        region
        for region in layout.slots
        if region.role == "region" and any(key.box.inside(region.box) for key in keys)
    ]
    if len(panels) != 1:
        raise UserError(
            f"layout {layout.name} has {len(panels)} panels of keys; a theme takes one, as "
            "qwerty-26 and t9 have"
        )
    outside = [key.name for key in keys if not key.box.inside(panels[0].box)]
    if outside:
        raise UserError(
            f"layout {layout.name}: key {outside[0]} lies outside of {panels[0].name}; all keys of "
            "a theme lie in one panel"
        )
    heights = sorted({key.box.top for key in keys})
    rows = [sorted((k for k in keys if k.box.top == h), key=lambda k: k.box.left) for h in heights]
    check_rows(layout, rows)
    return panels[0], rows


def check_rows(layout: Layout, rows: list[list[Slot]]) -> None:
    """Raise UserError where keys overlap, so that there are no rows of them."""
    beside = [pair for row in rows for pair in pairwise(row)]
    below = [(a, b) for upper, lower in pairwise(rows) for a in upper for b in lower[:1]]
    bad = [(a, b) for a, b in beside if a.box.right > b.box.left]
    bad += [(a, b) for a, b in below if a.box.bottom > b.box.top]
    if bad:
        raise UserError(
            f"layout {layout.name}: keys {bad[0][0].name} and {bad[0][1].name} overlap; the keys "
            "of a theme lie in rows, side by side"
        )


def place_tiles(layout: Layout, panel: Slot, rows: list[list[Slot]]) -> dict[str, Box]:
    """The tile of each key: to the middle of gaps, and to the borders of the panel."""
    tiles = {}
    spans = [(row[0].box.top, max(key.box.bottom for key in row)) for row in rows]
    down = between(spans, panel.box.top, panel.box.bottom)
    for row, (top, bottom) in zip(rows, down, strict=True):
        edges = [(key.box.left, key.box.right) for key in row]
        for key, (left, right) in zip(row, between(edges, 0, layout.size[1]), strict=True):
            tiles[key.name] = Box(left, top, right, bottom)
    return tiles


def between(edges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Spans from `start` to `end` that meet in the middle of the gaps of `edges`."""
    cuts = [(a[1] + b[0]) // 2 for a, b in pairwise(edges)]
    return list(zip([start, *cuts], [*cuts, end], strict=True))


def press_keys(image: np.ndarray, layout: Layout) -> np.ndarray:
    """The skin with all keys held down."""
    held = np.any(key_masks(layout.keys, layout.size), axis=0)
    return np.where(held[..., None], pressed(image), image)


def ground_of(image: np.ndarray, layout: Layout) -> np.ndarray:
    """The skin as if it had no keys: what lies around them, blurred into their places."""
    known = np.ones((*layout.size, 1), np.float32)
    for key in layout.keys:
        key.box.of(known)[:] = 0
    # A normalised convolution; a quarter of a key's height reaches its middle from both sides.
    sigma = max(1.0, max(min(key.box.size) for key in layout.keys) / 4)
    paint = cv2.GaussianBlur(image * known, (0, 0), sigma)
    weight = cv2.GaussianBlur(known, (0, 0), sigma)[..., None]
    some = np.median(image.reshape(-1, 3), axis=0)
    spread = (paint + 1e-4 * some) / (weight + 1e-4)
    return np.where(known > 0, image, np.rint(spread)).astype(np.uint8)


def preview(image: np.ndarray, layout: Layout, labels: bool) -> np.ndarray:
    """The skin as it will look; without labels where the system's fonts lack a sign of them."""
    try:
        return draw_labels(image, layout) if labels else image
    except UserError:
        return image


def tones_of(image: np.ndarray, layout: Layout, panel: Slot) -> Tones:
    """The median colours of a skin (H, W, 3)."""
    keys = [slot for slot in layout.keys if slot.role != "candidate"]
    some = {role: [k for k in keys if k.role == role] for role in ("letter", "function", "space")}
    around = np.ones(layout.size, bool)
    for key in layout.keys:
        key.box.of(around)[:] = False
    here = panel.box.of(around)
    return Tones(
        key=median(image, some["letter"] or keys),
        function=median(image, some["function"] or keys),
        space=median(image, some["space"] or keys),
        enter=median(image, [k for k in keys if k.name == "enter"] or some["function"] or keys),
        bar=middle(image[: max(1, panel.box.top)].reshape(-1, 3)),
        ground=middle(panel.box.of(image)[here] if here.any() else image.reshape(-1, 3)),
    )


def median(image: np.ndarray, keys: Sequence[Slot]) -> Colour:
    """The median colour of `keys`, their borders left out."""
    boxes = [key.box.inset(0.15).of(image).reshape(-1, 3) for key in keys]
    return middle(np.concatenate(boxes))


def middle(pixels: np.ndarray) -> Colour:
    """The median of each channel of `pixels` (N, 3)."""
    red, green, blue = (int(value) for value in np.median(pixels, axis=0))
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """Near-black or near-white, whichever is read better on `colour`."""
    return readable_on(np.array([[colour]], np.uint8))


def label_size(key: Slot, scale: float) -> float:
    """The size of a key's label in points: 0.4 of its height, less for long ones."""
    return round(0.4 * key.box.size[0] * scale * min(1, 4 / max(1, len(key.label))), 1)


def as_hex(colour: Iterable[float], mark: str = "#") -> str:
    """An RGB colour as six hexadecimal digits behind `mark`."""
    return mark + bytes(int(value) for value in colour).hex().upper()


def theme_name(out: Path, suffix: str) -> str:
    """The name of a theme that is written to `out`, of letters, digits, - and _."""
    stem = out.name.removesuffix(suffix) if out.name.endswith(suffix) else out.stem
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "skin"


def layout_words(layout: Layout) -> dict[str, Any]:
    """The layout as the words of a layout file, every slot with its rectangle."""
    regions = [
        {**slot_words(slot), "name": slot.name} for slot in layout.slots if slot.role == "region"
    ]
    regions[0]["keys"] = [
        {**slot_words(slot), "key": slot.name, "label": slot.label, "role": slot.role}
        for slot in layout.keys
    ]
    return {"name": layout.name, "canvas": list(layout.size[::-1]), "regions": regions}


def slot_words(slot: Slot) -> dict[str, Any]:
    """What regions and keys share."""
    rect = [slot.box.left, slot.box.top, slot.box.size[1], slot.box.size[0]]
    words = {"rect": rect, "part": slot.part, "z": slot.z, "fit": slot.fit}
    borders = {"insets": slot.insets, "edges": slot.edges}
    return words | {name: list(sides) for name, sides in borders.items() if sides}


def zipped(files: Files) -> bytes:
    """An archive of `files`; the same ones always give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def dump(words: dict[str, Any]) -> bytes:
    """`words` as YAML without anchors."""
    text = yaml.dump(words, Dumper=Unshared, allow_unicode=True, sort_keys=False)
    return text.encode()


class Unshared(yaml.SafeDumper):
    """A dumper that writes the same thing twice, not a reference to it."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


class NoReference:
    """A loader that refuses references, a few of which can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, if it is no reference."""
        if self.check_event(yaml.AliasEvent):  # pyright: ignore[reportAttributeAccessIssue]
            raise yaml.YAMLError("a reference (*name) is not expected here")
        return super().compose_node(parent, index)  # pyright: ignore[reportAttributeAccessIssue]


class Plain(NoReference, yaml.SafeLoader):
    """Words, numbers and what they are in."""


class Text(NoReference, yaml.BaseLoader):
    """All of it as text, as Android's apps read it."""


def read_yaml(data: bytes, where: str, loader: Any = Plain) -> Any:
    """The words of a YAML file. Raises UserError."""
    try:
        return yaml.load(data.decode(), loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is no readable YAML: {' '.join(str(error).split())}") from error


def as_shape(cls: type[Any], words: Any, where: str) -> Any:
    """`words` as a dataclass `cls`. Raises UserError that names `where` and the fault."""
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: expected names with values, found {str(words)[:60]!r}")
    try:
        return cls(**check_values(cls, words, where))
    except TypeError as error:
        raise UserError(f"{where}: {str(error).rpartition(': ')[2]} is missing") from error
    except UserError as error:
        # What was found can be a whole keyboard.
        raise UserError(str(error)[:300]) from error


def open_files(path: Path) -> Files:
    """All files of an archive, or of a folder, by their names in it.

    Raises UserError for broken archives, for names that lead out of them, and for what is far too
    much for a theme.
    """
    try:
        if path.is_dir():
            return checked_files(path, list(folder_files(path)))
        with zipfile.ZipFile(path) as archive:
            entries = [(e.filename, e.file_size) for e in archive.infolist() if not e.is_dir()]
            check_entries(path, entries)
            return {name: archive.read(name) for name, _ in entries}
    except BROKEN as error:
        raise UserError(f"{path} is no theme: {' '.join(str(error).split())}") from error


def folder_files(folder: Path) -> Iterator[Path]:
    """The files below `folder`; none of what links to elsewhere."""
    root = folder.resolve()
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and root in p.resolve().parents)


def checked_files(folder: Path, paths: list[Path]) -> Files:
    """The bytes of `paths` by their names within `folder`. Raises UserError."""
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    check_entries(folder, [(name, path.stat().st_size) for name, path in names.items()])
    return {name: path.read_bytes() for name, path in names.items()}


def check_entries(path: Path, entries: list[tuple[str, int]]) -> None:
    """Raise UserError for names that lead out of a theme, and for too many or too large files."""
    for name, _ in entries:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise UserError(f"{path} holds {name!r}, which leads out of it; it is not opened")
    if len(entries) > MOST:
        raise UserError(f"{path} holds {len(entries)} files; a theme has at most {MOST}")
    if sum(size for _, size in entries) > LONGEST:
        raise UserError(f"{path} holds more than {LONGEST >> 20} MiB; no theme does")


def part_of(files: Files, name: str, where: Path) -> bytes:
    """One file of a theme. Raises UserError where it is missing."""
    if name not in files:
        raise UserError(f"{where} holds no {name}; only themes that controlfill wrote are opened")
    return files[name]


def own_layout(files: Files, name: str, where: Path) -> Layout:
    """The layout that travels in a theme. Raises UserError."""
    source = f"{where}/{name}"
    words = read_yaml(part_of(files, name, where), source)
    try:
        return read_layout(words, source)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{source} describes no layout: {error}") from error


def own_skin(files: Files, name: str, size: Size, where: Path) -> np.ndarray:
    """The picture (H, W, 3) of that `size` that travels in a theme. Raises UserError."""
    data, said = part_of(files, name, where), f"{where}: {name}"
    height, width = picture_size(data, said)
    if (height, width) != size:
        wanted = f"{size[1]}x{size[0]}"
        raise UserError(f"{said} is {width}x{height}; the layout beside it needs {wanted}")
    try:
        return open_image(data).rgb
    except UserError as error:
        raise UserError(f"{said}: {error}") from error


def picture_size(data: bytes, where: str) -> Size:
    """Height and width of a picture, read from its first bytes. Raises UserError."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
    except Exception as error:  # decoders raise anything for damaged bytes
        raise UserError(f"{where} is no picture; PNG, JPEG or WebP would be") from error
    if max(width, height) > WIDEST:
        raise UserError(f"{where} is {width}x{height}; at most {WIDEST} a side are opened")
    return height, width

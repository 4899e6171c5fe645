"""The layout: one YAML file from which hints, labels, masks and parts of a keyboard follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from controlfill.errors import UserError
from controlfill.options import check_values, read_size

SHIPPED = Path(__file__).parent.parent / "assets" / "layouts"
Role = Literal["letter", "function", "space", "candidate", "region"]
Fit = Literal["stretch", "cover", "contain", "nine-slice"]
Size = tuple[int, int]
Sides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; its right and bottom edges lie outside of it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    @property
    def middle(self) -> tuple[float, float]:
        """Its middle, (x, y)."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def scaled(self, down: float, right: float) -> Box:
        """The box on a canvas of another size; neighbours stay neighbours."""
        return Box(
            round(self.left * right),
            round(self.top * down),
            round(self.right * right),
            round(self.bottom * down),
        )

    def inside(self, other: Box) -> bool:
        """Whether all of it lies in `other`."""
        return (
            other.left <= self.left < self.right <= other.right
            and other.top <= self.top < self.bottom <= other.bottom
        )

    def clipped(self, size: Size) -> Box:
        """The part of the box on a canvas of `size` (height, width); it may be empty."""
        return Box(
            max(0, self.left), max(0, self.top), min(size[1], self.right), min(size[0], self.bottom)
        )

    def inset(self, share: float) -> Box:
        """The box without `share` of its shorter side at every edge."""
        by = round(share * min(self.size))
        return Box(self.left + by, self.top + by, self.right - by, self.bottom - by)

    def corners(self) -> list[list[int]]:
        """The polygon of its four corners, (x, y) clockwise from the top left."""
        return [
            [self.left, self.top],
            [self.right, self.top],
            [self.right, self.bottom],
            [self.left, self.bottom],
        ]

    def of(self, picture: Any) -> Any:
        """Its part of a picture (H, W, ...), a view."""
        return picture[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place on the canvas that one picture fills: a region such as a panel, or a key.

    `part` names the kind of picture, which keys may share; `label` is the text on it, if any.
    `insets` are the borders of a nine-slice picture, in its own pixels: left, top, right, bottom;
    `edges` are how wide they are drawn on the canvas, as wide as in the picture unless said.
    """

    name: str
    box: Box
    part: str
    role: Role = "letter"
    label: str = ""
    z: int = 1
    fit: Fit = "stretch"
    insets: Sides = (0, 0, 0, 0)
    edges: Sides | None = None
    line: int = field(default=0, compare=False)

    def scaled(self, down: float, right: float) -> Slot:
        """The slot on a canvas of another size, the borders of its picture no exception."""
        box = self.box.scaled(down, right)
        if not any(self.insets):
            return replace(self, box=box)
        west, north, east, south = self.insets if self.edges is None else self.edges
        edges = round(west * right), round(north * down), round(east * right), round(south * down)
        return replace(self, box=box, edges=edges)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All slots of a keyboard on a canvas of `size` (height, width), the lowest first."""

    name: str
    size: Size
    slots: tuple[Slot, ...]

    @property
    def keys(self) -> list[Slot]:
        """The slots that are keys."""
        return [slot for slot in self.slots if slot.role != "region"]

    @property
    def labelled(self) -> list[Slot]:
        """The slots with a text."""
        return [slot for slot in self.slots if slot.label]

    def at(self, size: Size) -> Layout:
        """The layout on a canvas of `size` (height, width)."""
        down, right = size[0] / self.size[0], size[1] / self.size[1]
        return replace(self, size=size, slots=tuple(s.scaled(down, right) for s in self.slots))


@dataclass(frozen=True, kw_only=True)
class KeyWords:
    """What a layout file may say of a key."""

    key: str
    label: str | None = None
    role: Role = "letter"
    part: str | None = None
    width: float = 1.0
    rect: tuple[int, int, int, int] | None = None
    z: int = 1
    fit: Fit = "stretch"
    insets: Sides = (0, 0, 0, 0)
    edges: Sides | None = None


@dataclass(frozen=True, kw_only=True)
class RegionWords:
    """What a layout file may say of a region."""

    name: str
    rect: tuple[int, int, int, int]
    part: str | None = None
    rows: list[Any] | None = None
    keys: list[Any] | None = None
    gap: int = 0
    margin: int = 0
    z: int = 0
    fit: Fit = "stretch"
    insets: Sides = (0, 0, 0, 0)
    edges: Sides | None = None


@dataclass(frozen=True, kw_only=True)
class LayoutWords:
    """What a layout file may say."""

    name: str
    canvas: tuple[int, int]
    regions: list[Any]


def open_layout(name: str) -> Layout:
    """A layout that ships, or that in a YAML file. Raises UserError that names line and fault."""
    file = SHIPPED / f"{name}.yaml" if name in layouts() else Path(name)
    try:
        words = yaml.load(file.read_text("utf-8"), Loader=Numbered)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"no layout is called {name!r}; there are {', '.join(layouts())}, or a YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    return read_layout(words, str(file))


def sized_layout(name: str, size: str | None) -> Layout:
    """A layout on a canvas of WIDTHxHEIGHT, or its own. Raises UserError."""
    layout = open_layout(name)
    return layout.at(read_size("size", size)) if size else layout


def layouts() -> list[str]:
    """The names of the layouts that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_layout(words: Any, file: str) -> Layout:
    """The layout that a file's `words` describe. Raises UserError."""
    whole = read(LayoutWords, words, file)
    width, height = whole.canvas
    canvas, slots = Box(0, 0, width, height), []
    for entry in whole.regions:
        region = read(RegionWords, entry, file)
        found = [region_slot(region), *key_slots(region, file)]
        for slot in found:
            check_box(slot, canvas, f"{file} line {slot.line or line_of(entry)}")
        slots += found
    check_names(slots, file)
    return Layout(
        name=whole.name, size=(height, width), slots=tuple(sorted(slots, key=lambda s: s.z))
    )


def check_box(slot: Slot, canvas: Box, where: str) -> None:
    """Raise UserError when a slot is empty or stands out of the canvas."""
    if not slot.box.inside(canvas):
        b, (height, width) = slot.box, canvas.size
        raise UserError(
            f"{where}: {slot.name} reaches from {b.left}, {b.top} to {b.right}, {b.bottom}; it "
            f"needs room within the canvas of {width}x{height}"
        )


def check_names(slots: Sequence[Slot], file: str) -> None:
    """Raise UserError where two slots have one name, or one that can't be that of a file."""
    for slot in slots:
        for name in (slot.name, slot.part):
            if Path(name).name != name or "\\" in name:
                where = f"{file} line {slot.line}" if slot.line else file
                raise UserError(
                    f"{where}: {name!r} can't be the name of a picture; use a word such as slash, "
                    "with what the key says as its label"
                )
    names = [slot.name for slot in slots]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{file}: {twice[0]!r} is the name of two slots; each needs its own")


def region_slot(region: RegionWords) -> Slot:
    """The slot of the region itself."""
    return Slot(
        name=region.name, box=box_of(region.rect), part=region.part or region.name,
        role="region", z=region.z, fit=region.fit, insets=region.insets, edges=region.edges,
    )  # fmt: skip


def key_slots(region: RegionWords, file: str) -> Iterator[Slot]:
    """The keys of a region: those placed by their rectangles, and those in rows."""
    for entry in region.keys or []:
        key = read(KeyWords, entry, file)
        if key.rect is None:
            raise UserError(f"{file} line {line_of(entry)}: key {key.key!r} has no rect")
        yield key_slot(key, box_of(key.rect), line_of(entry))
    rows = region.rows or []
    inner = box_of(region.rect)
    top, bottom = inner.top + region.margin, inner.bottom - region.margin
    step = (bottom - top + region.gap) / max(1, len(rows))
    for number, row in enumerate(rows):
        upper, lower = top + number * step, top + (number + 1) * step - region.gap
        yield from row_slots(region, row, (round(upper), round(lower)), file)


def row_slots(region: RegionWords, row: Any, span: tuple[int, int], file: str) -> Iterator[Slot]:
    """The keys of one row between the heights of `span`, side by side in their shares."""
    words = [read(KeyWords, as_key(entry), file) for entry in row]
    lines = [line_of(entry) if isinstance(entry, dict) else 0 for entry in row]
    inner = box_of(region.rect)
    left, right = inner.left + region.margin, inner.right - region.margin
    unit = (right - left + region.gap) / sum(key.width for key in words)
    at = float(left)
    for key, line in zip(words, lines, strict=True):
        end = at + key.width * unit
        if key.key != "space-between":
            yield key_slot(key, Box(round(at), span[0], round(end - region.gap), span[1]), line)
        at = end


def as_key(entry: Any) -> Any:
    """`q` is short for a key of that name and label; {space: 0.5} for nothing of that width."""
    if isinstance(entry, str | int):
        return {"key": str(entry), "label": str(entry).upper()}
    if isinstance(entry, dict) and set(entry) - {LINE} == {"space"}:
        return {"key": "space-between", "width": entry["space"], LINE: entry[LINE]}
    return entry


def key_slot(key: KeyWords, box: Box, line: int) -> Slot:
    """The slot of a key."""
    usual = {"letter": "key", "space": "space-key"}
    return Slot(
        name=key.key, box=box, part=key.part or usual.get(key.role, f"{key.role}-key"),
        role=key.role, label=key.key if key.label is None else key.label, z=key.z, fit=key.fit,
        insets=key.insets, edges=key.edges, line=line,
    )  # fmt: skip


def box_of(rect: tuple[int, int, int, int]) -> Box:
    """The box of LEFT, TOP, WIDTH, HEIGHT."""
    left, top, width, height = rect
    return Box(left, top, left + width, top + height)


LINE = "__line__"


class Numbered(yaml.SafeLoader):
    """A loader whose mappings know their lines."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """The mapping with its line beside its keys."""
        return {**super().construct_mapping(node, deep=True), LINE: node.start_mark.line + 1}


def line_of(words: Any) -> int:
    """The line of a mapping."""
    return words.get(LINE, 1) if isinstance(words, dict) else 1


def read(cls: type[Any], words: Any, file: str) -> Any:
    """`words` as a `cls`. Raises UserError that names file and line."""
    where = f"{file} line {line_of(words)}"
    if not isinstance(words, dict):
        raise UserError(f"{where}: expected `name: value` lines, found {words!r}")
    values = check_values(cls, {k: v for k, v in words.items() if k != LINE}, where)
    try:
        return cls(**values)
    except TypeError as error:
        missing = str(error).rpartition(": ")[2]
        raise UserError(f"{where}: {missing} is missing") from error

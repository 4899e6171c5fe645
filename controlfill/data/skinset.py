"""Training data of skins, with hints from their layout, and of any pictures, with Canny edges."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from controlfill.data.captions import Changed, dressed, read_lines
from controlfill.data.geometry import Geometry
from controlfill.data.palette import describe
from controlfill.data.prepare import (
    Prepared,
    Report,
    WithHints,
    edges,
    encode_image,
    open_to_write,
    say_nothing,
    write_table,
)
from controlfill.data.sample import Sample, Source
from controlfill.data.sources import WORLD_PREFIX
from controlfill.data.tables import BOXES, TABLES, TEXTS, Columns
from controlfill.errors import UserError
from controlfill.files import check_empty, write_folder, write_whole
from controlfill.images import SUFFIXES, as_photo, resize
from controlfill.options import DataOptions, PrepareTableOptions, read_size, shared_values
from controlfill.options.skinset import PrepareCannyOptions, PrepareSkinsOptions
from controlfill.skins.compose import ASKEW, compose, find_parts
from controlfill.skins.draw import draw_labels, edge_hint, glyph_hint, label_boxes
from controlfill.skins.layout import Box, Layout, Size, sized_layout

# Where a label is looked for on a finished picture: its key without this share of its short side.
AROUND = 0.1
# Share of a key, each way, that its label usually stays within.
USUAL = 0.6
Labels = Sequence[tuple[str | None, list[list[int]]]]


@dataclass(frozen=True, kw_only=True)
class Skin:
    """A skin as it goes into the data: `image` (H, W, 3), wordings, labels, and what is odd."""

    image: np.ndarray
    words: list[str]
    labels: Labels
    notes: list[str]


def prepare_skins(options: PrepareSkinsOptions, report: Report = say_nothing) -> Changed:
    """`controlfill prepare skins`: all of it or nothing."""
    layout = sized_layout(options.layout, options.size)
    if options.hint == "glyphs" and not options.text:
        raise UserError("--hint glyphs tells of labels that --no_text leaves out; give one of them")
    entries = find_skins(options.skins, layout)
    check_empty(options.out, "training data")
    if options.text:
        label_boxes(layout, options.font)  # a font that lacks signs is told once, not for each skin
    hint = encode_image(HINTS[options.hint](layout, options.font), "png")
    rows: list[dict[str, Any]] = []
    skipped, notes = [], []
    with write_folder(options.out) as folder:
        for number, entry in enumerate(entries):
            report("skins", number, len(entries))
            try:
                skin = open_skin(entry, layout, options)
            except UserError as error:
                skipped.append(f"{entry.name}: {error}")
                continue
            rows.append(write_skin(folder, len(rows), skin, hint, options))
            notes += [f"{entry.name}: {note}" for note in skin.notes]
        report("skins", len(entries), len(entries))
        if not rows:
            raise UserError(f"none of the {len(entries)} skins can be used: {skipped[0]}")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / TABLES[0]).write_text("".join(lines), "utf-8")
    return Changed(folder=options.out, samples=len(rows), skipped=skipped, notes=notes)


def find_skins(folder: Path, layout: Layout) -> list[Path]:
    """The pictures and the folders in `folder`, in order. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that holds skins")
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in there if path.is_dir() or path.suffix.lower() in SUFFIXES]
    if not found:
        raise UserError(f"{folder} holds no skins; pictures or folders of element images would be")
    parts = {slot.part for slot in layout.slots} & {path.stem for path in found if path.is_file()}
    if len(parts) > 1:
        raise UserError(
            f"{folder} holds {', '.join(sorted(parts))}, the parts of one skin; give the folder "
            "that this one lies in"
        )
    return found


def open_skin(entry: Path, layout: Layout, options: PrepareSkinsOptions) -> Skin:
    """The skin in a folder of parts or in a picture, with its labels. Raises UserError."""
    if entry.is_dir():
        image, notes = composed(entry, layout, options.incomplete)
        own = read_lines(entry / "caption.txt")
    else:
        image, notes = fitted(as_photo(entry).rgb, layout.size), []
        own = read_lines(entry.with_suffix(".txt"))
    if options.caption not in ("file", "template"):
        own = [options.caption]
    elif options.caption == "template" or not own:
        own = [describe(image, layout)]
    carries = not entry.is_dir() and options.picture_texts != "none"
    if carries:
        labels = key_labels(layout, options.picture_texts == "layout")
    elif options.text:
        image = draw_labels(image, layout, options.font)
        labels = [(text, box.corners()) for text, box in label_boxes(layout, options.font)]
    else:
        labels = []
    words = [dressed(line, options) for line in own]
    return Skin(image=image, words=words, labels=labels, notes=notes)


def composed(folder: Path, layout: Layout, incomplete: bool) -> tuple[np.ndarray, list[str]]:
    """The skin that the parts in `folder` make, and what they leave to be desired.

    Raises UserError where parts are missing, unless that is allowed.
    """
    files = find_parts(folder)
    lacking = Counter(s.part for s in layout.slots if not {s.name, s.part} & files.keys())
    made = compose(layout, folder)
    if lacking and not incomplete:
        parts = ", ".join(f"{part} (for {count})" for part, count in lacking.items())
        raise UserError(f"it lacks {parts} of layout {layout.name}; --incomplete keeps it")
    return made.image, made.reports


def fitted(image: np.ndarray, size: Size) -> np.ndarray:
    """A finished skin at `size`. Raises UserError where its proportions are other ones."""
    (height, width), (wanted, broad) = image.shape[:2], size
    ratio = (width / height) / (broad / wanted)
    if max(ratio, 1 / ratio) > 1 + ASKEW:
        raise UserError(
            f"it is {width}x{height}, the canvas {broad}x{wanted}; its keys would not lie where "
            "the layout's do"
        )
    return resize(image, size)


def key_labels(layout: Layout, known: bool) -> Labels:
    """The labels of a finished picture, whose ink lies somewhere on their keys.

    Unknown ones count nothing in the loss, so their boxes are no larger than labels usually are:
    keys without what they look like would not be learned.
    """
    if known:
        return [(slot.label, slot.box.inset(AROUND).corners()) for slot in layout.labelled]
    return [(None, middle(slot.box, USUAL).corners()) for slot in layout.labelled]


def middle(box: Box, share: float) -> Box:
    """The middle of a box, `share` of it each way."""
    down, across = (round(side * (1 - share) / 2) for side in box.size)
    return Box(box.left + across, box.top + down, box.right - across, box.bottom - down)


def write_skin(
    folder: Path, number: int, skin: Skin, hint: bytes, options: PrepareSkinsOptions
) -> dict[str, Any]:
    """Write the pictures of a skin; returns its row."""
    columns = Columns()
    name = "shared" if options.shared_hint else f"{number:06d}"
    row = {
        columns.image: f"images/{number:06d}.{options.image_format}",
        columns.hint: f"conditioning_images/{name}.png",
        columns.caption: skin.words[0] if len(skin.words) == 1 else skin.words,
        BOXES: [box for _, box in skin.labels],
        TEXTS: [text for text, _ in skin.labels],
    }
    write_whole(folder / row[columns.image], encode_image(skin.image, options.image_format))
    if number == 0 or not options.shared_hint:
        write_whole(folder / row[columns.hint], hint)
    return row


class Cut:
    """A source whose pictures are cut from the middle to `size`, if any, and have no hints."""

    def __init__(self, source: Source, size: Size | None) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = replace(self.source[index], hint=None, mask=None)
        if self.size is None:
            return sample
        cut = Geometry(size=self.size, place=(0.5, 0.5), flip=False)
        height, width = sample.image.shape[:2]
        labels = cut.of_labels(sample.labels, (height, width))
        return replace(sample, image=cut.of_image(sample.image), labels=labels)


def prepare_canny(options: PrepareCannyOptions, report: Report = say_nothing) -> Prepared:
    """`controlfill prepare canny`."""
    if options.low > options.high:
        raise UserError(f"--low {options.low} is above --high {options.high}")
    size = square_size(options.size)
    shared = shared_values(options, DataOptions)
    if size:
        shared["image_size"] = max(size)
    elif not options.data.startswith(WORLD_PREFIX):
        shared["crop"] = "patch"  # pictures of which patches are cut are read whole
    asked = PrepareTableOptions(
        **shared, data=options.data, out=options.out, count=options.count, make_hint="none"
    )
    draw = partial(edges, low=options.low, high=options.high)
    source = WithHints(Cut(open_to_write(asked), size), draw)
    return write_table(source, options.out, options.image_format, report)


def square_size(text: str | None) -> Size | None:
    """(height, width) of WIDTHxHEIGHT, or of one number. Raises UserError."""
    if text is None:
        return None
    return read_size("size", f"{text}x{text}" if text.strip().isdigit() else text)


def plain_edges(layout: Layout, font: Path | None) -> np.ndarray:
    """The outlines of a layout, which need no font."""
    return edge_hint(layout)


def with_glyphs(layout: Layout, font: Path | None) -> np.ndarray:
    """The outlines of a layout and its labels."""
    return glyph_hint(layout, font=font)


HINTS = {"edges": plain_edges, "glyphs": with_glyphs}

"""Measure a folder of skins: report.json, and a page with the worst of them first."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlfill.errors import UserError
from controlfill.evaluation.adherence import (
    LEAST_KEY,
    adherence,
    normalised,
    plain_skin,
    shuffled_layout,
)
from controlfill.evaluation.report import figure, page, settings_part, skipped_lines, table
from controlfill.evaluation.texts import Ocr, clean_texts, left_out, measure_texts, open_ocr
from controlfill.files import write_json, write_whole
from controlfill.images import SUFFIXES, as_photo, within
from controlfill.inference.pipeline import Report
from controlfill.inference.skins import LABELLED, settings_of
from controlfill.options.skin_generate import SkinReportOptions
from controlfill.skins.draw import check_size
from controlfill.skins.layout import Layout, sized_layout

USUAL = "qwerty-26"
RED, WHITE = (230, 0, 38), (255, 255, 255)
SHOWN_SIDE = 400
# Pictures on the page, the worst ones; all of them are in the JSON.
SHOWN = 60
# Settings of generated pictures that tell what was asked for.
TOLD = (
    "prompt",
    "negative_prompt",
    "seed",
    "hint",
    "labels",
    "control",
    "base",
    "num_inference_steps",
)
Figures = dict[str, float]
STYLE = """
.skin { border-top: 1px solid #eee; padding: .6rem 0; display: flex; gap: 1rem; flex-wrap: wrap }
.skin table { font-size: 13px; margin: 0 } .skin p { font-size: 13px; flex-basis: 100%; margin: 0 }
.skin td, .skin th { padding: .1rem .6rem } figure img { image-rendering: auto }
tr.aside { color: #888 }
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One skin: what it scored, beside its floor and its ceiling.

    `image` (h, w, 3) is small, to be shown, `off` the keys that don't fit, `misread` by reader each
    label that was read wrong with what was read.
    """

    file: str
    image: np.ndarray
    layout: Layout
    told: dict[str, Any]
    figures: Figures
    floor: Figures
    ceiling: Figures
    off: list[str]
    misread: dict[str, dict[str, str]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Plain values for the JSON."""
        height, width = self.layout.size
        return {
            "file": self.file, "layout": self.layout.name, "size": f"{width}x{height}",
            "settings": self.told, "figures": self.figures, "floor": self.floor,
            "ceiling": self.ceiling, "keys_off": self.off, "misread": self.misread,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SkinReport:
    """All that was measured, the worst first; which pictures were skipped, what was left out."""

    settings: dict[str, Any]
    skins: list[Measured]
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def means(self) -> dict[str, Figures]:
        """Means over the pictures that have a figure: of it, its floor, ceiling, and how far it is
        on the way between them.
        """
        return {name: mean_of(name, self.skins) for name in names_of(self.skins)}

    def summary(self) -> dict[str, Any]:
        """Plain values for the JSON."""
        return {
            "settings": self.settings, "pictures": len(self.skins), "means": self.means(),
            "not_counting": sorted(aside(names_of(self.skins), self.settings["loss_ocr"])),
            "notes": self.notes, "skipped": self.skipped,
            "skins": [skin.summary() for skin in self.skins],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The means, a line for each figure."""
        outside = aside(names_of(self.skins), self.settings["loss_ocr"])
        for name, mean in self.means().items():
            beside = "".join(f", {k} {mean[k]:.2f}" for k in ("floor", "ceiling") if k in mean)
            mark = " (in the loss, does not count)" if name in outside else ""
            yield f"{title_of(name)} {mean['mean']:.2f}{beside}{mark}"


def measure_skins(options: SkinReportOptions, report: Report) -> SkinReport:
    """Measure all skins of a folder. Raises UserError when there is none to be measured."""
    files = find_skins(options.skins)
    readers, notes = open_readers(options)
    skins, skipped = [], []
    for number, file in enumerate(files, 1):
        try:
            skins.append(measure_skin(file, options, readers, notes))
        except UserError as reason:
            skipped.append(str(reason) if str(file) in str(reason) else f"{file.name}: {reason}")
        report("skins", number, len(files))
    if not skins:
        raise UserError(f"none of the pictures in {options.skins} can be measured: {skipped[0]}")
    skins.sort(key=lambda skin: goodness(skin, options.loss_ocr))
    settings = options.as_dict()
    return SkinReport(
        settings=settings, skins=skins, skipped=skipped, notes=list(dict.fromkeys(notes))
    )


def find_skins(folder: Path) -> list[Path]:
    """The pictures in `folder`, not those below it, which are parts. Raises UserError.

    What is another's picture with drawn labels counts as one with it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one with pictures of skins")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    stems = {path.stem for path in found}
    files = [p for p in found if not (p.stem.endswith(LABELLED) and bare_name(p) in stems)]
    if not files:
        raise UserError(f"{folder} holds no pictures; `controlfill skin generate` makes some")
    return files


def bare_name(file: Path) -> str:
    """The name of the skin whose labelled picture `file` is."""
    return file.stem.removesuffix(LABELLED)


def open_readers(options: SkinReportOptions) -> tuple[list[Ocr], list[str]]:
    """The text readers asked for, and what is to be said of those that are not there."""
    readers, notes = [], []
    for name in options.ocr:
        try:
            readers.append(open_ocr(name))
        except UserError as reason:
            notes.append(f"texts are not read by {name}: {reason}")
    return readers, notes


def measure_skin(
    file: Path, options: SkinReportOptions, readers: Sequence[Ocr], notes: list[str]
) -> Measured:
    """Measure one picture; what can't be measured of it is added to `notes`. Raises UserError."""
    settings, image = settings_of(file), as_photo(file).rgb
    layout = find_layout(options, settings)
    check_size(image, layout)
    own, other = adherence(image, layout), shuffled_layout(layout)
    figures, floor = own.figures(), adherence(image, other, layout).figures()
    ceiling, misread = dict(clean_figures(layout)), {}
    try:
        legible = with_labels(file, image, options.labels or settings.get("labels", "in-picture"))
        if legible is not None:
            texts = measure_texts(legible, layout, options.font, readers)
            figures |= texts[0]
            floor |= texts[1]
            ceiling |= clean_texts(layout, options.font, tuple(readers))
            misread = texts[2]
            notes += left_out(layout, options.font, readers)
    except UserError as reason:
        notes.append(f"texts are left out: {reason}")
    return Measured(
        file=file.name, image=within(image, SHOWN_SIDE), layout=layout, figures=figures,
        floor=floor, ceiling=ceiling,
        told={k: settings[k] for k in TOLD if settings.get(k) not in (None, "")},
        off=[name for name, fits in own.fit.fits.items() if not fits], misread=misread,
    )  # fmt: skip


def find_layout(options: SkinReportOptions, settings: dict[str, Any]) -> Layout:
    """The layout that is asked for, or that a picture names, or the usual one. Raises UserError."""
    name = options.layout or settings.get("layout") or USUAL
    layout = sized_layout(str(name), options.size or settings.get("size"))
    for key in layout.keys:
        if min(key.box.size) < LEAST_KEY:
            height, width = key.box.size
            raise UserError(f"key {key.name} is {width}x{height} pixels, too small to be measured")
    if not layout.keys:
        raise UserError(f"layout {layout.name} has no keys")
    return layout


def with_labels(file: Path, image: np.ndarray, labels: str) -> np.ndarray | None:
    """The picture on which the labels of a skin are to be read; None where there are none.

    Raises UserError where they were drawn on a picture that is not there.
    """
    if labels == "none":
        return None
    if labels == "in-picture":
        return image
    drawn = file.with_name(f"{file.stem}{LABELLED}.png")
    if not drawn.is_file():
        raise UserError(f"{drawn.name} is missing, {file.name} with its labels")
    return as_photo(drawn).rgb


@lru_cache(maxsize=16)
def clean_figures(layout: Layout) -> Figures:
    """What a clean drawing of a layout scores: the ceiling."""
    return adherence(plain_skin(layout), layout).figures()


def aside(names: Sequence[str], loss_ocr: str | None) -> set[str]:
    """The figures that don't count: those by the reader that is in the loss."""
    return {name for name in names if loss_ocr and name.endswith(f"_{loss_ocr}")}


def goodness(skin: Measured, loss_ocr: str | None) -> float:
    """What pictures are ordered by: the mean of KeyFit and the accuracies that count."""
    outside = aside(list(skin.figures), loss_ocr)
    counting = [
        value
        for name, value in skin.figures.items()
        if name == "key_fit" or (name.startswith("text_accuracy") and name not in outside)
    ]
    return float(np.mean(counting))


def names_of(skins: Sequence[Measured]) -> list[str]:
    """The figures that any of `skins` has, in order."""
    return list(dict.fromkeys(name for skin in skins for name in skin.figures))


def mean_of(name: str, skins: Sequence[Measured]) -> Figures:
    """The mean of a figure over the skins that have it, with its floor, ceiling and place."""
    having = [skin for skin in skins if name in skin.figures]
    mean = {"mean": float(np.mean([skin.figures[name] for skin in having]))}
    if name in PIXELS:
        return mean
    mean["floor"] = float(np.mean([skin.floor[name] for skin in having]))
    mean["ceiling"] = float(np.mean([skin.ceiling[name] for skin in having]))
    places = [normalised(s.figures[name], s.floor[name], s.ceiling[name]) for s in having]
    return {**mean, "normalised": float(np.mean(places))}


def write_skin_report(result: SkinReport, options: SkinReportOptions) -> Path:
    """Write the JSON and the page where `options` say; the page's file."""
    write_json(options.json or options.skins / "report.json", result.summary())
    out = options.output or options.skins / "report.html"
    write_whole(out, make_page(result).encode())
    return out


def make_page(result: SkinReport) -> str:
    """The whole page as HTML, pictures inside."""
    shown, count = result.skins[:SHOWN], len(result.skins)
    which = f"The worst {SHOWN} of {count}" if count > SHOWN else f"All {count}, the worst first"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
    parts = [
        f"<h2>Means of {count} pictures</h2>",
        means_table(result),
        EXPLAINED,
        f"<ul>{notes}</ul>" if notes else "",
        skipped_lines(result.skipped),
        f"<h2>Pictures</h2><p>{which}. Keys that don't fit are outlined in red.</p>",
        *(skin_row(skin, result.settings["loss_ocr"]) for skin in shown),
        settings_part(result.settings),
    ]
    return page("controlfill skin report", parts, STYLE)


def means_table(result: SkinReport) -> str:
    """The means beside floor and ceiling as HTML."""
    outside = aside(names_of(result.skins), result.settings["loss_ocr"])
    rows = []
    for name, mean in result.means().items():
        cells = [cell(mean.get(key)) for key in ("mean", "floor", "ceiling", "normalised")]
        rows.append(row_of(name, cells, outside))
    return table(["", "mean", "floor", "ceiling", "on the way"], rows)


def row_of(name: str, cells: list[str], outside: set[str]) -> tuple[str, list[str]]:
    """The row of a figure; one that does not count is grey and says why."""
    title = title_of(name) + (" (in the loss, does not count)" if name in outside else "")
    return ("aside" if name in outside else "", [html.escape(title), *cells])


def cell(value: float | None) -> str:
    """A number as HTML."""
    return "" if value is None else f"{value:.2f}"


def title_of(name: str) -> str:
    """What a figure is called."""
    if name in TITLES:
        return TITLES[name]
    kind, _, ocr = name.rpartition("_")
    return f"{TITLES[kind]}, {ocr}"


def skin_row(skin: Measured, loss_ocr: str | None) -> str:
    """One picture with its figures, what was asked for and what is wrong with it, as HTML."""
    outside = aside(list(skin.figures), loss_ocr)
    rows = []
    for name, value in skin.figures.items():
        beside = [None, None] if name in PIXELS else [skin.floor[name], skin.ceiling[name]]
        rows.append(row_of(name, [cell(value), *map(cell, beside)], outside))
    height, width = skin.layout.size
    told = [f"{key} {value}" for key, value in skin.told.items() if key != "prompt"]
    words = [", ".join([f"{skin.layout.name} {width}x{height}", *told]), *faults(skin)]
    lines = "".join(f"<br>{html.escape(line)}" for line in words)
    prompt = html.escape(str(skin.told.get("prompt", "")))
    return (
        f"<div class=skin><p><b>{prompt}</b>{lines}</p>"
        f"{figure(outlined(skin), skin.file, SHOWN_SIDE)}"
        f"{table(['', 'here', 'floor', 'ceiling'], rows)}</div>"
    )


def faults(skin: Measured) -> Iterator[str]:
    """What is wrong with a skin, in words."""
    if skin.off:
        yield f"not in place: {', '.join(skin.off)}"
    for ocr, pairs in skin.misread.items():
        wrong = [f"{label} as {read}" for label, read in pairs.items() if read]
        blank = [label for label, read in pairs.items() if not read]
        if wrong:
            yield f"misread by {ocr}: {'; '.join(wrong)}"
        if blank:
            yield f"not read by {ocr}: {' '.join(blank)}"


def outlined(skin: Measured) -> np.ndarray:
    """The small picture (h, w, 3) with the keys that don't fit in red."""
    picture = np.ascontiguousarray(skin.image).copy()
    for key in skin.layout.at((picture.shape[0], picture.shape[1])).keys:
        if key.name in skin.off:
            start, end = (key.box.left, key.box.top), (key.box.right - 1, key.box.bottom - 1)
            cv2.rectangle(picture, start, end, WHITE, 4)
            cv2.rectangle(picture, start, end, RED, 2)
    return picture


PIXELS = {"offset_median", "offset_p95"}
TITLES = {
    "key_fit": "KeyFit: keys with all four sides in place",
    "edge_recall": "edges of keys found, within 2 px",
    "key_iou": "overlap of keys with their colour (IoU)",
    "sides_found": "sides of keys with a clear step",
    "offset_median": "how far those are off, median, px",
    "offset_p95": "how far those are off, 95th percentile, px",
    "glyph_correlation": "labels like their glyphs",
    "text_accuracy": "labels read exactly",
    "ned": "similarity of what is read (NED)",
}
EXPLAINED = """<p>The ceiling is what a clean drawing of the same layout scores, labels drawn on
plain grey keys. The floor is what the picture scores for a wrong layout, its keys shuffled, or for
its labels permuted. The last column is how far the mean is on the way from the floor (0) to the
ceiling (1).</p>"""

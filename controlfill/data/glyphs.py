"""Texts that OCR finds on pictures without a layout, drawn on their conditioning pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from controlfill.data.captions import Changed, Table, saving
from controlfill.data.prepare import Report, encode_image, say_nothing
from controlfill.data.tables import BOXES, TEXTS, fit_hint
from controlfill.errors import UserError
from controlfill.files import write_whole
from controlfill.images import as_photo, as_rgb
from controlfill.options.skinset import PrepareGlyphsOptions
from controlfill.skins.draw import check_signs, is_han, open_font
from controlfill.skins.layout import Size

# Where a row keeps its hint without texts, and where hints with them are.
PLAIN, GLYPHS = "plain_conditioning_image", "glyph_images"
# Share of the height of a box that OCR finds, and of its width, that its text may take: drawn so,
# texts are 0.95 (0.77 to 1.06) times as wide as they are, 1.4 pixels off (median, 1024x640).
INK = (0.75, 0.95)
# Degrees up to which a box counts as upright: those around single letters waver by as much.
UPRIGHT = 8.0
Labels = Sequence[tuple[str | None, list[list[int]]]]
# A text, its four corners (x, y) clockwise from the top left, and the confidence from 0 to 1.
Found = tuple[str, Sequence[Sequence[float]], float]
FindTexts = Callable[[np.ndarray], Sequence[Found]]


def prepare_glyphs(
    options: PrepareGlyphsOptions, find: FindTexts, report: Report = say_nothing
) -> Changed:
    """`controlfill prepare glyphs`, with the texts that `find` sees on pictures.

    Rows with texts are left alone unless `overwrite`; those read so far stay when it ends early.
    """
    table = Table(options.data)
    if not table.columns.hint:
        raise UserError(
            f"{table.file} has no conditioning pictures to draw on; `controlfill prepare canny` "
            "makes them"
        )
    todo = [n for n, row in enumerate(table.rows) if options.overwrite or row.get(TEXTS) is None]
    if not todo:
        raise UserError(
            f"all {len(table)} rows of {table.file} have texts already; --overwrite reads anew"
        )
    skipped, notes, seen = [], [], 0
    with saving(table) as done:
        for count, number in enumerate(todo):
            report("pictures", count, len(todo))
            try:
                hint, labels, odd = read_row(table, number, find, options)
            except UserError as error:
                skipped.append(str(error))
                continue
            seen += put_row(table, number, hint, labels)
            notes += [f"{table.names[number]}: {note}" for note in odd]
            done(1)
        report("pictures", len(todo), len(todo))
    if len(skipped) == len(todo):
        raise UserError(f"none of the {len(todo)} pictures can be used: {skipped[0]}")
    if not seen:
        notes.append(f"no text of confidence {options.confidence} was found in any picture")
    return Changed(
        folder=options.data, samples=len(todo) - len(skipped), kept=len(table) - len(todo),
        skipped=skipped, notes=notes,
    )  # fmt: skip


def read_row(
    table: Table, number: int, find: FindTexts, options: PrepareGlyphsOptions
) -> tuple[np.ndarray, Labels, list[str]]:
    """The plain hint of a row with the texts of its picture, all labels, and what is odd.

    Raises UserError for pictures that can't be used.
    """
    name = table.names[number]
    plain = table.path(number, plain_column(table, number))
    image = as_photo(table.folder / name).rgb
    hint = fit_hint(as_photo(table.folder / plain).rgb, image, name).copy()
    labels, notes = draw_found(hint, find(image), options)
    if not any(text for text, _ in labels):
        notes.append("no text was found; its hint stays plain")
    return hint, labels, notes


def plain_column(table: Table, number: int) -> str:
    """Where a row has its hint without texts."""
    return PLAIN if table.rows[number].get(PLAIN) else table.columns.hint


def put_row(table: Table, number: int, hint: np.ndarray, labels: Labels) -> bool:
    """Give a row its labels, and `hint` if some have texts; returns whether they have."""
    row, column = table.rows[number], table.columns.hint
    plain = row[plain_column(table, number)]
    texts = [text for text, _ in labels]
    drawn = f"{GLYPHS}/{number:06d}.png" if any(texts) else plain
    if any(texts):
        write_whole(table.folder / drawn, encode_image(hint, "png"))
    row |= {PLAIN: plain, column: drawn, BOXES: [box for _, box in labels], TEXTS: texts}
    return any(texts)


def draw_found(
    hint: np.ndarray, found: Sequence[Found], options: PrepareGlyphsOptions
) -> tuple[Labels, list[str]]:
    """Draw texts that are sure enough into `hint` (H, W, 3); returns all labels, and what is odd.

    Those that are not, or that the font lacks signs for, have a box but no text.
    """
    labels: list[tuple[str | None, list[list[int]]]] = []
    notes: list[str] = []
    edge = np.array(hint.shape[1::-1])
    for words, corners, confidence in found:
        box = np.rint(straight(np.array(corners, float))).astype(int).clip(0, edge)
        text = words.strip() if confidence >= options.confidence else ""
        if min(sides(box)) < 1:
            continue
        try:
            if text:
                draw_text(hint, text, box, options.font)
        except UserError as error:
            notes.append(str(error))
            text = ""
        labels.append((text or None, box.tolist()))
    return labels, notes


def straight(box: np.ndarray) -> np.ndarray:
    """The corners (4, 2) of a box that stands nearly upright made those of a rectangle."""
    way = (box[1] + box[2] - box[0] - box[3]) / 2
    if abs(np.degrees(np.arctan2(way[1], way[0]))) > UPRIGHT:
        return box
    left, right = box[[0, 3], 0].mean(), box[[1, 2], 0].mean()
    top, bottom = box[:2, 1].mean(), box[2:, 1].mean()
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def sides(box: np.ndarray) -> tuple[float, float]:
    """Mean height and width of a box by its corners (4, 2), clockwise from the top left."""
    top, right, bottom, left = (float(np.linalg.norm(box[i] - box[i - 3])) for i in range(4))
    return (left + right) / 2, (top + bottom) / 2


def draw_text(picture: np.ndarray, text: str, box: np.ndarray, font: Path | None) -> None:
    """Draw `text` in white on black into `picture` (H, W, 3) between the corners `box` (4, 2).

    Black, as edges that Canny found of the same text would blur it. Raises UserError for signs that
    the font lacks.
    """
    height, width = (max(1, round(side)) for side in sides(box))
    patch = Image.new("L", (width, height))
    own = fitting(text, (height, width), font)
    middle = (width / 2, height / 2)
    left, top, right, bottom = own.getbbox(text, anchor="ls")
    start = (middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2)
    ImageDraw.Draw(patch).text(start, text, fill=255, font=own, anchor="ls")
    flat = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    way = cv2.getPerspectiveTransform(flat, box.astype(np.float32))
    drawn = cv2.warpPerspective(np.array(patch), way, picture.shape[1::-1])
    cv2.fillConvexPoly(picture, box.astype(np.int32), (0, 0, 0))
    np.maximum(picture, as_rgb(drawn), out=picture)


def fitting(text: str, size: Size, font: Path | None) -> Any:
    """The font at the size at which the ink of `text` fills a box of `size` as texts do."""
    trial = open_font(font, is_han(text), 100)
    check_signs(text, trial)
    left, top, right, bottom = trial.getbbox(text)
    scale = min(INK[0] * size[0] / max(1, bottom - top), INK[1] * size[1] / max(1, right - left))
    return open_font(font, is_han(text), max(6, round(100 * scale)))

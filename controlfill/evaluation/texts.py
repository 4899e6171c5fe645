"""Are the labels of a skin legible? Read by OCR, and compared with their own rendered glyphs.

All figures come with a ceiling, the same on labels drawn on plain keys, and a floor, the same with
the labels permuted over their boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from controlfill.errors import UserError
from controlfill.evaluation.adherence import plain_skin
from controlfill.skins.draw import draw_labels, label_boxes
from controlfill.skins.layout import Box, Layout

# What stands in each box of a uint8 picture (H, W, 3), of the signs allowed.
Read = Callable[[np.ndarray, Sequence[Box], str], list[str]]
Label = tuple[str, Box]
Figures = dict[str, float]
# Signs that a reader can't tell apart without others beside them, all as the second of a pair.
ALIKE = str.maketrans("cosvwxz01-", "COSVWXZOII")
# Pixels by which a painted glyph may lie beside the rendered one, and ground kept around it.
SHIFT, RIM = 3, 2
# Other labels that each box is compared with for the floor of the glyph correlation.
OTHERS = 3


@dataclass(frozen=True, kw_only=True)
class Ocr:
    """A reader and its name; `knows` tells whether there is a class for a sign."""

    name: str
    read: Read
    knows: Callable[[str], bool] = lambda sign: True


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What was read for each label."""

    wanted: list[str]
    read: list[str]

    @property
    def accuracy(self) -> float:
        """The share of labels that were read exactly, look-alikes aside."""
        return score(self.wanted, self.read)[0]

    @property
    def ned(self) -> float:
        """The mean normalised edit similarity of labels: 1 is equal, 0 nothing in common."""
        return score(self.wanted, self.read)[1]

    def misread(self) -> dict[str, str]:
        """The labels that were read as something else, with that."""
        pairs = zip(self.wanted, self.read, strict=True)
        return {wanted: read for wanted, read in pairs if same(wanted) != same(read)}

    def floor(self) -> tuple[float, float]:
        """Accuracy and NED with the labels permuted over their boxes, the mean of all rotations."""
        turns = range(1, len(self.wanted))
        scores = [score(self.wanted[n:] + self.wanted[:n], self.read) for n in turns]
        means = np.mean(scores, axis=0) if scores else np.zeros(2)
        return float(means[0]), float(means[1])


def open_ocr(name: str) -> Ocr:
    """The text reader "v4" or "v6". Raises UserError that says what to install."""
    from controlfill.models.ocr import load_reader, read_boxes

    reader = load_reader(name)

    def read(image: np.ndarray, boxes: Sequence[Box], signs: str) -> list[str]:
        return read_boxes(reader, image, boxes, signs)

    return Ocr(name=name, read=read, knows=lambda sign: sign in reader.index)


def read_labels(image: np.ndarray, labels: Sequence[Label], ocr: Ocr) -> Texts:
    """What `ocr` reads in the boxes of `labels` of a picture (H, W, 3), of their signs alone.

    Labels with signs that it does not know are left out.
    """
    known = [(text, box) for text, box in labels if is_known(text, ocr)]
    signs = "".join(sorted({sign for text, _ in known for sign in text}))
    read = ocr.read(image, [box for _, box in known], signs) if known else []
    return Texts(wanted=[text for text, _ in known], read=read)


def measure_texts(
    image: np.ndarray, layout: Layout, font: Path | None, readers: Sequence[Ocr]
) -> tuple[Figures, Figures, dict[str, dict[str, str]]]:
    """Figures of the labels on a picture (H, W, 3), their floor, and by reader what was misread.

    Raises UserError for layouts without labels and signs without a font.
    """
    labels = find_labels(layout, font)
    like, unlike = glyph_correlation(image, layout, font)
    figures, floor = {"glyph_correlation": like}, {"glyph_correlation": unlike}
    misread = {}
    for ocr in readers:
        texts = read_labels(image, labels, ocr)
        if texts.wanted:
            figures |= named(ocr, (texts.accuracy, texts.ned))
            floor |= named(ocr, texts.floor())
            misread[ocr.name] = texts.misread()
    return figures, floor, misread


def named(ocr: Ocr, scores: tuple[float, float]) -> Figures:
    """Accuracy and NED of a reader under their names."""
    return {f"text_accuracy_{ocr.name}": scores[0], f"ned_{ocr.name}": scores[1]}


@lru_cache(maxsize=16)
def clean_texts(layout: Layout, font: Path | None, readers: tuple[Ocr, ...]) -> Figures:
    """What labels drawn on plain keys score: the ceiling. Raises UserError."""
    clean = draw_labels(plain_skin(layout), layout, font)
    return measure_texts(clean, layout, font, readers)[0]


def left_out(layout: Layout, font: Path | None, readers: Sequence[Ocr]) -> list[str]:
    """What is to be said of labels that a reader has no signs for. Raises UserError."""
    labels = find_labels(layout, font)
    notes = []
    for ocr in readers:
        unknown = [text for text, _ in labels if not is_known(text, ocr)]
        if unknown:
            notes.append(f"{ocr.name} has no signs for {' '.join(unknown)}, which are left out")
    return notes


def is_known(text: str, ocr: Ocr) -> bool:
    """Whether `ocr` knows all signs of a text."""
    return all(ocr.knows(sign) for sign in text)


def find_labels(layout: Layout, font: Path | None = None) -> list[Label]:
    """The labels of a layout and the boxes of their ink on its canvas. Raises UserError."""
    found = [(text, box.clipped(layout.size)) for text, box in label_boxes(layout, font)]
    if not found:
        raise UserError(f"layout {layout.name} has no labels, so there is no text to be measured")
    return found


def score(wanted: Sequence[str], read: Sequence[str]) -> tuple[float, float]:
    """The share of texts read exactly, and the mean of their `similarity`; 0 without any."""
    if not wanted:
        return 0.0, 0.0
    pairs = [(same(a), same(b)) for a, b in zip(wanted, read, strict=True)]
    return float(np.mean([a == b for a, b in pairs])), float(
        np.mean([similarity(a, b) for a, b in pairs])
    )


def same(text: str) -> str:
    """`text` with signs that look alike made one."""
    return text.translate(ALIKE)


def similarity(a: str, b: str) -> float:
    """Normalised edit similarity as AnyText has it: 1 - Lev / (the longer's length + 1e-5)."""
    return 1 - edit_distance(a, b) / (max(len(a), len(b)) + 1e-5)


def edit_distance(a: str, b: str) -> int:
    """The least number of signs to insert, delete or change from `a` to `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, sign in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (sign != other))
    return row[-1]


def glyph_correlation(
    image: np.ndarray, layout: Layout, font: Path | None = None
) -> tuple[float, float]:
    """How much like their rendered glyphs the labels look, and like those of others (the floor).

    The mean over labels of the best correlation of the two-coloured box with its glyph, within
    three pixels and whichever of both is darker; no network is asked, so none can be deceived.
    Raises UserError for layouts without labels and signs without a font.
    """
    labels = find_labels(layout, font)
    black = np.zeros((*layout.size, 3), np.uint8)
    drawn = draw_labels(black, layout, font, (255, 255, 255))[..., 0]
    glyphs = [patch(drawn, box, RIM) for _, box in labels]
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    own, others = [], []
    for number, (text, box) in enumerate(labels):
        own.append(correlation(grey, box, glyphs[number]))
        turned = [(number + n) % len(labels) for n in range(1, len(labels))]
        wrong = [n for n in turned if labels[n][0] != text][:OTHERS]
        others += [correlation(grey, centred(box, labels[n][1]), glyphs[n]) for n in wrong]
    return float(np.mean(own)), float(np.mean(others)) if others else 0.0


def correlation(grey: np.ndarray, box: Box, glyph: np.ndarray) -> float:
    """The best correlation of a `glyph` (h, w) with what stands around `box`, in [0, 1]."""
    crop = patch(grey, box, RIM + SHIFT)
    _, split = cv2.threshold(crop, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    if not split.any() or split.all() or glyph.min() == glyph.max():
        return 0.0
    found = cv2.matchTemplate(
        split.astype(np.float32), glyph.astype(np.float32), cv2.TM_CCOEFF_NORMED
    )
    return float(min(1.0, np.abs(found).max()))


def patch(picture: np.ndarray, box: Box, rim: int) -> np.ndarray:
    """The part of a picture (H, W) in `box` and `rim` pixels around; its borders go on outside."""
    height, width = picture.shape
    rows = np.arange(box.top - rim, box.bottom + rim).clip(0, height - 1)
    columns = np.arange(box.left - rim, box.right + rim).clip(0, width - 1)
    return np.ascontiguousarray(picture[np.ix_(rows, columns)])


def centred(place: Box, size: Box) -> Box:
    """A box as large as `size` in the middle of `place`."""
    (height, width), (x, y) = size.size, place.middle
    left, top = round(x - width / 2), round(y - height / 2)
    return Box(left, top, left + width, top + height)

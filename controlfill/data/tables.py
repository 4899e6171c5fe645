"""Tables of pictures, conditioning pictures and prompts: jsonl, csv, Hugging Face datasets."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from controlfill.data.geometry import Label
from controlfill.data.sample import Sample
from controlfill.errors import UserError
from controlfill.images import ORIENTATION, Photo, open_image, photo_of, resize, upright
from controlfill.options import DataOptions
from controlfill.skins.layout import Box

TABLES = ("train.jsonl", "metadata.jsonl", "metadata.csv")
# Columns of texts in pictures: polygons in pixels, and what each says.
BOXES, TEXTS = "box", "texts"
HUB_PREFIX = "hf:"
EXTRA = "pip install 'controlfill[data]'"
# EXIF orientations from this one on lie on their side.
FIRST_SIDEWAYS = 5


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names under which data keeps pictures, conditioning pictures and prompts."""

    image: str = DataOptions.image_column
    hint: str = DataOptions.conditioning_image_column
    caption: str = DataOptions.caption_column

    @classmethod
    def of(cls, options: DataOptions) -> Columns:
        """The names that `options` give."""
        return cls(
            image=options.image_column,
            hint=options.conditioning_image_column,
            caption=options.caption_column,
        )

    def find(self, there: Sequence[str], where: str) -> Columns:
        """These columns as they are called in `there`; "" for one that is absent and optional.

        The picture may also be called file_name, as in image folders. Raises UserError for a
        picture column that is absent, and for any other that was asked for by name.
        """
        found = Columns(
            image=_first(there, self.image, "file_name", f"{self.image}_file_name"),
            hint=_first(there, self.hint, f"{self.hint}_file_name"),
            caption=_first(there, self.caption),
        )
        default = Columns()
        for part in ("image", "hint", "caption"):
            asked = getattr(self, part)
            needed = part == "image" or asked != getattr(default, part)
            if needed and not getattr(found, part):
                flag = {"hint": "conditioning_image"}.get(part, part)
                raise UserError(
                    f"{where} has no column {asked!r}; there are: {', '.join(there)}; "
                    f"say which with --{flag}_column"
                )
        return found


def _first(there: Sequence[str], *names: str) -> str:
    return next((name for name in names if name in there), "")


class Texts:
    """Many texts as two arrays, which worker processes share where lists would be copied."""

    def __init__(self, texts: Sequence[str]) -> None:
        raw = [text.encode() for text in texts]
        self.ends = np.cumsum([0, *map(len, raw)], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(raw), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode()


class TableSource:
    """The rows of a train.jsonl, metadata.jsonl or metadata.csv beside its pictures.

    `missing` names pictures that the table lists and the folder lacks; their rows are left out.
    Raises UserError, with file and line, for rows that can't be meant.
    """

    def __init__(self, table: Path, columns: Columns, at_least: int | None) -> None:
        self.folder, self.at_least = table.parent, at_least
        rows = list(read_rows(table))
        if not rows:
            raise UserError(f"{table} holds no rows; each line names a picture")
        there = list(dict.fromkeys(key for _, row in rows for key in row))
        columns = columns.find(there, str(table))
        self.has_hints = bool(columns.hint)
        images = [path_of(row, columns.image, line) for line, row in rows]
        hints = [path_of(row, columns.hint, line) for line, row in rows] if self.has_hints else []
        words = [join_words(row.get(columns.caption), line) for line, row in rows]
        own = {BOXES, TEXTS} - {columns.image, columns.hint, columns.caption}
        labels = [join_labels(row, line) if len(own) == 2 else "" for line, row in rows]
        absent = _absent(self.folder, {*images, *hints})
        pairs = zip(images, hints or images, strict=True)
        kept = [not (image in absent or hint in absent) for image, hint in pairs]
        self.missing = [name for name in dict.fromkeys([*images, *hints]) if name in absent]
        if not any(kept):
            raise UserError(
                f"none of the {len(rows)} rows of {table} has its pictures in {self.folder}; the "
                f"first that is missing is {self.missing[0]}"
            )
        self.images, self.hints, self.words, self.labels = (
            Texts([text for text, keep in zip(texts, kept, strict=False) if keep])
            for texts in (images, hints, words, labels)
        )
        self.signs = find_signs(self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        name = self.images[index]
        photo = open_image(self.folder / name, self.at_least)
        hint = None
        if self.has_hints:
            hint = fit_hint(open_image(self.folder / self.hints[index]).rgb, photo.rgb, name)
        labels = split_labels(self.labels[index], self.folder / name, photo.size)
        words = split_words(self.words[index])
        return Sample(image=photo.rgb, hint=hint, name=name, labels=labels, **words)

    def sizes(self) -> np.ndarray:
        """(N, 2) of height and width, read from the files' headers."""
        return read_sizes(self.folder / self.images[i] for i in range(len(self)))


def read_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the place (file:line) that errors name."""
    try:
        text = table.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table} can't be read as UTF-8 text: {error}") from error
    if table.suffix == ".csv":
        yield from _read_csv(table, text)
        return
    # Only \n ends a line of JSON; str.splitlines would also cut at signs that captions may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{table}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{place} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f'{place} holds no {{"image": ..., "text": ...}} but {line:.40}')
            yield place, row


def _read_csv(table: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        for row in reader:
            place = f"{table}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place} hasn't as many cells as the first line has names")
            yield place, row
    except csv.Error as error:
        raise UserError(f"{table}:{reader.line_num} is no CSV: {error}") from error


def path_of(row: dict[str, Any], column: str, place: str) -> str:
    """The row's path in `column`, which must stay in the folder of the table."""
    value = row.get(column)
    if not isinstance(value, str) or not value:
        raise UserError(f"{place}: {column!r} is {value!r}; the path of a picture would be right")
    normal = os.path.normpath(value.replace("\\", "/"))
    if os.path.isabs(normal) or ":" in normal.split("/")[0] or normal.split("/")[0] == "..":
        raise UserError(f"{place}: {value} lies outside the table's folder; keep pictures in it")
    return PurePosixPath(normal).as_posix()


def join_words(value: Any, place: str) -> str:
    """A caption, or several, as one text with NUL between them."""
    wordings = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(words, str) for words in wordings):
        raise UserError(f"{place}: the caption is {value!r}; a text or a list of texts is wanted")
    return "\0".join(words.strip() for words in wordings)


def split_words(words: str) -> dict[str, Any]:
    """The `prompt`, or the `prompts`, of a text with NUL between wordings."""
    wordings = tuple(part for part in words.split("\0") if part)
    return {"prompts": wordings} if len(wordings) > 1 else {"prompt": "".join(wordings)}


def join_labels(row: dict[str, Any], place: str) -> str:
    """The columns `box` (polygons) and `texts` of a row as one text; "" for a row without both.

    A text that is null is there but unknown. Raises UserError for what can't be meant.
    """
    if BOXES not in row or TEXTS not in row:
        return ""
    polygons, texts = row[BOXES] or [], row[TEXTS] or []
    try:
        boxes = [around(polygon) for polygon in polygons]
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise UserError(
            f"{place}: {BOXES!r} holds {polygons!r:.60}; a list of polygons [[x, y], ...] is wanted"
        ) from error
    if not isinstance(texts, list):
        raise UserError(f"{place}: {TEXTS!r} is {texts!r:.60}; a list of texts is wanted")
    known = all(isinstance(text, str | None) and text != "" for text in texts)
    if not known or len(boxes) != len(texts):
        raise UserError(
            f"{place}: {len(boxes)} polygons in {BOXES!r} and {len(texts)} words in {TEXTS!r}; "
            "each polygon needs its text, or null"
        )
    pairs = zip(texts, boxes, strict=True)
    return json.dumps([[text, *box] for text, box in pairs]) if boxes else ""


def around(polygon: Sequence[Sequence[float]]) -> tuple[int, int, int, int]:
    """The box around a polygon: left, top, right, bottom."""
    x, y = ([float(point[axis]) for point in polygon] for axis in (0, 1))
    return floor(min(x)), floor(min(y)), ceil(max(x)), ceil(max(y))


def split_labels(words: str, file: Path, size: tuple[int, int]) -> tuple[Label, ...]:
    """The labels that `join_labels` wrote, on `file` as it was decoded, at `size`."""
    if not words:
        return ()
    height, width = read_size(file)
    down, right = size[0] / height, size[1] / width
    return tuple(
        Label(text=text, box=Box(*box).scaled(down, right)) for text, *box in json.loads(words)
    )


def find_signs(labels: Texts) -> str:
    """Every sign that labels hold, sorted: the alphabet of a data set."""
    rows = (json.loads(labels[row]) for row in range(len(labels)) if labels[row])
    return "".join(sorted({sign for row in rows for text, *_ in row for sign in text or ""}))


def _absent(folder: Path, names: set[str]) -> set[str]:
    """Those of `names` that are not there; one listing per folder, as a stat each takes minutes."""
    there: dict[str, set[str]] = {}
    for parent in {os.path.dirname(name) for name in names}:
        place = folder / parent
        there[parent] = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
    return {name for name in names if os.path.basename(name) not in there[os.path.dirname(name)]}


def fit_hint(hint: np.ndarray, image: np.ndarray, name: str) -> np.ndarray:
    """`hint` at the size of `image`. Raises UserError unless they have the same proportions."""
    (height, width), (wanted_height, wanted_width) = hint.shape[:2], image.shape[:2]
    # Sizes are whole pixels, so equal proportions may differ by one of them after a reduction.
    slack = max(height, width, wanted_height, wanted_width)
    if abs(height * wanted_width - width * wanted_height) >= slack:
        raise UserError(
            f"{name} is {wanted_width}x{wanted_height}, but its conditioning picture is "
            f"{width}x{height}; both must show the same part"
        )
    return resize(hint, (wanted_height, wanted_width))


def read_sizes(files: Iterator[Path | bytes]) -> np.ndarray:
    """(N, 2) of height and width as the pictures stand upright, without decoding pixels.

    A picture that can't be read counts as (1, 1); it is skipped and named when its turn comes.
    """
    return np.array([read_size(file) for file in files], np.int32).reshape(-1, 2)


def read_size(file: Path | bytes) -> tuple[int, int]:
    """(height, width) from a picture's header, turned as its EXIF orientation asks."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            width, height = picture.size
            # A PNG without EXIF before its pixels would be decoded whole to look for one after.
            told = picture.format != "PNG" or "exif" in picture.info
            sideways = told and picture.getexif().get(ORIENTATION, 1) >= FIRST_SIDEWAYS
            return (width, height) if sideways else (height, width)
    except Exception:  # damaged headers raise anything
        return 1, 1


class HubSource:
    """A Hugging Face dataset: `hf:NAME_OR_PATH` or `hf:NAME_OR_PATH:SPLIT`, "train" by default.

    A folder that `save_to_disk` wrote is opened as it is; anything else goes to `load_dataset`.
    """

    def __init__(self, where: str, columns: Columns, at_least: int | None) -> None:
        self.where, self.at_least = where, at_least
        data = open_hub(where)
        self.columns = columns.find(list(data.column_names), where)
        self.has_hints = bool(self.columns.hint)
        self.data = _undecoded(data, self.columns)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        row, name = self.data[index], f"row {index}"
        photo = _open_cell(row[self.columns.image], self.at_least, f"{self.where} {name}")
        hint = None
        if self.has_hints:
            place = f"{self.where} {name} {self.columns.hint}"
            hint = fit_hint(_open_cell(row[self.columns.hint], None, place).rgb, photo.rgb, name)
        words = join_words(row.get(self.columns.caption), f"{self.where} {name}")
        return Sample(image=photo.rgb, hint=hint, name=name, **split_words(words))

    def sizes(self) -> np.ndarray:
        """(N, 2) of height and width; every picture's bytes are read for it, none is decoded."""
        cells = self.data.select_columns([self.columns.image])
        return read_sizes(_raw(row[self.columns.image]) or b"" for row in cells)


def open_hub(where: str) -> Any:
    """The dataset (one split, with random access) at `hf:...`. Raises UserError in one line."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{where} needs the package datasets: {EXTRA}") from error
    name, _, split = where.removeprefix(HUB_PREFIX).partition(":")
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # it raises anything, from OSError to its own
        why = " ".join(str(error).split())
        if "script" in why:
            why += "; use a parquet version of it, or save_to_disk it once with datasets<4"
        raise UserError(f"{where} can't be opened ({why:.300})") from error
    if not isinstance(data, datasets.DatasetDict):
        return data
    # A dictionary of a single split leaves no choice to ask for.
    chosen = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
    if chosen not in data:
        raise UserError(
            f"{where} has no split {chosen!r}; there are: {', '.join(map(str, data))}; say which "
            f"as {HUB_PREFIX}{name}:SPLIT"
        )
    return data[chosen]


def _undecoded(data: Any, columns: Columns) -> Any:
    """The needed columns alone, pictures as the bytes they are: we decode them smaller, upright."""
    import datasets

    names = [name for name in (columns.image, columns.hint, columns.caption) if name]
    data = data.select_columns(names)
    for name in (columns.image, columns.hint):
        if name and isinstance(data.features[name], datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


def _raw(cell: Any) -> bytes | Path | None:
    """The bytes or the path in a cell; None for anything else."""
    if isinstance(cell, dict):
        return cell.get("bytes") or _raw(cell.get("path"))
    if isinstance(cell, str):
        return Path(cell)
    return cell if isinstance(cell, bytes) else None


def _open_cell(cell: Any, at_least: int | None, place: str) -> Photo:
    """The picture in a cell: bytes, a path, a dict of one of them, or a PIL picture."""
    if isinstance(cell, Image.Image):
        return photo_of(upright(cell))
    raw = _raw(cell)
    if raw is None:
        raise UserError(
            f"{place} is {type(cell).__name__}, not a picture; bytes or a path would be"
        )
    return open_named(raw, at_least, place)


def open_named(raw: bytes | Path, at_least: int | None, place: str) -> Photo:
    """`open_image` whose errors begin with the place where the picture stands."""
    try:
        return open_image(raw, at_least)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error

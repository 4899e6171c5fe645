"""Captions written where training reads them: into a table, or beside the pictures of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from controlfill.data.palette import describe
from controlfill.data.prepare import Report, say_nothing
from controlfill.data.sample import Sample

# Rows are paths and words as a table has them, which are read in one place.
from controlfill.data.tables import TABLES, Columns, join_words, path_of, read_rows
from controlfill.errors import UserError
from controlfill.files import write_whole
from controlfill.images import as_photo, find_pictures
from controlfill.options.skinset import CaptionWords, PrepareCaptionsOptions

# Side in pixels below which a picture has no parts to speak of.
SMALLEST = 16
# Rows between two writings of a table.
KEEP = 50
# Words for pictures, "" for one without; several wordings of a picture stand apart by NUL.
Captioner = Callable[[Sequence[Sample]], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What became of a data set: pictures changed and left alone, what failed, what is odd."""

    folder: Path
    samples: int = 0
    kept: int = 0
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Table:
    """The rows of a train.jsonl or metadata.jsonl, to be changed in place. Raises UserError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        there = [folder / name for name in TABLES if (folder / name).is_file()]
        if not there:
            raise UserError(f"{folder} holds no table; expected {TABLES[0]} in it")
        self.file = there[0]
        if self.file.suffix == ".csv":
            raise UserError(
                f"{self.file} is a CSV, in which captions and boxes are not written; "
                "`controlfill prepare table` makes a train.jsonl of it"
            )
        found = list(read_rows(self.file))
        self.places, self.rows = [place for place, _ in found], [row for _, row in found]
        if not self.rows:
            raise UserError(f"{self.file} holds no rows; each line names a picture")
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        self.columns = Columns().find(keys, str(self.file))
        self.names = [self.path(number, self.columns.image) for number in range(len(self.rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, number: int, column: str) -> str:
        """A row's path in `column`, relative to the folder. Raises UserError."""
        return path_of(self.rows[number], column, self.places[number])

    def has_words(self, number: int) -> bool:
        """Whether a row has a caption."""
        words = join_words(self.rows[number].get(self.columns.caption), self.places[number])
        return bool(words.replace("\0", ""))

    def put(self, number: int, words: Sequence[str]) -> None:
        """Make `words` a row's caption, or captions."""
        column = self.columns.caption or Columns().caption
        self.rows[number][column] = words[0] if len(words) == 1 else list(words)

    def save(self) -> None:
        """Write the table, whole or not at all."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_whole(self.file, "".join(lines).encode())


class Folder:
    """The pictures below a folder, with their captions in files of the same name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = find_pictures(folder)
        if not self.files:
            raise UserError(f"{folder} holds neither a {TABLES[0]} nor pictures")
        self.names = [file.relative_to(folder).as_posix() for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def has_words(self, number: int) -> bool:
        """Whether a picture has a caption."""
        return bool(read_lines(self.files[number].with_suffix(".txt")))

    def put(self, number: int, words: Sequence[str]) -> None:
        """Write a picture's caption, one wording on each line."""
        file = self.files[number].with_suffix(".txt")
        write_whole(file, "".join(f"{line}\n" for line in words).encode())

    def save(self) -> None:
        """Nothing: every caption is on disk as soon as it is there."""


class Captioned(Protocol):
    """A folder whose pictures have captions."""

    folder: Path
    names: list[str]

    def __len__(self) -> int: ...
    def has_words(self, number: int) -> bool: ...
    def put(self, number: int, words: Sequence[str]) -> None: ...
    def save(self) -> None: ...


def read_lines(file: Path) -> list[str]:
    """The lines of a file that hold something; none where there is no file."""
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def dressed(words: str, options: CaptionWords) -> str:
    """`words` between the prefix and the suffix, unless they are there already."""
    words = " ".join(words.split())
    if not f"{words} ".casefold().startswith(f"{options.prefix} ".lstrip().casefold()):
        words = f"{options.prefix} {words}".strip()
    return words if words.endswith(options.suffix) else words + options.suffix


def open_captioned(folder: Path) -> Captioned:
    """The table in `folder`, or its pictures. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one with a {TABLES[0]} or with pictures")
    has_table = any((folder / name).is_file() for name in TABLES)
    return Table(folder) if has_table else Folder(folder)


def prepare_captions(
    options: PrepareCaptionsOptions, caption: Captioner, report: Report = say_nothing
) -> Changed:
    """`controlfill prepare captions`, with the words that `caption` finds.

    Captions that are there stay unless `overwrite`; those found so far are kept when it ends early.
    """
    data = open_captioned(options.data)
    todo = [n for n in range(len(data)) if options.overwrite or not data.has_words(n)]
    skipped: list[str] = []
    with saving(data) as done:
        for start in range(0, len(todo), options.batch_size):
            batch = todo[start : start + options.batch_size]
            skipped += caption_batch(data, batch, caption, options)
            done(len(batch))
            report("captions", start + len(batch), len(todo))
    if todo and len(skipped) == len(todo):
        raise UserError(f"none of the {len(todo)} pictures has got a caption: {skipped[0]}")
    return Changed(
        folder=data.folder, samples=len(todo) - len(skipped), kept=len(data) - len(todo),
        skipped=skipped,
    )  # fmt: skip


def caption_batch(
    data: Captioned, numbers: Sequence[int], caption: Captioner, options: CaptionWords
) -> list[str]:
    """Caption some pictures; returns why others got none."""
    samples: dict[int, Sample] = {}
    skipped = []
    for number in numbers:
        name = data.names[number]
        try:
            samples[number] = Sample(image=as_photo(data.folder / name).rgb, name=name)
        except UserError as error:
            skipped.append(str(error))
    found = caption(list(samples.values())) if samples else []
    for number, words in zip(samples, found, strict=True):
        wordings = [dressed(part, options) for part in words.split("\0") if part.strip()]
        if wordings:
            data.put(number, wordings)
        else:
            skipped.append(f"{data.names[number]}: no words were found for it")
    return skipped


@contextmanager
def saving(data: Captioned) -> Iterator[Callable[[int], None]]:
    """Give a function to tell how many rows were changed; `data` is saved now and then, and last.

    It is saved too when the block ends by an error or is interrupted.
    """
    waiting = 0

    def done(rows: int) -> None:
        nonlocal waiting
        waiting += rows
        if waiting >= KEEP:
            data.save()
            waiting = 0

    try:
        yield done
    finally:
        if waiting:
            data.save()


def template(samples: Sequence[Sample]) -> list[str]:
    """Words measured from each picture; "" for one too small to have any."""
    large = (min(sample.image.shape[:2]) >= SMALLEST for sample in samples)
    return [
        describe(s.image) if is_large else "" for s, is_large in zip(samples, large, strict=True)
    ]


def written(file: Path) -> Captioner:
    """The words that a table (.jsonl or .csv) has for pictures, by their paths or names.

    Raises UserError.
    """
    if file.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--captions {file} is no .jsonl or .csv with the columns image and text")
    rows = list(read_rows(file))
    if not rows:
        raise UserError(f"--captions {file} holds no rows")
    columns = Columns(caption="text").find(list(rows[0][1]), str(file))
    if not columns.caption:
        raise UserError(f"{file} has no column 'text'; there are: {', '.join(rows[0][1])}")
    words = {
        path_of(row, columns.image, place): join_words(row.get(columns.caption), place)
        for place, row in rows
    }

    def find(samples: Sequence[Sample]) -> list[str]:
        return [words.get(s.name) or words.get(Path(s.name).name, "") for s in samples]

    return find

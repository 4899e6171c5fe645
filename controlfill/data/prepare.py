"""Any data written in another layout: a table with conditioning pictures, or tar shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlfill.data.sample import Sample, Source
from controlfill.data.shards import INDEX, is_unchanged, webdataset
from controlfill.data.sources import WORLD_PREFIX, Subset, open_source
from controlfill.data.tables import BOXES, TABLES, TEXTS, Columns
from controlfill.errors import UserError
from controlfill.files import read_json, refuse_full_disk, write_json, write_whole
from controlfill.images import as_rgb
from controlfill.options.preparing import PrepareShardsOptions, PrepareTableOptions

JPEG_QUALITY = 95
# Thresholds of Canny's edges: low enough for the soft colours of drawn pictures.
CANNY = (50, 80)
Report = Callable[[str, int, int], None]


def say_nothing(what: str, done: int, total: int) -> None:
    """The report of nobody who listens."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What was written: where, how many samples, and why pictures were left out."""

    folder: Path
    samples: int
    skipped: list[str]


def write_shards(
    source: Source,
    folder: Path,
    per_shard: int = 1000,
    image_format: str = "jpg",
    told: dict[str, Any] | None = None,
    report: Report = say_nothing,
) -> Prepared:
    """Write `source` as shard-000000.tar and so on, `per_shard` pictures each, and index.json.

    The same call, after it was interrupted, keeps the shards that are finished. `told` is whatever
    makes a call the same; it is kept in the index. Raises UserError for shards of another call.
    """
    count = len(source)
    made = {**(told or {}), "pictures": count, "per_shard": per_shard, "image_format": image_format}
    made = json.loads(json.dumps(made, default=str))
    folder.mkdir(parents=True, exist_ok=True)
    done = _finished(folder, made)
    # Also before the first shard: tars without an index would be taken for somebody else's.
    write_json(folder / INDEX, {"made": made, "whole": False, "shards": done})
    for start in range(len(done) * per_shard, count, per_shard):
        numbers = range(start, min(start + per_shard, count))
        path = folder / f"shard-{start // per_shard:06d}.tar"
        done.append(_write_shard(source, numbers, path, image_format))
        write_json(folder / INDEX, {"made": made, "whole": False, "shards": done})
        report("pictures", numbers.stop, count)
    write_json(folder / INDEX, {"made": made, "whole": True, "shards": done})
    skipped = [reason for shard in done for reason in shard["skipped"]]
    samples = sum(shard["samples"] for shard in done)
    if not samples:
        raise UserError(f"none of the {count} pictures can be used: {skipped[0]}")
    return Prepared(folder=folder, samples=samples, skipped=skipped)


def _finished(folder: Path, made: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards that this same call has already written; what it left half done is removed."""
    for leftover in folder.glob(".tmp-*.tar"):
        leftover.unlink()
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.tar")):
            raise UserError(f"{folder} already holds tars of unknown origin; give another folder")
        return []
    index = read_json(folder / INDEX)
    before = index.get("made", {})
    for key in {**before, **made}:
        if before.get(key) != made.get(key):
            raise UserError(
                f"{folder} holds shards of another command ({key} was {before.get(key)!r}, now "
                f"{made.get(key)!r}); give another folder"
            )
    whole = [is_unchanged(folder, shard) for shard in index["shards"]]
    return index["shards"][: whole.index(False) if False in whole else None]


def _write_shard(source: Source, numbers: range, path: Path, image_format: str) -> dict[str, Any]:
    """Write one tar and return its line of the index."""
    writer = webdataset("writer")
    samples, skipped = 0, []
    temporary = path.with_name(f".tmp-{path.name}")
    with refuse_full_disk(path):
        with temporary.open("wb") as file:
            # Nothing in a tar may depend on when it was written: equal commands, equal bytes.
            with writer.TarWriter(file, encoder=False, mtime=0) as tar:
                for number in numbers:
                    try:
                        parts = _encode(source[number], image_format)
                    except UserError as error:
                        skipped.append(str(error))
                        continue
                    tar.write({"__key__": f"{number:08d}", **parts})
                    samples += 1
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        os.replace(temporary, path)
    return {"name": path.name, "samples": samples, "bytes": size, "skipped": skipped}


def _encode(sample: Sample, image_format: str) -> dict[str, bytes]:
    """The parts of a sample by their suffix. Objects are not kept: they are drawn from COCO."""
    parts = {image_format: encode_image(sample.image, image_format)}
    if sample.hint is not None:
        parts["hint.png"] = encode_image(sample.hint, "png")
    if sample.mask is not None:
        parts["mask.png"] = encode_image(sample.mask, "png")
    wordings = sample.prompts or ((sample.prompt,) if sample.prompt else ())
    if len(wordings) == 1 and "\n" not in wordings[0]:
        parts["txt"] = wordings[0].encode()
    elif wordings:
        parts["json"] = json.dumps({Columns().caption: list(wordings)}).encode()
    return parts


def encode_image(image: np.ndarray, image_format: str) -> bytes:
    """uint8 (H, W[, 3]) as the bytes of a "png" (exact) or a "jpg" (nearly so)."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    done, data = cv2.imencode(f".{image_format}", bgr, ENCODING[image_format])
    assert done, f"no pictures can be written as {image_format}"
    return data.tobytes()


def write_table(
    source: Source, folder: Path, image_format: str = "png", report: Report = say_nothing
) -> Prepared:
    """Write `source` as images/, conditioning_images/ and train.jsonl, which comes last.

    Pictures without a hint get a row without one. Raises UserError for a folder with a table.
    """
    if any((folder / table).exists() for table in TABLES):
        raise UserError(f"{folder} already holds a table; give another folder")
    rows, skipped = [], []
    for number in range(len(source)):
        try:
            sample = source[number]
        except UserError as error:
            skipped.append(str(error))
            continue
        rows.append(_write_row(sample, folder, f"{number:06d}", image_format))
        report("pictures", number + 1, len(source))
    if not rows:
        raise UserError(f"none of the {len(source)} pictures can be used: {skipped[0]}")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / TABLES[0], "".join(lines).encode())
    return Prepared(folder=folder, samples=len(rows), skipped=skipped)


def _write_row(sample: Sample, folder: Path, name: str, image_format: str) -> dict[str, Any]:
    """Write the pictures of one sample and return its row, paths relative to `folder`."""
    columns = Columns()
    words = list(sample.prompts) or sample.prompt
    pictures = {columns.image: (f"images/{name}.{image_format}", sample.image, image_format)}
    if sample.hint is not None:
        # Hints are exact: one that JPEG has blurred is another hint.
        pictures[columns.hint] = (f"conditioning_images/{name}.png", sample.hint, "png")
    row: dict[str, Any] = {columns.caption: words[0] if len(words) == 1 else words}
    for column, (path, picture, kind) in pictures.items():
        write_whole(folder / path, encode_image(picture, kind))
        row[column] = path
    if sample.labels:
        row[BOXES] = [label.box.corners() for label in sample.labels]
        row[TEXTS] = [label.text for label in sample.labels]
    return row


def edges(image: np.ndarray, low: int = CANNY[0], high: int = CANNY[1]) -> np.ndarray:
    """Canny edges of a picture between two thresholds, white on black, uint8 (H, W, 3)."""
    return as_rgb(cv2.Canny(image, low, high))


class WithHints:
    """A source whose pictures without a conditioning picture get one that `make` draws."""

    def __init__(self, source: Source, make: Callable[[np.ndarray], np.ndarray]) -> None:
        self.source, self.make = source, make
        self.signs: str = getattr(source, "signs", "")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return sample if sample.hint is not None else replace(sample, hint=self.make(sample.image))


def open_to_write(options: PrepareTableOptions | PrepareShardsOptions) -> Source:
    """The first `count` pictures of the data, with the conditioning pictures asked for."""
    if options.data.startswith(WORLD_PREFIX) and not options.count:
        raise UserError(f"{options.data} has no end; say how many pictures with --count")
    source: Source = open_source(options.data, options)
    if options.count:
        source = Subset(source, options.count)
    make = HINT_MAKERS.get(options.make_hint)
    return source if make is None else WithHints(source, make)


def prepare_table(options: PrepareTableOptions, report: Report = say_nothing) -> Prepared:
    """`controlfill prepare table`."""
    return write_table(open_to_write(options), options.out, options.image_format, report)


def prepare_shards(options: PrepareShardsOptions, report: Report = say_nothing) -> Prepared:
    """`controlfill prepare shards`."""
    told = {name: value for name, value in options.as_dict().items() if name != "out"}
    source = open_to_write(options)
    if getattr(source, "signs", ""):
        raise UserError(
            f"{options.data} has labels in its pictures, which tar shards don't keep; "
            "`prepare table` does"
        )
    return write_shards(source, options.out, options.per_shard, options.image_format, told, report)


HINT_MAKERS = {"edges": edges}
# What OpenCV is told of each format.
ENCODING = {"png": [], "jpg": [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]}

"""Many pictures: a folder or a list in, a folder and one manifest out; what is done stays done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from controlfill.errors import UserError
from controlfill.images import as_photo, find_masks, find_pictures, save_image
from controlfill.inference.complete import Result, inpaint
from controlfill.inference.outpaint import outpaint, wants_more
from controlfill.inference.pipeline import Pipeline, Report
from controlfill.options import BatchOptions, ChangeOptions, check_numbers, check_values

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture: its name in the results, its files, and how its options differ from the rest.

    `trouble` says why it can't be done at all.
    """

    name: str
    image: Path
    mask: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    trouble: str | None = None

    def key(self) -> str:
        """What makes it the same job when a batch goes on."""
        return json.dumps(asdict(self), sort_keys=True, default=str)


def run_batch(
    pipeline: Pipeline, options: BatchOptions, report: Report
) -> tuple[list[str], list[str]]:
    """Do all jobs of `options` that are not done yet; the files written and what was skipped.

    A picture that can't be done is named in the manifest with its reason, and the rest goes on.
    """
    jobs = find_jobs(options)
    common = {**options.as_dict(), "output_dir": None}
    done = read_manifest(options.output_dir / MANIFEST, common)
    written, skipped = [], []
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(jobs, 1):
        if job.key() not in done or not (options.output_dir / job.name).is_file():
            line = _do(pipeline, job, options)
            append(options.output_dir / MANIFEST, {**line, "job": job.key(), "common": common})
            (skipped if line["error"] else written).append(line["error"] or line["output"])
        report("pictures", number, len(jobs))
    return written, skipped


def _do(pipeline: Pipeline, job: Job, options: BatchOptions) -> dict[str, Any]:
    """Do one job; its line of the manifest."""
    before, error = time.perf_counter(), job.trouble
    if error is None:
        try:
            result = _make(pipeline, job, options)
            file = options.output_dir / job.name
            save_image(file, result.image, result.alpha, result.settings)
        except UserError as reason:
            error = f"{job.image}: {reason}"
    seconds = round(time.perf_counter() - before, 2)
    return {"image": str(job.image), "output": job.name, "error": error, "seconds": seconds}


def _make(pipeline: Pipeline, job: Job, options: BatchOptions) -> Result:
    asked = replace(options, **job.changes)
    check_numbers(asked)
    photo = as_photo(job.image)
    if job.mask is not None:
        return inpaint(pipeline, photo, job.mask, asked)
    if wants_more(asked):
        return outpaint(pipeline, photo, asked)
    raise UserError("there is neither a mask nor a side to grow (--left, ..., --expand, --to)")


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a manifest, on a line of its own even after one that was cut short."""
    with file.open("ab+") as manifest:
        if manifest.tell():
            manifest.seek(-1, os.SEEK_END)
            if manifest.read(1) != b"\n":
                manifest.write(b"\n")
        manifest.write(json.dumps(line).encode() + b"\n")


def read_manifest(file: Path, common: dict[str, Any]) -> set[str]:
    """The keys of the jobs that went well in an earlier run with the same options."""
    found = set()
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if row.get("common") == common and not row.get("error"):
            found.add(row.get("job"))
    return found


def find_jobs(options: BatchOptions) -> list[Job]:
    """The pictures to be done. Raises UserError when there are none."""
    data = options.data
    if data.is_file() and data.suffix == ".jsonl":
        jobs = list(read_jobs(data))
    elif data.is_dir():
        jobs = read_folder(data, options.mask_dir)
    else:
        raise UserError(f"{data} is neither a folder of pictures nor a .jsonl file")
    if not jobs:
        raise UserError(f"{data} holds no pictures")
    return _named_apart(jobs)


def read_folder(folder: Path, mask_dir: Path | None) -> list[Job]:
    """A job for each picture below `folder`, with its mask if there is a folder of them."""
    files = find_pictures(folder)
    names = [f"{file.relative_to(folder).with_suffix('')}.png" for file in files]
    if mask_dir is None:
        return [Job(name=name, image=file) for name, file in zip(names, files, strict=True)]
    masks = find_masks(files, folder, mask_dir)
    return [
        Job(
            name=name,
            image=file,
            mask=masks[file],
            trouble=None if masks[file] else f"{file}: {mask_dir} has no mask of the same name",
        )
        for name, file in zip(names, files, strict=True)
    ]


def read_jobs(file: Path) -> Iterator[Job]:
    """A job for each line of a .jsonl file; paths are relative to it."""
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if line.strip():
            yield _of_line(line, file, f"{file}, line {number}")


def _of_line(line: str, file: Path, where: str) -> Job:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise UserError(f"{where}: wanted an object with an image, found {line[:60]!r}")
        image, mask, name = (row.pop(key, None) for key in ("image", "mask", "output"))
        changes = check_values(ChangeOptions, row, where)
    except (UserError, ValueError) as error:
        said = str(error) if isinstance(error, UserError) else f"{where}: {error}"
        return Job(name=f"{file.stem}-{where.rpartition(' ')[2]}.png", image=file, trouble=said)
    # Results lie in the output folder, whatever the list says.
    name = Path(str(name or Path(image).name)).with_suffix(".png").name
    return Job(
        name=name,
        image=file.parent / image,
        mask=file.parent / mask if mask else None,
        changes=changes,
    )


def _named_apart(jobs: list[Job]) -> list[Job]:
    """The jobs with names of their own: a second "a.png" is "a-2.png"."""
    taken: dict[str, int] = {}
    named = []
    for job in jobs:
        taken[job.name] = count = taken.get(job.name, 0) + 1
        stem = job.name.removesuffix(".png")
        named.append(job if count == 1 else replace(job, name=f"{stem}-{count}.png"))
    return named

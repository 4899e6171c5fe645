"""Generated skins: a layout's hint and a prompt in; a picture, its parts and its themes out."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from controlfill.errors import UserError
from controlfill.images import as_photo, read_settings, save_image
from controlfill.inference.batch import MANIFEST, append
from controlfill.inference.complete import follow
from controlfill.inference.pipeline import Pipeline, Progress, Report
from controlfill.models.bundle import Bundle
from controlfill.models.controlnet import find_controlnet
from controlfill.options import check_numbers, check_values
from controlfill.options.skin_generate import SkinChangeOptions, SkinGenerateOptions
from controlfill.skins.compose import write_parts
from controlfill.skins.draw import draw_labels, edge_hint, glyph_hint
from controlfill.skins.formats import export_theme
from controlfill.skins.layout import Layout, Size
from controlfill.skins.layout import sized_layout as at_size

# What follows the name of a skin in that of its picture with drawn labels.
LABELLED = "-labelled"
# The setting in a PNG that tells whether it is the picture that is asked for now.
MADE_FROM = "made_from"
# Options that say what is written beside the picture, and all that change nothing about it.
WRITTEN = {"labels", "theme", "slices", "font"}
BESIDE = WRITTEN | {"output_dir", "prompts", "num_images", "device", "size", "layout"}
LONGEST_NAME = 48
# The least side of a key in pixels; hints of smaller ones are all outline.
LEAST_KEY = 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """One skin: its name in the results and all that is asked of it.

    `trouble` says why it can't be made at all.
    """

    name: str
    options: SkinGenerateOptions
    trouble: str | None = None

    @property
    def picture(self) -> Path:
        """The file of the skin as it is painted."""
        return self.options.output_dir / f"{self.name}.png"

    @property
    def labelled(self) -> Path:
        """The file of the skin with drawn labels."""
        return self.picture.with_name(f"{self.name}{LABELLED}.png")

    @property
    def parts(self) -> Path:
        """The folder of its parts."""
        return self.options.output_dir / self.name

    @property
    def themes(self) -> list[Path]:
        """The files of its themes."""
        return [self.picture.with_name(f"{self.name}{THEMES[name]}") for name in self.options.theme]

    @property
    def files(self) -> list[Path]:
        """All that is written of it."""
        labelled = [self.labelled] if self.options.labels == "drawn" else []
        parts = [self.parts] if self.options.slices else []
        return [self.picture, *labelled, *parts, *self.themes]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a skin is painted from: its layout, the hint (H, W, 3), and a key of all that matters.

    The key is that of the options of sampling, the hint and the ControlNet's file.
    """

    layout: Layout
    hint: np.ndarray
    key: str


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a batch: pictures written now, those there already, and what failed, why."""

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run_skins(pipeline: Pipeline, options: SkinGenerateOptions, report: Report) -> Made:
    """Make all skins of `options` that are not there yet.

    One that can't be made is named with its reason, there and in the manifest, and the rest goes
    on. Raises UserError for what is wrong with all of them.
    """
    check_pipeline(pipeline)
    requests = find_requests(options)
    sized_layout(options, pipeline.bundle)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    manifest, made = options.output_dir / MANIFEST, Made()
    done = read_jobs(manifest)

    def told(step: int, steps: int) -> None:
        report("sampling", step, steps)

    for number, request in enumerate(requests, 1):
        line = _do(pipeline, request, done, told)
        if line is None:
            made.kept.append(request.picture.name)
        else:
            append(manifest, line)
            error = line["error"]
            (made.failed if error else made.written).append(error or line["output"])
        report("skins", number, len(requests))
    return made


def check_pipeline(pipeline: Pipeline) -> None:
    """Raise UserError unless the ControlNet follows given pictures."""
    if not pipeline.spec.given:
        raise UserError(
            f"--control {pipeline.control} was trained with {pipeline.spec.label}: it fills holes; "
            "skins need one trained with --conditioning image on the hints of a layout"
        )


def _do(
    pipeline: Pipeline, request: Request, done: dict[str, str | None], progress: Progress
) -> dict[str, Any] | None:
    """Make one skin; its line of the manifest, or None where it is `done` and all of it is there.

    A picture that is there, made from the same, is not painted again.
    """
    before, error, job = time.perf_counter(), request.trouble, None
    if error is None:
        try:
            plan = make_plan(request, pipeline.bundle)
            job = job_key(request, plan)
            if done.get(request.picture.name) == job and is_there(request, plan):
                return None
            check_own(request)
            image = find_painted(request.picture, plan.key)
            anew = image is None
            if image is None:
                image = paint(pipeline, request, plan, progress)
            finish_skin(image, plan.layout, request, anew)
        except UserError as reason:
            error = f"{request.name}: {reason}"
    seconds = round(time.perf_counter() - before, 2)
    return {
        "output": request.picture.name, "prompt": request.options.prompt, "error": error,
        "seconds": seconds, "job": job,
    }  # fmt: skip


def read_jobs(manifest: Path) -> dict[str, str | None]:
    """What was done last for each picture in a manifest, by its name; None where that failed."""
    jobs = {}
    for line in manifest.read_text("utf-8").splitlines() if manifest.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        jobs[row.get("output")] = None if row.get("error") else row.get("job")
    return jobs


def job_key(request: Request, plan: Plan) -> str:
    """What makes it the same skin, in all that is written of it."""
    beside = {k: v for k, v in request.options.as_dict().items() if k in WRITTEN}
    slots = [repr(replace(slot, line=0)) for slot in plan.layout.slots]
    return digest(plan.key, beside, slots)


def is_there(request: Request, plan: Plan) -> bool:
    """Whether all files of a skin are there, its picture the one that is asked for."""
    own = settings_of(request.picture).get(MADE_FROM) == plan.key
    return own and all(file.exists() for file in request.files)


def make_plan(request: Request, bundle: Bundle) -> Plan:
    """The plan of a request. Raises UserError."""
    options = request.options
    check_numbers(options)
    layout = sized_layout(options, bundle)
    hint = glyph_hint(layout, options.font) if options.hint == "glyphs" else edge_hint(layout)
    weights = find_controlnet(options.control)
    sampling = {k: v for k, v in options.as_dict().items() if k not in BESIDE}
    told = sha256(hint.tobytes()).hexdigest()
    key = digest(sampling, layout.size, told, str(weights), weights.stat().st_mtime_ns)
    return Plan(layout=layout, hint=hint, key=key)


def paint(
    pipeline: Pipeline, request: Request, plan: Plan, progress: Progress | None = None
) -> np.ndarray:
    """What the networks make of a hint and a prompt (H, W, 3), written with its settings."""
    result = follow(pipeline, plan.hint, request.options, progress)
    height, width = plan.layout.size
    own = {"size": f"{width}x{height}", MADE_FROM: plan.key}
    save_image(request.picture, result.image, settings={**result.settings, **own})
    return result.image


def finish_skin(image: np.ndarray, layout: Layout, request: Request, anew: bool) -> None:
    """Write what follows from a painted skin (H, W, 3): labels, parts, themes. Raises UserError.

    Parts that are all there stay unless the skin was painted `anew`: somebody may work on them.
    """
    options = request.options
    if options.labels == "drawn":
        labelled = draw_labels(image, layout, options.font)
        save_image(request.labelled, labelled, settings=read_settings(request.picture))
    there = {file.stem for file in request.parts.glob("*.png")}
    if options.slices and (anew or not {slot.name for slot in layout.slots} <= there):
        shutil.rmtree(request.parts, ignore_errors=True)  # those of an older picture
        write_parts(image, layout, request.parts, with_pressed=True)
    for file in request.themes:
        export_theme(image, layout, file, options.labels == "drawn")


def check_own(request: Request) -> None:
    """Raise UserError where a picture or a folder that was not made here would be replaced."""
    folder, own = request.parts, MADE_FROM in settings_of(request.picture)
    if not own and is_whole(request.picture):
        raise UserError(f"{request.picture} is there and is no skin; give the skin another name")
    if not request.options.slices or not folder.exists():
        return
    if not (own and folder.is_dir()) or any(file.suffix != ".png" for file in folder.iterdir()):
        raise UserError(
            f"{folder} is there and holds something else; give the skin another name, or leave its "
            "parts out with --no_slices"
        )


def is_whole(file: Path) -> bool:
    """Whether a picture is there that can be opened: a broken one is nobody's."""
    try:
        as_photo(file)
    except (UserError, OSError):
        return False
    return True


def find_painted(file: Path, key: str) -> np.ndarray | None:
    """The picture (H, W, 3) in `file` if it is whole and was made from the same; else None."""
    if settings_of(file).get(MADE_FROM) != key:
        return None
    try:
        return as_photo(file).rgb
    except UserError:
        return None


def settings_of(file: Path) -> dict[str, Any]:
    """The settings in a PNG; none where there is no such file or it is broken."""
    try:
        found = read_settings(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def digest(*things: Any) -> str:
    """A short text that is the same for the same things."""
    return sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()[:16]


def sized_layout(options: SkinGenerateOptions, bundle: Bundle) -> Layout:
    """The layout of a skin, at a size that the base can take. Raises UserError."""
    layout = at_size(options.layout, options.size)
    check_canvas(layout.size, bundle)
    for slot in layout.slots:
        if min(slot.box.size) < LEAST_KEY:
            raise UserError(
                f"on {layout.size[1]}x{layout.size[0]} {slot.name} of layout {layout.name} is only "
                f"{slot.box.size[1]}x{slot.box.size[0]} pixels; a larger --size is needed"
            )
    return layout


def check_canvas(size: Size, bundle: Bundle) -> None:
    """Raise UserError, with the nearest size that works, unless the base can take `size`."""
    multiple = bundle.size_multiple
    height, width = (max(multiple, round(side / multiple) * multiple) for side in size)
    if size != (height, width):
        raise UserError(
            f"the canvas is {size[1]}x{size[0]}, but {bundle.name} needs multiples of {multiple}; "
            f"--size {width}x{height} would do"
        )


def settle(options: SkinGenerateOptions) -> SkinGenerateOptions:
    """The options with what follows from others filled in. Raises UserError for contradictions."""
    if options.hint == "glyphs" and options.labels not in (None, "in-picture"):
        raise UserError(
            f"--labels {options.labels} does not go with --hint glyphs, which has the networks "
            "paint the labels; --labels in-picture would, or --hint edges"
        )
    labels = options.labels or ("in-picture" if options.hint == "glyphs" else "drawn")
    return replace(options, labels=labels)


def find_requests(options: SkinGenerateOptions) -> list[Request]:
    """The skins that are asked for, one for each prompt and seed. Raises UserError."""
    options = settle(options)
    if bool(options.prompt) == bool(options.prompts):
        raise UserError(
            "give either --prompt, what a skin looks like, or --prompts, a file with many of them"
        )
    if options.prompts is None:
        asked = [Request(name=name_of(options.prompt), options=options)]
    else:
        asked = read_prompts(options.prompts, options)
    return named_apart([one for request in asked for one in seeded(request)])


def seeded(request: Request) -> Iterator[Request]:
    """The request in as many seeds as asked."""
    first, several = request.options.seed, request.options.num_images
    for seed in range(first, first + several):
        name = request.name if several == 1 else f"{request.name}_{seed}"
        yield replace(request, name=name, options=replace(request.options, seed=seed))


def read_prompts(file: Path, options: SkinGenerateOptions) -> list[Request]:
    """A request for each line of a file, text or .jsonl. Raises UserError when it has none."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {file} can't be read ({error}); a text file with a prompt in each line "
            "would do, or a .jsonl file"
        ) from error
    read = _of_json if file.suffix == ".jsonl" else _of_text
    found = [read(line.strip(), n, options) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"--prompts {file} holds no prompt; one in each line is expected")
    return found


def _of_text(line: str, number: int, options: SkinGenerateOptions) -> Request:
    return Request(name=name_of(line), options=replace(options, prompt=line))


def _of_json(line: str, number: int, options: SkinGenerateOptions) -> Request:
    where = f"{options.prompts}, line {number}"
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{where}: wanted an object with a prompt, found {line[:60]!r}")
        name = name_of(str(row.pop("name", row["prompt"])).removesuffix(".png"))
        changes = check_values(SkinChangeOptions, row, where)
    except (UserError, ValueError) as error:
        said = str(error) if isinstance(error, UserError) else f"{where}: {error}"
        return Request(name=f"line-{number}", options=options, trouble=said)
    return Request(name=name, options=replace(options, **changes))


def name_of(prompt: str) -> str:
    """A file name that tells the prompt."""
    words = re.sub(r"\W+", "-", prompt).strip("-")
    return words[:LONGEST_NAME].strip("-") or "skin"


def named_apart(requests: Sequence[Request]) -> list[Request]:
    """The requests with names whose files don't meet: a second "a" is "a-2"."""
    taken: set[str] = set()
    named = []
    for request in requests:
        others = (f"{request.name}-{number}" for number in count(2))
        name = next(n for n in chain([request.name], others) if not file_names(n) & taken)
        taken |= file_names(name)
        named.append(replace(request, name=name))
    return named


def file_names(name: str) -> set[str]:
    """What the files of a skin are called, on disks that know no capitals too."""
    return {name.casefold(), f"{name}{LABELLED}".casefold()}


THEMES = {"cskin": ".cskin", "trime": ".trime.zip", "fcitx5": ".fcitx5.zip"}

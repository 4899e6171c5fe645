"""Class pictures: what the base paints of a class, so that learning one of it keeps the rest.

They lie in a folder beside `settings.json`, which tells what made them. Each is named by its number
and a hash of its pixels, so an interrupted painting goes on and no picture is there twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controlfill.data.concepts import tell
from controlfill.data.sample import Sample, collate
from controlfill.errors import UserError
from controlfill.files import read_json, write_json
from controlfill.images import find_pictures, save_image, to_uint8
from controlfill.inference.generate import generate_batch
from controlfill.inference.pipeline import Pipeline, Report
from controlfill.options import FinetuneOptions, SampleOptions
from controlfill.training.team import Team

SETTINGS = "settings.json"
STEPS = 25
# A picture that is there already is painted anew so many times, with seeds so far apart.
ATTEMPTS, STRIDE = 3, 1_000_003
NAME = re.compile(r"class-(\d{6})-[0-9a-f]{16}\.png")


@dataclass(frozen=True, kw_only=True)
class Painter:
    """Paints class pictures into `folder`, this process its share of them."""

    folder: Path
    pipeline: Pipeline
    options: FinetuneOptions
    team: Team

    def settings(self) -> dict[str, Any]:
        """What decides how the pictures look."""
        options, sampling = self.options, SampleOptions()
        return {
            "base": self.pipeline.bundle.name,
            "unet": None if options.unet is None else str(options.unet),
            "class_prompt": options.class_prompt,
            "image_size": options.image_size,
            "seed": options.seed,
            "num_inference_steps": STEPS,
            "scheduler": sampling.scheduler,
            "guidance_scale": self.pipeline.bundle.guidance_scale,
        }

    def paint(self, numbers: Sequence[int], attempt: int) -> None:
        """Paint the pictures of consecutive `numbers`; one that is there already is left out."""
        side = self.options.image_size
        blank, hole = np.full((side, side, 3), 127, np.uint8), np.full((side, side), 255, np.uint8)
        prompt = tell("", self.options.class_prompt)
        sample = Sample(image=blank, mask=hole, prompt=prompt)
        batch = collate([sample] * len(numbers), self.pipeline.spec)
        seed = self.options.seed + numbers[0] + attempt * STRIDE
        with self.team.autocast():
            asked = SampleOptions(seed=seed, num_inference_steps=STEPS)
            pictures = to_uint8(generate_batch(self.pipeline, batch, asked))
        there = {file.stem.rpartition("-")[2] for file in painted(self.folder).values()}
        for number, picture in zip(numbers, pictures, strict=True):
            name = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
            if name not in there:
                file = self.folder / f"class-{number:06d}-{name}.png"
                save_image(file, picture, settings=self.settings())
                there.add(name)


def paint_missing(painter: Painter, report: Report) -> None:
    """Paint until the folder holds as many class pictures as asked for. Raises UserError.

    Pictures that the user put there count, and are left alone. `report` is told of the progress.
    """
    options, team, folder = painter.options, painter.team, painter.folder
    missing = team.tell(find_missing(painter))
    wanted = painter.settings()
    if not missing:
        # Another seed would paint other pictures, but none is to be painted.
        del wanted["seed"]
    if missing or painted(folder):
        check_settings(folder, wanted)
    if not missing:
        return
    if team.main:
        write_json(folder / SETTINGS, wanted)
    for attempt in range(ATTEMPTS):
        missing = team.tell(find_missing(painter))
        runs = list(runs_of(missing, options.batch_size))
        for run in runs[team.rank :: team.ranks]:
            done = options.num_class_images - len(find_missing(painter))
            report("class pictures", done, options.num_class_images)
            painter.paint(run, attempt)
        team.total(torch.zeros(1))  # until all are through
        if team.main:
            drop_doubles(folder)
    left = team.tell(len(find_missing(painter)))
    report("class pictures", options.num_class_images - left, options.num_class_images)
    if left:
        raise UserError(
            f"the base painted the same picture again and again for {options.class_prompt!r}: "
            f"{left} of {options.num_class_images} class pictures are missing; give pictures of "
            "your own in --class_data_dir, or a smaller --num_class_images"
        )


def find_missing(painter: Painter) -> list[int]:
    """The numbers of class pictures that are not there yet."""
    there = painted(painter.folder)
    given = len(find_pictures(painter.folder)) - len(there) if painter.folder.is_dir() else 0
    return [n for n in range(painter.options.num_class_images - given) if n not in there]


def painted(folder: Path) -> dict[int, Path]:
    """The pictures painted so far, by number."""
    found = ((NAME.fullmatch(file.name), file) for file in sorted(folder.glob("class-*.png")))
    return {int(match[1]): file for match, file in found if match}


def drop_doubles(folder: Path) -> None:
    """Remove pictures that are there already, which processes that paint at once can't see."""
    seen: set[str] = set()
    for _, file in sorted(painted(folder).items()):
        name = file.stem.rpartition("-")[2]
        if name in seen:
            file.unlink()
        seen.add(name)


def runs_of(numbers: Sequence[int], most: int) -> Iterator[list[int]]:
    """`numbers`, which rise, in groups of at most `most` that follow each other."""
    group: list[int] = []
    for number in numbers:
        if group and (number != group[-1] + 1 or len(group) == most):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def check_settings(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise UserError when the class pictures in `folder` were painted in another way."""
    made = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else wanted
    other = next((name for name, value in wanted.items() if made.get(name) != value), None)
    if other is not None:
        raise UserError(
            f"the class pictures in {folder} were painted with {other} {made.get(other)!r}, not "
            f"{wanted[other]!r}; give another --class_data_dir"
        )

"""Our data path against the stock one, and the COCO index against json, on one core.

    python -m benchmarks.data

Three comparisons in one call: training samples (both pictures of a pair, 640x480 to 512) in batches
as they leave a worker, against the transform and collate function of diffusers' script; masks per
second by kind; and an annotation file of the size of COCO's instances_train2017 read by json and by
our index, each in a fresh process.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Result, ratio, run_child, spread, times

SIZE = 512
BATCH = 4


def seconds(work: Callable[[int], Any], count: int) -> float:
    """Processor seconds of one of `count` calls, which are numbered."""
    before = time.process_time()
    for number in range(count):
        work(number)
    return (time.process_time() - before) / count


def stock_sample(pairs: Path, rows: list[dict[str, str]]) -> Callable[[int], Any]:
    """A sample as `train_controlnet.py` makes it: PIL, twice, to normalised floats."""
    from PIL import Image

    from benchmarks.stand_in import stock_transform

    kinds = [
        ("image", stock_transform(SIZE, True)),
        ("conditioning_image", stock_transform(SIZE, False)),
    ]

    def sample(number: int) -> list[Any]:
        row = rows[number % len(rows)]
        return [
            transform(Image.open(pairs / row[name]).convert("RGB")) for name, transform in kinds
        ]

    return sample


def our_sample(pairs: Path, rows: list[dict[str, str]], kind: str) -> Callable[[int], Any]:
    """A sample of ours as a worker makes it, hint or mask included.

    `pair` reads both pictures; `hole` one, and draws a mask instead of reading the hint.
    """
    import numpy as np

    from controlfill.data.sample import Sample
    from controlfill.data.sources import make_preparation
    from controlfill.images import open_image
    from controlfill.options import DataOptions

    prepare = make_preparation(DataOptions(image_size=SIZE, crop="center"))

    def sample(number: int) -> Any:
        row = rows[number % len(rows)]
        names = ("image", "conditioning_image") if kind == "pair" else ("image",)
        pictures = [open_image(pairs / row[name], SIZE).rgb for name in names]
        hint = pictures[1] if kind == "pair" else None
        rng = np.random.default_rng((0, number))
        return prepare(Sample(image=pictures[0], hint=hint, prompt=row["text"]), rng)

    return sample


def stock_collate(samples: list[list[Any]]) -> list[Any]:
    """The script's collate function: floats of both pictures, stacked."""
    import torch

    stacks = [torch.stack(pictures) for pictures in zip(*samples, strict=True)]
    return [s.to(memory_format=torch.contiguous_format).float() for s in stacks]


def our_collate(samples: list[Any]) -> Any:
    """Ours: bytes; what they become is made on the device that trains."""
    from controlfill.data.hints import open_spec
    from controlfill.data.sample import stack

    return stack(samples, open_spec("image" if samples[0].hint is not None else "masked-image"))


def in_batches(
    sample: Callable[[int], Any], collate: Callable[[list[Any]], Any]
) -> Callable[[int], Any]:
    """`BATCH` samples and what a worker makes of them."""

    def batch(number: int) -> Any:
        return collate([sample(number * BATCH + i) for i in range(BATCH)])

    return batch


def pixel_difference(stock: Callable[[int], Any], ours: Callable[[int], Any]) -> float:
    """The mean difference of both sides' pictures in levels of 255."""
    import numpy as np

    found = []
    for number in range(4):
        theirs = (stock(number)[0].numpy().transpose(1, 2, 0) + 1) * 127.5
        found.append(np.abs(theirs - ours(number).image).mean())
    return float(np.mean(found))


def compare_samples(folder: Path, options: argparse.Namespace) -> tuple[Result, list[str]]:
    """Pictures per second of both sides, taking turns."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    pairs = folder / "pairs"
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    stock, pair, hole = (
        stock_sample(pairs, rows), our_sample(pairs, rows, "pair"), our_sample(pairs, rows, "hole")
    )  # fmt: skip
    difference = pixel_difference(stock, pair)
    sides = {
        "stock": in_batches(stock, stock_collate),
        "pair": in_batches(pair, our_collate),
        "hole": in_batches(hole, our_collate),
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds + 1):
        for name, sample in sides.items():
            took[name].append(seconds(sample, options.samples // BATCH) / BATCH)
    took = {name: values[1:] for name, values in took.items()}  # the first warms files and caches
    found = {
        name: {"per_second": spread([1 / t for t in values]), "speed": ratio(took["stock"], values)}
        for name, values in took.items()
    }
    words = {
        "stock": "stock, picture and hint",
        "pair": "ours, picture and hint",
        "hole": "ours, picture and drawn mask",
    }
    lines = ["samples per second of one core, 640x480 JPEG to 512:"]
    lines += [
        f"  {words[n]:30}{f['per_second']['median']:7.0f}  {times(f['speed'])}"
        for n, f in found.items()
    ]
    lines.append(f"  pictures differ by {difference:.2f} of 255 levels in the mean")
    return {**found, "pixel_difference": difference}, lines


def measure_masks(options: argparse.Namespace) -> tuple[Result, list[str]]:
    """Masks per second of every kind at 512 pixels, area checks included."""
    import numpy as np

    from controlfill.data.masks import MASKS, draw_mask

    def draw(number: int, kind: str) -> None:
        draw_mask(kind, (SIZE, SIZE), np.random.default_rng((0, number)), (0.1, 0.3))

    found = {
        kind: 1 / seconds(functools.partial(draw, kind=kind), options.samples * 4) for kind in MASKS
    }
    lines = ["masks per second of one core, 512x512:"]
    return found, [*lines, *(f"  {kind:12}{rate:8.0f}" for kind, rate in found.items())]


def compare_coco(folder: Path, options: argparse.Namespace) -> tuple[Result, list[str]]:
    """Seconds and memory of json, of the index's first building and of its later openings."""
    file = folder / "instances.json"
    made = run_child(["benchmarks.coco_child", "make", file, options.coco_images])
    took: dict[str, list[Result]] = {}
    for _ in range(options.rounds):
        # `build` throws the old index away first, `open` finds the one that `build` left.
        for how in ("json", "build", "open"):
            took.setdefault(how, []).append(run_child(["benchmarks.coco_child", how, file]))
    # Processor time is not disturbed by other work on the machine; wall-clock time is kept too.
    found: Result = {"file_bytes": made["bytes"], "annotations": made["annotations"]}
    for how, runs in took.items():
        found[how] = {
            key: spread([run[key] for run in runs]) for key in ("seconds", "cpu", "grown")
        }
        found[how]["speed"] = ratio(
            [r["seconds"] for r in took["json"]], [r["seconds"] for r in runs]
        )
        found[how]["memory"] = ratio([r["grown"] for r in runs], [r["grown"] for r in took["json"]])
    same = len({run["first"] for runs in took.values() for run in runs}) == 1
    found["same"] = same
    return found, coco_lines(found)


def coco_lines(found: Result) -> list[str]:
    """The lines of the annotation file."""
    mega = found["file_bytes"] / 1e6
    words = {"json": "json", "build": "index, first time", "open": "index, opened again"}
    lines = [f"annotation file of {mega:.0f} MB, {found['annotations']} annotations:"]
    lines += [
        f"  {words[how]:20}{found[how]['cpu']['median']:9.4f} s {times(found[how]['speed']):28}"
        f"memory {found[how]['grown']['median'] / 2**20:7.1f} MiB, "
        f"{found[how]['memory']['median']:.3f} of json's"
        for how in words
    ]
    return lines if found["same"] else [*lines, "  THE ANNOTATIONS DIFFER: the ratios are void"]


def main() -> None:
    """Compare and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64, help="samples per round")
    parser.add_argument("--coco_images", type=int, default=118_287)
    parser.add_argument("--only", nargs="+", choices=["samples", "masks", "coco"])
    parser.add_argument("--work_dir", type=Path, help="keeps pairs and annotation file")
    common.add_output(parser)
    options = parser.parse_args()
    if options.work_dir:
        compare(options.work_dir.resolve(), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """All comparisons that were asked for."""
    from benchmarks import tiny

    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.only or ["coco", "samples", "masks"]
    figures: Result = {}
    lines: list[str] = []
    # First the annotation file: its children are measured while this process is still small.
    if "coco" in wanted:
        figures["coco"], more = compare_coco(folder, options)
        lines += more
    if "samples" in wanted:
        tiny.make_pairs(folder)
        figures["samples"], more = compare_samples(folder, options)
        lines += more
    if "masks" in wanted:
        figures["masks"], more = measure_masks(options)
        lines += more
    common.report("data", figures, lines, options.output)


if __name__ == "__main__":
    main()

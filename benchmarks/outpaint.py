"""Outpainting the shape world, whose truth beyond the borders is known, beside classical fills.

    python -m benchmarks.outpaint

Pictures of 64 px grow by --pixels on each side, with the words of their ground as the prompt, in
each order of windows. For each: PSNR of what is new; the step at the old border and the steps where
windows begin or end, as shares of the truth's own (1 is perfect).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Result

CLASSICAL = ("edge", "mirror", "telea")
ORDERS = ("outward", "joint", "rows")
SIDE, WINDOW = 64, 64
# Far from the seeds that `controlfill evaluate` measures.
FIRST = 700_000


def draw(count: int, pixels: int, patterned: bool) -> list[Any]:
    """The first `count` held-out pictures with `pixels` of truth around them."""
    from controlfill.data.worlds import HELD_OUT, PATTERNED, open_world

    world, found, seed = open_world("shapes"), [], HELD_OUT + FIRST
    while len(found) < count:
        picture = world.draw(seed, (SIDE, SIDE), pixels)
        if (picture.truth.ground in PATTERNED) == patterned:
            found.append(picture)
        seed += 1
    return found


def inside(image: np.ndarray, pixels: int) -> np.ndarray:
    """The picture without what was added around it."""
    return np.ascontiguousarray(image[pixels:-pixels, pixels:-pixels])


def border_lines(pixels: int, overlap: float) -> list[int]:
    """Rows (and columns) at which a window begins or ends, but for the old picture's borders."""
    from controlfill.inference.order import places_along

    length = SIDE + 2 * pixels
    places = places_along(length, WINDOW, round(WINDOW * overlap), (pixels, pixels + SIDE))
    lines = {at for place in places for at in (place, place + WINDOW)}
    return sorted(lines - {0, length, pixels, pixels + SIDE})


def line_steps(image: np.ndarray, lines: Sequence[int], hole: np.ndarray) -> tuple[float, float]:
    """Mean step across `lines` and across all others of the same lattice, within the hole.

    Patterns of this world have their edges on a lattice of 4 pixels; only like is compared.
    """
    at, elsewhere = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(np.float64), axis=axis)).mean(axis=2)
        both = hole.take(range(1, hole.shape[axis]), axis) & hole.take(
            range(hole.shape[axis] - 1), axis
        )
        for line in range(4, image.shape[axis], 4):
            values = steps.take(line - 1, axis)[both.take(line - 1, axis)]
            (at if line in lines else elsewhere).append(values)
    return float(np.concatenate(at).mean()), float(np.concatenate(elsewhere).mean())


def share(at: float, elsewhere: float) -> float:
    """Steps at the borders of windows as a share of those elsewhere; 0 where there are none."""
    return at / elsewhere if elsewhere else 0.0


def measure(pictures: Sequence[Any], outputs: Sequence[np.ndarray], pixels: int) -> Result:
    """The figures of one way of growing `pictures`."""
    from controlfill.evaluation.metrics import score, summarize

    mask = np.pad(np.zeros((SIDE, SIDE), np.uint8), pixels, constant_values=255)
    scores = [score(o, p.image, mask) for o, p in zip(outputs, pictures, strict=True)]
    lines, hole = border_lines(pixels, 0.5), mask > 0
    ours = np.mean([line_steps(o, lines, hole) for o in outputs], axis=0)
    truth = np.mean([line_steps(p.image, lines, hole) for p in pictures], axis=0)
    found = summarize(scores)
    return {
        "psnr": found["hole_psnr"],
        "psnr_mean": found["hole_psnr_mean"],
        "seam": found["seam"],
        "known_max_error": found["known_max_error"],
        "window_borders": share(*ours) / (share(*truth) or 1.0),
    }


def grow(pictures: Sequence[Any], options: argparse.Namespace, **way: Any) -> list[np.ndarray]:
    """What controlfill makes of `pictures` in one `way`."""
    import controlfill

    pipeline = controlfill.load(device=options.device)
    sides = dict.fromkeys(("left", "right", "top", "bottom"), options.pixels)
    return [
        pipeline.outpaint(
            inside(picture.image, options.pixels), picture.truth.scenery, window_size=WINDOW,
            seed=options.seed + number, num_inference_steps=options.steps, **sides, **way,
        ).image
        for number, picture in enumerate(pictures)
    ]  # fmt: skip


def compare(options: argparse.Namespace) -> tuple[Result, list[str]]:
    """All orders and classical fills on patterned and on smooth grounds."""
    figures: Result = {"pixels": options.pixels, "pictures": options.pictures}
    lines = []
    for patterned in (True, False):
        kind = "patterned" if patterned else "smooth"
        pictures = draw(options.pictures, options.pixels, patterned)
        lines.append(f"{kind} grounds, {len(pictures)} pictures, {options.pixels} px on each side:")
        ways: dict[str, list[np.ndarray]] = {}
        for order in options.orders:
            before = time.perf_counter()
            ways[order] = grow(pictures, options, window_order=order)
            lines.append(f"  ({order}: {time.perf_counter() - before:.0f} s)")
        for name in CLASSICAL:
            ways[name] = grow(pictures, options, strength=0.0, fill=name)
        figures[kind] = {n: measure(pictures, made, options.pixels) for n, made in ways.items()}
        for name, found in figures[kind].items():
            lines.append(
                f"  {name:8} PSNR {found['psnr']:6.2f} dB (mean of pictures "
                f"{found['psnr_mean']:6.2f})  seam {found['seam']:5.2f}  window borders "
                f"{found['window_borders']:5.2f}  known error {found['known_max_error']}"
            )
        if options.pictures_dir:
            save(pictures, ways, options.pictures_dir / f"outpaint_{kind}.png")
    return figures, lines


def save(pictures: Sequence[Any], ways: dict[str, list[np.ndarray]], file: Path) -> None:
    """A sheet: a row for each of the first pictures, first the truth."""
    from controlfill.images import grid, save_image

    rows = [[p.image, *(made[i] for made in ways.values())] for i, p in enumerate(pictures[:6])]
    save_image(file, grid(rows))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pixels", type=int, default=64, help="added on each side")
    parser.add_argument("--pictures", type=int, default=12, help="of each kind of ground")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pictures_dir", type=Path, help="where sheets of pictures go")
    common.add_output(parser)
    options = parser.parse_args()
    figures, lines = compare(options)
    common.report("outpaint", figures, lines, options.output)


if __name__ == "__main__":
    main()

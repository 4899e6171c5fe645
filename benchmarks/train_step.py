"""Our training step against that of diffusers' own script, both in one call.

    DIFFUSERS_TRAIN_CONTROLNET=.../train_controlnet.py python -m benchmarks.train_step

Both train a ControlNet on the same narrow SD 1.5, the same 64 JPEG pairs, the same batch and number
format, each run in a fresh process with a fixed number of threads, taking turns. The script is run
unmodified; it is part of diffusers' sources (examples/controlnet), not of its package. A ratio
above 1 says how many times less ours takes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common
from benchmarks.common import Result, ratio, run_child, times

DROPPED = 1  # with the first step, which has no beginning to measure from, two
STOCK = "DIFFUSERS_TRAIN_CONTROLNET"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stock", type=Path, default=os.environ.get(STOCK))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--width", type=int, default=64, help="first width of the UNet; 64: 35 M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument(
        "--clock", choices=["cpu", "wall"], default="cpu",
        help="processor time is not disturbed by other work on the machine; both are recorded",
    )  # fmt: skip
    parser.add_argument("--work_dir", type=Path, help="keeps base, pairs and caches")
    common.add_output(parser)
    return parser.parse_args()


def make_inputs(options: argparse.Namespace) -> None:
    """Base and pairs; in a child, since this process must stay small."""
    words = [options.work_dir, options.width, options.pairs]
    run_child(["benchmarks.make_inputs", *words], options.threads)


def child(what: str, options: argparse.Namespace, *more: object) -> Result:
    """The result of one child."""
    shared = ["--base", options.work_dir / f"base{options.width}", "--data", options.work_dir]
    sizes = [f"--{k}={getattr(options, k)}" for k in ("steps", "batch", "size", "threads")]
    words = ["benchmarks.train_child", what, *shared, *sizes, *more]
    return run_child([str(word) for word in words], options.threads)


def make_cache(options: argparse.Namespace) -> float | None:
    """Seconds of processor time of our cache pass; None where this version has no such command."""
    if not child("can_cache", options)["can_cache"]:
        return None
    folder = options.work_dir / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    return child("cache", options, "--cache", folder)[options.clock]


def step_seconds(result: Result, clock: str) -> float:
    """The median step of one run, warm-up left out."""
    return statistics.median(result[clock][DROPPED:])


def measure(precision: str, cached: bool, options: argparse.Namespace) -> Result:
    """Rounds of stock, ours and, where there is one, ours with the cache, in turn."""
    sides: dict[str, list[Result]] = {}
    fixed = ["--precision", precision]
    for number in range(options.rounds):
        turns = {"stock": ("stock", ["--stock", options.stock]), "ours": ("ours", [])}
        if cached:
            turns["cached"] = ("ours", ["--cache", options.work_dir / "cache"])
        # Every other round the other way round, so that a drift of the machine cancels out.
        order = list(turns) if number % 2 == 0 else list(turns)[::-1]
        for name in order:
            what, more = turns[name]
            sides.setdefault(name, []).append(child(what, options, *fixed, *more))
    return summarise(sides, options.clock)


def summarise(sides: dict[str, list[Result]], clock: str) -> Result:
    """Seconds and bytes of each side, and how many times less ours are."""
    seconds = {name: [step_seconds(r, clock) for r in runs] for name, runs in sides.items()}
    peaks = {name: [r["peak"] for r in runs] for name, runs in sides.items()}
    found: Result = {"runs": sides}
    for name in sides:
        found[name] = {
            "seconds": common.spread(seconds[name]),
            "peak_bytes": common.spread(peaks[name]),
            "speed": ratio(seconds["stock"], seconds[name]),
            "memory": ratio(peaks[name], peaks["stock"]),
        }
    return found


def describe(precision: str, found: Result) -> list[str]:
    """The lines of one number format."""
    lines = [f"{'fp32' if precision == 'no' else precision}:"]
    for name in ("stock", "ours", "cached"):
        if name in found:
            side = found[name]
            lines.append(
                f"  {name:7} {side['seconds']['median']:7.3f} s/step  {times(side['speed']):22}"
                f"peak {side['peak_bytes']['median'] / 2**20:6.0f} MiB, "
                f"{side['memory']['median']:.2f} of stock's"
            )
    return lines


def payback(seconds: float, found: Result, options: argparse.Namespace) -> str:
    """After how many epochs the cache pass has paid for itself."""
    saved = found["ours"]["seconds"]["median"] - found["cached"]["seconds"]["median"]
    epoch = saved * options.pairs / options.batch
    pays = f"pays after {seconds / epoch:.1f} epochs" if epoch > 0 else "never pays here"
    return f"  cache pass {seconds:.1f} s for {options.pairs} pictures: {pays}"


def compare(options: argparse.Namespace) -> None:
    """Guard, cache pass, rounds, report."""
    make_inputs(options)
    equal = child("guard", options)
    verdict = "equal" if equal["equal"] else "NOT EQUAL, ALL RATIOS BELOW ARE VOID"
    lines = [
        f"stock formula and ours: loss differs by {equal['loss_error']:.1e}, gradient by "
        f"{equal['gradient_error']:.1e} of itself (tolerance {equal['tolerance']:.0e}): {verdict}"
    ]
    cache = make_cache(options)
    figures: Result = {"guard": equal, "void": not equal["equal"], "cache_seconds": cache}
    child("stock", options, "--stock", options.stock)  # its table of pictures is made only once
    for precision in options.precisions:
        found = figures[precision] = measure(precision, cache is not None, options)
        lines += describe(precision, found)
        if cache is not None:
            lines.append(payback(cache, found, options))
    keys = ("rounds", "steps", "batch", "size", "width", "threads", "pairs", "clock")
    figures["options"] = {key: getattr(options, key) for key in keys}
    lines.append(", ".join(f"{k} {v}" for k, v in figures["options"].items()))
    common.report("train_step", figures, lines, options.output)


def main() -> None:
    """Compare, unless the stock script is not there."""
    options = parse()
    if options.stock is None or not Path(options.stock).is_file():
        print(
            f"skipped: give diffusers' examples/controlnet/train_controlnet.py by {STOCK} or "
            f"--stock (now: {options.stock})"
        )
        return
    options.stock = Path(options.stock).resolve()
    if options.work_dir:
        options.work_dir = options.work_dir.resolve()
        compare(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.work_dir = Path(folder)
        compare(options)


if __name__ == "__main__":
    began = time.time()
    main()
    print(f"{time.time() - began:.0f} s in all")

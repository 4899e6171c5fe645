"""What the benchmarks of full-size networks share: the device, its clock, its memory, options."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Result

# Steps before the clock counts.
WARM = 3


def add_options(parser: argparse.ArgumentParser, batches: list[int], steps: int) -> None:
    """The options that all of them have."""
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seconds", type=float, default=480, help="start no further case after it")
    parser.add_argument("--tiny", action="store_true", help="narrow networks, here")
    common.add_output(parser)


def pick(options: argparse.Namespace) -> tuple[str, str]:
    """The device and the family of networks that `options` ask for."""
    if options.tiny:
        return "cpu", f"{options.family}-tiny"
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; --tiny runs the same code on narrow networks")
    return "cuda", options.family


def on_gpu(device: str) -> bool:
    """Whether `device` has a clock and a memory of its own."""
    return torch.device(device).type == "cuda"


def name_of(device: str) -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if on_gpu(device) else "CPU, narrow networks"


def peak_gib(device: str) -> float:
    """The most memory that was held since `free`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if on_gpu(device) else 0.0


def synchronize(device: str) -> None:
    """Wait until the device has done its work."""
    if on_gpu(device):
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Give memory back, and count its peak anew."""
    gc.collect()
    if on_gpu(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(steps: Iterator[Any], device: str) -> Iterator[float]:
    """Seconds of each step, the first with its start."""
    before = time.perf_counter()
    for _ in steps:
        synchronize(device)
        now = time.perf_counter()
        yield now - before
        before = now


def report(name: str, figures: Result, lines: Sequence[str], options: argparse.Namespace) -> None:
    """Print and write the result, named by where it was measured."""
    where = "tiny" if options.tiny else "gpu"
    common.report(f"{name}_{where}", figures, lines, options.output)

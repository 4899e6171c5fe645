"""What the benchmarks share: ratios of repeated measurements, and results that explain themselves.

Imports no torch: the process that starts others must stay small, see `peak_bytes`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "datasets", "numpy",
    "opencv-python-headless", "pillow", "msgspec", "pycocotools",
)  # fmt: skip
Result = dict[str, Any]


def machine() -> Result:
    """The machine in generic words, so that figures can be compared."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [li for li in info.read_text().splitlines() if li.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "load": load}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_bytes() -> int:
    """The most memory this process ever held.

    Linux's getrusage would also count the parent's at the time of the fork; VmHWM starts anew.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = [li for li in status.read_text().splitlines() if li.startswith("VmHWM")]
        return int(lines[0].split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_child(arguments: Sequence[str], threads: int = 1) -> Result:
    """Run `python -m arguments` with a fixed number of threads; its last line is JSON.

    Raises RuntimeError with the end of what the child wrote when it fails.
    """
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **{name: str(threads) for name in counts}}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: Sequence[float]) -> Result:
    """Median, least and most."""
    middle = statistics.median(values)
    return {"median": middle, "min": min(values), "max": max(values), "runs": len(values)}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Result:
    """How many times less ours is: the ratio of each round, both measured one after the other."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def times(found: Result) -> str:
    """A ratio for people."""
    return f"{found['median']:.2f}x ({found['min']:.2f}-{found['max']:.2f})"


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option that all benchmarks have."""
    parser.add_argument(
        "--output", type=Path, help="folder for <name>-<date>.json and .md, e.g. benchmarks/results"
    )


def settings(told: argparse.Namespace) -> Result:
    """The options of a benchmark that its figures depend on: not where results are written."""
    return {name: v for name, v in vars(told).items() if name not in ("output", "pictures")}


def report(name: str, figures: Result, lines: Sequence[str], output: Path | None) -> None:
    """Print `lines`; with an `output` folder also write them and `figures` there."""
    print("\n".join(lines))
    if output is None:
        return
    date = time.strftime("%Y-%m-%d")
    about = {"name": name, "date": date, "machine": machine(), "versions": versions()}
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "figures": figures}, indent=2, default=str)
    (output / f"{name}-{date}.json").write_text(text + "\n")
    (output / f"{name}-{date}.md").write_text(page(about, lines))
    print(f"written: {output / name}-{date}.json and .md")


def page(about: Result, lines: Sequence[str]) -> str:
    """A result as Markdown."""
    where = about["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    load = "" if where["load"] is None else f", load {where['load']:.1f} at the end"
    head = f"# {about['name']}, {about['date']}\n\n{where['cores']} cores, {where['cpu']}{load}\n"
    return f"{head}{packages}\n\n```\n" + "\n".join(lines) + "\n```\n"

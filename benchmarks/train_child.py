"""One child of the training benchmark: trains some steps and prints one line of JSON.

    python -m benchmarks.train_child stock|ours|guard|can_cache|cache --base DIR --data DIR ...

Each step's wall-clock and processor time, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.common import Result, peak_bytes

LEARNING_RATE = 1e-5


class Clock:
    """When each step was done."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        """A step is done."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def result(self, **more: Any) -> Result:
        """Seconds of each step but the first (which has no beginning), and memory."""
        wall, cpu = ([b - a for a, b in itertools.pairwise(t)] for t in (self.wall, self.cpu))
        return {"wall": wall, "cpu": cpu, "peak": peak_bytes(), **more}


def train_stock(options: argparse.Namespace) -> Result:
    """The unmodified script, with its progress bar as the clock."""
    import datasets  # noqa: F401
    import diffusers
    import tqdm.auto
    import transformers

    # The script imports these; they must look for torchvision before the stand-in is there.
    for module, name in (
        (transformers, "CLIPTextModel"), (transformers, "AutoTokenizer"),
        (diffusers, "StableDiffusionControlNetPipeline"), (diffusers, "ControlNetModel"),
    ):  # fmt: skip
        getattr(module, name)
    from benchmarks import stand_in

    stand_in.install()
    clock = Clock()

    class Bar(tqdm.auto.tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if self.desc and self.desc.startswith("Steps"):
                clock.tick()
            return super().update(n)

    vars(tqdm.auto)["tqdm"] = Bar
    with tempfile.TemporaryDirectory() as work:
        sys.argv = [str(options.stock), *stock_flags(options, work)]
        runpy.run_path(str(options.stock), run_name="__main__")
    return clock.result()


def stock_flags(options: argparse.Namespace, work: str) -> list[str]:
    """The script's own words for the run."""
    flags = {
        "pretrained_model_name_or_path": options.base,
        "controlnet_model_name_or_path": options.base / "controlnet",
        "train_data_dir": options.data / "imagefolder",
        "cache_dir": options.data / "datasets",
        "output_dir": work,
        "resolution": options.size,
        "train_batch_size": options.batch,
        "max_train_steps": options.steps,
        "learning_rate": LEARNING_RATE,
        "lr_warmup_steps": 0,
        "mixed_precision": options.precision,
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def train_ours(options: argparse.Namespace) -> Result:
    """Our trainer on the same pairs, cut from the centre as the stock script does."""
    from controlfill.options import TrainOptions
    from controlfill.training.run import train

    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        words: dict[str, Any] = {
            "image_dir": str(options.data / "pairs"),
            "pretrained_model_name_or_path": str(options.base),
            "controlnet_model_name_or_path": str(options.base / "controlnet"),
            "conditioning": "image",
            "crop": "center",
            "image_size": options.size,
            "batch_size": options.batch,
            "max_steps": options.steps,
            "learning_rate": LEARNING_RATE,
            "mixed_precision": options.precision,
            "num_workers": 0,  # the stock script's own setting
            "save_steps": 10**6,
            "log_images_steps": 0,
            "output_dir": Path(work),
        }
        if options.cache:
            words["cache_dir"] = options.cache
        for _ in train(TrainOptions(**words), open_pairs(options.data / "pairs")):
            clock.tick()
    return clock.result(cached=bool(options.cache))


def open_pairs(folder: Path) -> Any:
    """None where the package reads tables of pairs itself, else a reader of our own."""
    if importlib.util.find_spec("controlfill.data.tables"):
        return None
    from controlfill.data.sample import Sample
    from controlfill.images import open_image

    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]

    class Pairs:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Sample:
            row = rows[index]
            image, hint = (open_image(folder / row[k]).rgb for k in ("image", "conditioning_image"))
            return Sample(image=image, hint=hint, prompt=row["text"])

    return Pairs()


def can_cache(_: argparse.Namespace) -> Result:
    """Whether this version has a latent cache."""
    from controlfill.options import TrainOptions

    return {"can_cache": "cache_dir" in {f.name for f in fields(TrainOptions)}}


def fill_cache(options: argparse.Namespace) -> Result:
    """Our cache pass, as the user would run it: its seconds with start-up."""
    words = {
        "pretrained_model_name_or_path": options.base,
        "cache_dir": options.cache,
        "crop": "center",
        "image_size": options.size,
        "batch_size": options.batch,
        "num_workers": 0,
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "controlfill", "cache", str(options.data / "pairs"), *flags]
    wall, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after, wall = os.times(), time.perf_counter() - wall
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
    cpu = sum(after[2:4]) - sum(before[2:4])
    return {"wall": wall, "cpu": cpu}


def guard(options: argparse.Namespace) -> Result:
    """Whether our loss and gradient are those of the stock formula."""
    from benchmarks.guard import compare

    return compare(options.base, options.data / "pairs", options.size, options.batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What libraries print stays out of the line of JSON."""
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def parse() -> argparse.Namespace:
    """The options of one child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=list(WORK))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stock", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


WORK = {
    "stock": train_stock, "ours": train_ours, "guard": guard,
    "can_cache": can_cache, "cache": fill_cache,
}  # fmt: skip


def main() -> None:
    """Run one child."""
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    with quiet():
        result = WORK[options.what](options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

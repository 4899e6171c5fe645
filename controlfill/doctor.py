"""Check an installation: versions, device, memory, and one training and one sampling step."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from controlfill.inference.complete import inpaint
from controlfill.inference.pipeline import load, pick_device
from controlfill.options import HoleOptions, TrainOptions
from controlfill.training.run import train

PACKAGES = ("controlfill", "torch", "diffusers", "transformers", "accelerate", "safetensors",
            "opencv-python-headless", "pillow", "numpy")  # fmt: skip


def examine(device: str) -> Iterator[str]:
    """One line per finding; raises whatever a broken installation raises."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield f"{package} {installed(package)}"
    place = pick_device(device)
    yield f"device {place}: {describe(place)}"
    yield f"free disk space here: {free_gb(Path.cwd()):.1f} GB"
    yield smoke_train(place)
    yield smoke_inpaint(device)
    yield "all is well"


def installed(package: str) -> str:
    """The version of `package`, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "is missing"


def describe(place: torch.device) -> str:
    """Name and memory of a device."""
    if place.type == "cuda":
        about = torch.cuda.get_device_properties(place)
        free, total = torch.cuda.mem_get_info(place)
        return f"{about.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return f"{torch.get_num_threads()} threads, torch {torch.backends.cpu.get_cpu_capability()}"


def free_gb(folder: Path) -> float:
    """Free space of the disk that holds `folder`, in GB."""
    import shutil

    return shutil.disk_usage(folder).free / 1e9


def smoke_train(place: torch.device) -> str:
    """One training step on the embedded base."""
    if place.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(
            image_dir="world:shapes",
            pretrained_model_name_or_path="embedded",
            image_size=64,
            max_steps=1,
            num_workers=0,
            log_images_steps=0,
            output_dir=Path(folder),
        )
        began = time.perf_counter()
        (step,) = train(options)
    return f"one training step: loss {float(step.loss):.4f}, {time.perf_counter() - began:.1f} s"


def smoke_inpaint(device: str) -> str:
    """One sampling step with the embedded pair."""
    began = time.perf_counter()
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    inpaint(load(device=device), image, mask, HoleOptions(num_inference_steps=1))
    return f"one sampling step: {time.perf_counter() - began:.1f} s"

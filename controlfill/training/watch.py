"""What happens beside learning: functions of a Step that log, draw panels, save and stop."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from controlfill.data.hints import show_hint
from controlfill.data.sample import Batch
from controlfill.errors import UserError
from controlfill.images import as_rgb, grid, to_uint8
from controlfill.inference.generate import generate_batch
from controlfill.inference.pipeline import Pipeline
from controlfill.options import SampleOptions
from controlfill.training.sharding import part_of
from controlfill.training.step import Step, mean_parts

log = logging.getLogger(__name__)
PANEL_STEPS = 10


class Meter:
    """Numbers of the steps since they were last read; the device is waited for only then."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.since = time.perf_counter()

    def add(self, step: Step) -> None:
        """Remember `step`."""
        self.steps.append(step)

    def read(self) -> dict[str, float]:
        """Means since the last reading. Raises UserError when the loss is no number any more."""
        loss = float(torch.stack([step.loss for step in self.steps]).mean())
        last = self.steps[-1]
        check_finite(loss, last.index)
        now = time.perf_counter()
        values = {
            "train/loss": loss,
            "train/lr": last.learning_rate,
            "train/grad_norm": float(last.grad_norm),
            "train/images_per_second": sum(s.images for s in self.steps) / (now - self.since),
            "train/memory_gb": memory_gb(),
        }
        parts = mean_parts([step.parts for step in self.steps])
        values |= {f"train/text_{name}": float(mean) for name, mean in parts.items()}
        self.steps, self.since = [], now
        return values


def check_finite(loss: float, step: int) -> None:
    """Raise UserError unless `loss` is a number."""
    if not np.isfinite(loss):
        raise UserError(
            f"the loss became {loss} at or before step {step}; lower --learning_rate, or train "
            "with --mixed_precision no or bf16. Checkpoints saved before are untouched"
        )


@torch.no_grad()
def check_weights(network: nn.Module, step: int) -> None:
    """Raise UserError when a weight is no number: the loss tells that only one step later."""
    if not all(bool(torch.isfinite(part_of(p)).all()) for p in network.parameters()):
        raise UserError(
            f"the weights became NaN or infinite at or before step {step}; lower --learning_rate. "
            "Checkpoints saved before are untouched"
        )


def memory_gb() -> float:
    """Most memory used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Skipped:
    """Names each picture that could not be used once, and counts them at the end."""

    def __init__(self) -> None:
        self.reasons: dict[str, None] = {}

    def add(self, step: Step) -> None:
        """Name the pictures that `step` met for the first time."""
        for reason in step.skipped:
            if reason not in self.reasons:
                log.warning("skipped: %s", reason)
                self.reasons[reason] = None


def every(steps: int, do: Callable[[Step], Any]) -> Callable[[Step], None]:
    """Do it at each multiple of `steps` and at the last step; never when `steps` is 0."""

    def watch(step: Step) -> None:
        if steps and (step.index % steps == 0 or step.index == step.total):
            do(step)

    return watch


def draw_panels(pipeline: Pipeline, batch: Batch, seed: int) -> np.ndarray:
    """One row per picture: original, masked, mask, hint, prediction; always the same noise.

    Where the data gives the hint nothing is masked, and the two in between are left out; without a
    ControlNet nobody looks at the hint.
    """
    options = SampleOptions(num_inference_steps=PANEL_STEPS, seed=seed)
    predicted = to_uint8(generate_batch(pipeline, batch, options))
    originals, holes = to_uint8(batch.image), to_uint8(batch.mask)[..., 0]
    hints = show_hint(batch.hint, pipeline.spec)
    rows = []
    for original, hole, hint, prediction in zip(originals, holes, hints, predicted, strict=True):
        masked = np.where(hole[..., None] > 0, np.uint8(128), original)
        between = [] if pipeline.spec.given else [masked, as_rgb(hole)]
        shown = [] if pipeline.network is None else [hint]
        rows.append([original, *between, *shown, prediction])
    return grid(rows)

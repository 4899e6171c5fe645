"""The demo: the whole road in one walk, on the embedded base, without any download."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from controlfill.data.hints import open_spec
from controlfill.data.preview import preview
from controlfill.data.sample import PreparedSource
from controlfill.data.sources import make_preparation, open_source
from controlfill.evaluation.evaluate import evaluate
from controlfill.evaluation.report import figure, write_report
from controlfill.images import save_image
from controlfill.inference.pipeline import load
from controlfill.options import DemoOptions, EvaluateOptions, TrainOptions
from controlfill.training.run import train

WORLD = "world:shapes"


def demo(options: DemoOptions, report: Callable[[str, int, int], None]) -> Path:
    """Preview data, train a few hundred steps, fill holes, measure; returns the page to open."""
    folder = options.output_dir
    sample_grid = draw_samples(folder, options.seed)
    losses = train_a_little(options, report)
    curve = draw_curve(losses)
    save_image(folder / "loss.png", curve)
    pipeline = load()
    settings = EvaluateOptions(
        data=WORLD, num_samples=options.num_samples, output_dir=folder, seed=options.seed
    )
    result = evaluate(pipeline, settings, report)
    extra = introduction(options, losses, sample_grid, curve)
    return write_report(result, pipeline.spec, folder, extra)


def draw_samples(folder: Path, seed: int) -> np.ndarray:
    """The grid of training samples, kept as data_sample.png."""
    options = EvaluateOptions(data=WORLD, seed=seed)
    data = PreparedSource(open_source(WORLD, options), make_preparation(options), seed)
    picture, _ = preview(data, open_spec("masked-image"), 4)
    save_image(folder / "data_sample.png", picture)
    return picture


def train_a_little(options: DemoOptions, report: Callable[[str, int, int], None]) -> list[float]:
    """A fresh ControlNet for a few hundred steps; returns the loss of each step."""
    settings = TrainOptions(
        image_dir=WORLD,
        pretrained_model_name_or_path="embedded",
        image_size=64,
        batch_size=16,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        max_steps=options.max_steps,
        save_steps=options.max_steps,
        log_images_steps=options.max_steps,
        output_dir=options.output_dir / "outputs",
        num_workers=1,
        seed=options.seed,
    )
    losses = []
    for step in train(settings):
        losses.append(float(step.loss))
        report(f"training, loss {np.mean(losses[-20:]):.3f}", step.index, step.total)
    return losses


def draw_curve(losses: list[float], size: tuple[int, int] = (220, 640)) -> np.ndarray:
    """The losses as a curve: every step pale, the running mean of 25 dark."""
    height, width = size
    canvas = np.full((height, width, 3), 255, np.uint8)
    mean = np.convolve(losses, np.ones(min(25, len(losses))) / min(25, len(losses)), "valid")
    top = float(np.percentile(losses, 99)) * 1.05
    for values, colour, thickness in ((losses, (200, 215, 235), 1), (mean, (30, 80, 160), 2)):
        x = np.linspace(50, width - 10, len(values))
        y = height - 25 - np.clip(np.asarray(values) / top, 0, 1) * (height - 40)
        points = np.stack([x, y], axis=1).round().astype(np.int32)
        cv2.polylines(canvas, [points], False, colour, thickness, cv2.LINE_AA)
    for value in (0.0, top / 2, top):
        y = round(height - 25 - value / top * (height - 40))
        cv2.putText(canvas, f"{value:.2f}", (4, y + 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (90, 90, 90))
    cv2.putText(
        canvas, f"loss over {len(losses)} steps", (width // 2 - 70, height - 6),
        cv2.FONT_HERSHEY_SIMPLEX, 0.42, (60, 60, 60), 1, cv2.LINE_AA,
    )  # fmt: skip
    return canvas


def introduction(
    options: DemoOptions, losses: list[float], samples: np.ndarray, curve: np.ndarray
) -> str:
    """The page's first part: what was trained, and what is measured below."""
    part = max(1, len(losses) // 10)
    first, last = np.mean(losses[:part]), np.mean(losses[-part:])
    words = (
        f"A fresh ControlNet was trained for {len(losses)} steps on the embedded base: its loss "
        f"went from {first:.3f} to {last:.3f}. It is in "
        f"{options.output_dir / 'outputs'}; the figures below are those of the ControlNet that "
        "is shipped, on pictures neither of them has seen."
    )
    pictures = figure(curve, "loss", curve.shape[1]) + figure(samples, "training samples", 900)
    return f"<p>{html.escape(words)}</p>{pictures}"

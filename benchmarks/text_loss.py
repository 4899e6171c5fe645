"""Does the text loss make labels better to read? The same training with and without it, judged.

    python -m benchmarks.text_loss --control RUN --steps 100 --seeds 3

Every run starts from one ControlNet and the same base and sees the same pictures in the same order.
What counts is how many labels of *sampled* pictures of held-out themes are read by the reader that
is not in the loss; the other's figures are shown beside it. Ceilings are the true pictures, and
those after the autoencoder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Result
from controlfill.data.skin_world import SKIN_WORLDS, SkinSource
from controlfill.data.worlds import HELD_OUT
from controlfill.images import to_tensor, to_uint8
from controlfill.inference.complete import follow
from controlfill.inference.pipeline import Pipeline, load
from controlfill.models.ocr import READERS, load_reader, read_boxes
from controlfill.options import HoleOptions, TrainOptions
from controlfill.training.run import train
from controlfill.training.step import Step

# So little that nothing is learned from it, while labels are drawn and read all the same.
NOTHING = 1e-9


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="embedded-skins")
    parser.add_argument("--control", default="embedded-skins")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--reader", choices=READERS, default="v6", help="the one in the loss")
    parser.add_argument("--scale", type=float, default=0.02)
    parser.add_argument("--feature", type=float, default=1.0)
    parser.add_argument("--ctc", type=float, default=10.0)
    parser.add_argument("--max_t", type=float, default=0.6)
    parser.add_argument("--box_weight", type=float, default=2.0)
    common.add_output(parser)
    return parser.parse_args()


def options_of(told: argparse.Namespace, seed: int, scale: float, folder: Path) -> TrainOptions:
    """The run of one arm."""
    return TrainOptions(
        image_dir="world:skins", conditioning="image", crop="patch", image_size=128,
        pretrained_model_name_or_path=told.base, controlnet_model_name_or_path=told.control,
        batch_size=told.batch, max_steps=told.steps, learning_rate=told.rate, lr_warmup_steps=10,
        lr_scheduler="cosine", ema_decay=0.98, mixed_precision="bf16", num_workers=0,
        proportion_empty_prompts=0.1, text_box_weight=told.box_weight, text_loss=scale,
        text_loss_feature=told.feature, text_loss_ctc=told.ctc, text_loss_max_t=told.max_t,
        text_loss_ocr=told.reader, save_steps=10**6, log_images_steps=0, log_steps=25, seed=seed,
        output_dir=folder,
    )  # fmt: skip


def learn(options: TrainOptions) -> tuple[str, Result]:
    """Train; the run's folder, and the course of its losses as means of a quarter each."""
    steps: list[Step] = list(train(options))
    course = {"loss": [float(step.loss) for step in steps]}
    for name in ("ctc", "floor", "excess", "feature"):
        course[name] = [float(step.parts[name]) for step in steps if name in step.parts]
    quarters = {name: [float(p.mean()) for p in np.array_split(v, 4)] for name, v in course.items()}
    (folder,) = options.output_dir.iterdir()
    return str(folder / "final_model"), quarters


def judge(pictures: list[np.ndarray], source: SkinSource) -> Result:
    """The share of labels that each reader reads in pictures of the first themes of `source`."""
    found: Result = {name: [] for name in READERS}
    for number, picture in enumerate(pictures):
        labels = source[number].labels
        boxes = [label.box for label in labels]
        for name in READERS:
            texts = read_boxes(load_reader(name), picture, boxes, source.signs)
            found[name] += [t == label.text for t, label in zip(texts, labels, strict=True)]
    return {name: float(np.mean(right)) for name, right in found.items()}


def paint(pipeline: Pipeline, source: SkinSource, count: int, seed: int = 0) -> list[np.ndarray]:
    """A picture for hint and words of each of the first themes; others with another `seed`."""
    seeds = [n + 1000 * seed for n in range(count)]
    asked = [
        HoleOptions(prompt=source[n].prompt, seed=s, window_size=0) for n, s in enumerate(seeds)
    ]
    return [follow(pipeline, source[n].hint, asked[n]).image for n in range(count)]


@torch.no_grad()
def through_vae(pipeline: Pipeline, source: SkinSource, count: int) -> list[np.ndarray]:
    """The true pictures after the autoencoder."""
    bundle = pipeline.bundle
    pictures = [to_tensor(source[n].image[None]) for n in range(count)]
    return [to_uint8(bundle.decode(bundle.encode_image(p * 2 - 1)))[0] for p in pictures]


def main() -> None:
    """Both arms for every seed, then the judgement."""
    told = parse()
    source = SkinSource(SKIN_WORLDS["skins"], HELD_OUT, told.pictures, held_out=True)
    start = load(told.base, told.control, device="cpu")
    results: Result = {
        "true pictures": judge([source[n].image for n in range(told.pictures)], source),
        "after the autoencoder": judge(through_vae(start, source, told.pictures), source),
        "at the start": judge(paint(start, source, told.pictures), source),
    }
    other = next(name for name in READERS if name != told.reader)
    lines = [f"in the loss: {told.reader}; judge: {other}", ""]
    lines += [f"{name:24s} judge {r[other]:.3f}  in the loss {r[told.reader]:.3f}"
              for name, r in results.items()]  # fmt: skip
    for seed in range(told.seeds):
        for arm, scale in (("without", NOTHING), ("with", told.scale)):
            with tempfile.TemporaryDirectory() as folder:
                control, course = learn(options_of(told, seed, scale, Path(folder)))
                pipeline = load(told.base, control, device="cpu")
                read = judge(paint(pipeline, source, told.pictures), source)
            results[f"{arm} {seed}"] = {**read, "course": course}
            excess, loss = course["excess"], course["loss"]
            lines.append(
                f"seed {seed} {arm:8s} judge {read[other]:.3f}  in the loss {read[told.reader]:.3f}"
                f"  ctc above floor {excess[0]:.3f} -> {excess[-1]:.3f}  feature "
                f"{course['feature'][0]:.3f} -> {course['feature'][-1]:.3f}  loss {loss[-1]:.4f}"
            )
            print(lines[-1], flush=True)
    for arm in ("without", "with"):
        mean = statistics.mean(results[f"{arm} {seed}"][other] for seed in range(told.seeds))
        lines.append(f"{arm:8s} judge, mean of seeds {mean:.3f}")
    common.report("text_loss", {"options": common.settings(told), **results}, lines, told.output)


if __name__ == "__main__":
    main()

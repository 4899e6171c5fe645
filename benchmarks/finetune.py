"""What does fine-tuning teach, and what is forgotten? A new object in the world of shapes.

    python -m benchmarks.finetune

The base has never seen a red cross. It learns one from twelve pictures, as a LoRA and in all its
weights, with class pictures (painted by the base itself) and without. Then it is asked for red
crosses on grounds it was not taught them on, and for what it knew before, in pictures that are
wholly masked; the judge of the world says whether object and colour are right. Two more arms learn
two new objects, with a prompt for every picture and with one prompt for all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Result
from controlfill.data.sample import Sample, collate
from controlfill.data.worlds import HELD_OUT, WORLDS, Chance, Truth, World, paint
from controlfill.evaluation.judge import judge
from controlfill.images import grid, save_image, to_uint8
from controlfill.inference.generate import generate_batch
from controlfill.inference.pipeline import Pipeline, load
from controlfill.options import FinetuneOptions, SampleOptions
from controlfill.training.run import train

OLD = WORLDS["shapes"]
# Objects that the embedded base has never seen; their colours are some that its autoencoder, which
# is not trained here, gives back well enough for the judge.
RED_CROSS, WHITE_RING = ("red", "cross"), ("white", "ring")
NEW = World(colours=OLD.colours, shapes=(*OLD.shapes, "cross", "ring"), grid=OLD.grid)
SIDE, PICTURES, GROUP = 64, 12, 32
EVERYTHING = np.full((SIDE, SIDE), 255, np.uint8)
Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn: a LoRA or all weights, with class pictures or without."""

    lora: bool
    prior: bool
    pairs: tuple[Pair, ...] = (RED_CROSS,)
    prompt: str = ""

    @property
    def name(self) -> str:
        """What it is called in the table."""
        each = ", a prompt each" if len(self.pairs) > 1 else ""
        prompts = ", one prompt" if self.prompt else each
        return f"{'LoRA' if self.lora else 'full'}, {'prior' if self.prior else 'alone'}{prompts}"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="embedded-inpaint", help="an inpaint base of the world")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--lora_steps", type=int, default=1200)
    parser.add_argument("--lora_rate", type=float, default=1.5e-3)
    parser.add_argument("--full_steps", type=int, default=1400)
    parser.add_argument("--full_rate", type=float, default=4.5e-4)
    parser.add_argument("--two_steps", type=int, default=600, help="of the runs with two objects")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--class_pictures", type=int, default=800)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--asked", type=int, default=96, help="new objects asked for per run")
    parser.add_argument("--known", type=int, default=128, help="old prompts asked for per run")
    parser.add_argument("--only", nargs="+", choices=["concept", "two"])
    parser.add_argument("--pictures", type=Path, help="where to write what was painted")
    common.add_output(parser)
    return parser.parse_args()


def new_truth(pair: Pair, seed: int) -> Truth:
    """A new object on the ground of picture `seed` of the old world, in its own colour nowhere."""
    old = OLD.draw(seed, (8, 8)).truth
    ground = tuple(old.colour if c == pair[0] else c for c in old.ground_colours)
    return replace(old, colour=pair[0], shape=pair[1], ground_colours=ground)


def write_pictures(folder: Path, pairs: Sequence[Pair], seed: int, told: bool = True) -> Path:
    """Twelve pictures of new objects, each with its prompt beside it if they are to be `told`."""
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        own = 1000 * seed + number
        truth = new_truth(pairs[number % len(pairs)], own)
        chance = Chance(np.random.default_rng((own, 7)), NEW.grid)
        save_image(folder / f"{number:02d}.png", paint(truth, chance, (SIDE, SIDE)).image)
        if told:
            (folder / f"{number:02d}.txt").write_text(truth.caption)
    return folder


def write_class(folder: Path, pipeline: Pipeline, count: int) -> Path:
    """Class pictures: what the base paints when it is asked for what it knows."""
    folder.mkdir(parents=True)
    truths = [OLD.draw(seed, (8, 8)).truth for seed in range(count)]
    for number, picture in enumerate(ask(pipeline, truths, SampleOptions(seed=10_000))):
        save_image(folder / f"{number:03d}.png", picture)
        (folder / f"{number:03d}.txt").write_text(truths[number].caption)
    return folder


def ask(pipeline: Pipeline, truths: Sequence[Truth], asked: SampleOptions) -> list[np.ndarray]:
    """A wholly masked picture for each of `truths`."""
    blank, made = np.full((SIDE, SIDE, 3), 127, np.uint8), []
    for start in range(0, len(truths), GROUP):
        part = truths[start : start + GROUP]
        samples = [Sample(image=blank, mask=EVERYTHING, prompt=t.caption) for t in part]
        batch = collate(samples, pipeline.spec)
        made += list(
            to_uint8(generate_batch(pipeline, batch, replace(asked, seed=asked.seed + start)))
        )
    return made


def accuracy(
    pipeline: Pipeline, truths: Sequence[Truth], guidance: float
) -> tuple[float, np.ndarray]:
    """The share of pictures that show what was asked for, and the first of them in a row."""
    made = ask(pipeline, truths, SampleOptions(seed=0, guidance_scale=guidance))
    verdicts = [judge(p, EVERYTHING, t, NEW) for p, t in zip(made, truths, strict=True)]
    return float(np.mean([v.colour and v.shape for v in verdicts])), grid([made[:8]])


def options_of(told: argparse.Namespace, arm: Arm, seed: int, data: Path) -> FinetuneOptions:
    """The run of one arm."""
    prior = (
        {"with_prior_preservation": True, "class_data_dir": data.parent / "class",
         "class_prompt": "a shape", "num_class_images": told.class_pictures}
        if arm.prior
        else {}
    )  # fmt: skip
    lora = {"use_lora": True, "lora_target_modules": LAYERS} if arm.lora else {}
    rate = told.lora_rate if arm.lora else told.full_rate
    return FinetuneOptions(
        pretrained_model_name_or_path=told.base, instance_prompt=arm.prompt,
        instance_data_dir=str(data / ("bare" if arm.prompt else "new")), image_size=SIDE,
        mask_kinds=("full=6", "rectangles", "ellipse", "border"),
        mask_area=(0.3, 0.9), batch_size=told.batch, learning_rate=rate, train_text_encoder=True,
        text_encoder_lr=rate / 5, lr_scheduler="cosine", lr_warmup_steps=10, ema_decay=0.99,
        max_steps=steps_of(told, arm), num_workers=0, log_images_steps=0, save_steps=10**6,
        seed=seed, output_dir=data / f"{arm.name}", **lora, **prior,
    )  # fmt: skip


def steps_of(told: argparse.Namespace, arm: Arm) -> int:
    """How long an arm learns; alone half as long, and still it forgets more."""
    steps = told.lora_steps if arm.lora else told.full_steps
    return told.two_steps if len(arm.pairs) > 1 else steps if arm.prior else steps // 2


def learn(options: FinetuneOptions, base: str) -> Pipeline:
    """Train, and load what was trained."""
    for _ in train(options):
        pass
    (run,) = options.output_dir.iterdir()
    final = str(run / "final_model")
    return load(base, loras=(final,), device="cpu") if options.use_lora else load(final)


def run_arm(told: argparse.Namespace, arm: Arm, seed: int, data: Path) -> Result:
    """Train one arm from the pictures in `data`; the shares of new and of old objects after it."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // told.jobs))
    pipeline, found = learn(options_of(told, arm, seed, data), told.base), {}
    for name, truths in asked_of(told, arm.pairs).items():
        found[name], row = accuracy(pipeline, truths, told.guidance_scale)
        if told.pictures:
            file = f"{arm.name} {name} {seed}.png".replace(", ", "-").replace(" ", "-")
            save_image(told.pictures / file, row)
    print(seed, arm.name, found, flush=True)
    return found


def asked_of(told: argparse.Namespace, pairs: Sequence[Pair]) -> dict[str, list[Truth]]:
    """What is asked for: new objects on grounds they were not taught on, and held-out old ones."""
    new = (new_truth(pairs[n % len(pairs)], HELD_OUT + 500 + n) for n in range(told.asked))
    old = (OLD.draw(HELD_OUT + n, (8, 8)).truth for n in range(told.known))
    return {"new": list(new), "old": list(old)}


def compare(told: argparse.Namespace, arms: Sequence[Arm]) -> Result:
    """Every arm for every seed, `told.jobs` at a time: the shares of new and of old objects."""
    before = load(told.base, device="cpu")
    asked = asked_of(told, arms[0].pairs).items()
    found: Result = {
        "before": {
            name: [accuracy(before, truths, told.guidance_scale)[0]] for name, truths in asked
        }
    }
    seeds = range(told.first_seed, told.first_seed + told.seeds)
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(told.jobs, mp_context=spawn) as pool,
    ):
        write_class(Path(folder) / "class", before, told.class_pictures)
        for seed in seeds:
            write_pictures(Path(folder) / str(seed) / "new", arms[0].pairs, seed)
            write_pictures(Path(folder) / str(seed) / "bare", arms[0].pairs, seed, told=False)
        runs = {(arm, seed): pool.submit(run_arm, told, arm, seed, Path(folder) / str(seed))
                for seed in seeds for arm in arms}  # fmt: skip
        for arm in arms:
            shares = [runs[arm, seed].result() for seed in seeds]
            found[arm.name] = {name: [share[name] for share in shares] for name in shares[0]}
    return found


def lines_of(title: str, found: Result) -> list[str]:
    """The table of one comparison."""
    lines = [title]
    for name, shares in found.items():
        means = {kind: statistics.mean(values) for kind, values in shares.items()}
        each = " ".join(f"{value:.2f}" for value in shares["new"])
        lines.append(f"  {name:24s} new {means['new']:.3f}   old {means['old']:.3f}   ({each})")
    return lines


def main() -> None:
    """Both comparisons."""
    told = parse()
    wanted = told.only or ["concept", "two"]
    figures, lines = {}, []
    if "concept" in wanted:
        arms = [Arm(lora=lora, prior=prior) for prior in (True, False) for lora in (True, False)]
        figures["concept"] = compare(told, arms)
        lines += lines_of("a red cross, from 12 pictures", figures["concept"])
    if "two" in wanted:
        prompts = ("", "red cross or white ring on background")
        both = (RED_CROSS, WHITE_RING)
        arms = [Arm(lora=True, prior=True, pairs=both, prompt=prompt) for prompt in prompts]
        figures["two"] = compare(told, arms)
        lines += lines_of("a red cross and a white ring, from 6 pictures each", figures["two"])
    common.report("finetune", {"options": common.settings(told), **figures}, lines, told.output)


# Attention, and where the prompt scales and shifts the features of the embedded base.
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "proj_in", "proj_out", "ff.net.0.proj",
    "ff.net.2", "conv1", "conv2",
)  # fmt: skip

if __name__ == "__main__":
    main()

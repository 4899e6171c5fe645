"""What does fine-tuning teach, and what is forgotten? A new object in the world of shapes.

    python -m benchmarks.finetune

The base has never seen a red cross. It learns one from twelve pictures, as a LoRA and in all its
weights, with class pictures (painted by the base itself) and without. Then it is asked for red
crosses on grounds it was not taught them on, and for what it knew before, in pictures that are
wholly masked; the judge of the world says whether object and colour are right. Two more runs learn
two new objects, with a prompt for every picture and with one prompt for all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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
    prompt: str = ""

    @property
    def name(self) -> str:
        """What it is called in the table."""
        prompts = ", one prompt" if self.prompt else ""
        return f"{'LoRA' if self.lora else 'full'}, {'prior' if self.prior else 'alone'}{prompts}"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="embedded-inpaint", help="an inpaint base of the world")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lora_steps", type=int, default=350)
    parser.add_argument("--lora_rate", type=float, default=2.5e-3)
    parser.add_argument("--full_steps", type=int, default=350)
    parser.add_argument("--full_rate", type=float, default=4e-4)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--class_pictures", type=int, default=400)
    parser.add_argument("--asked", type=int, default=32, help="new objects asked for per run")
    parser.add_argument("--known", type=int, default=64, help="old prompts asked for per run")
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
    for number, picture in enumerate(ask(pipeline, truths, 10_000)):
        save_image(folder / f"{number:03d}.png", picture)
        (folder / f"{number:03d}.txt").write_text(truths[number].caption)
    return folder


def ask(pipeline: Pipeline, truths: Sequence[Truth], seed: int) -> list[np.ndarray]:
    """A wholly masked picture for each of `truths`."""
    blank, made = np.full((SIDE, SIDE, 3), 127, np.uint8), []
    for start in range(0, len(truths), GROUP):
        part = truths[start : start + GROUP]
        samples = [Sample(image=blank, mask=EVERYTHING, prompt=t.caption) for t in part]
        batch = collate(samples, pipeline.spec)
        made += list(to_uint8(generate_batch(pipeline, batch, SampleOptions(seed=seed + start))))
    return made


def accuracy(pipeline: Pipeline, truths: Sequence[Truth], seed: int) -> tuple[float, np.ndarray]:
    """The share of pictures that show what was asked for, and the first of them in a row."""
    made = ask(pipeline, truths, seed)
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
    pictures = data / ("bare" if arm.prompt else "new")
    return FinetuneOptions(
        pretrained_model_name_or_path=told.base, instance_data_dir=str(pictures),
        instance_prompt=arm.prompt, image_size=SIDE, batch_size=told.batch, use_lora=arm.lora,
        lora_target_modules=LAYERS, learning_rate=told.lora_rate if arm.lora else told.full_rate,
        max_steps=told.lora_steps if arm.lora else told.full_steps, lr_scheduler="cosine",
        lr_warmup_steps=10, mask_kinds=("full=3", "rectangles", "ellipse", "border"),
        mask_area=(0.3, 0.9), num_workers=0, log_images_steps=0, log_steps=50, save_steps=10**6,
        seed=seed, output_dir=data / f"{arm.name}", **prior,
    )  # fmt: skip


def learn(options: FinetuneOptions, base: str) -> Pipeline:
    """Train, and load what was trained."""
    for _ in train(options):
        pass
    (run,) = options.output_dir.iterdir()
    final = str(run / "final_model")
    return load(base, loras=(final,), device="cpu") if options.use_lora else load(final)


def compare(told: argparse.Namespace, arms: Sequence[Arm], pairs: Sequence[Pair]) -> Result:
    """Every arm for every seed: new objects and old ones, before and after."""
    before = load(told.base, device="cpu")
    old = [OLD.draw(HELD_OUT + n, (8, 8)).truth for n in range(told.known)]
    new = [new_truth(pairs[n % len(pairs)], HELD_OUT + 500 + n) for n in range(told.asked)]
    found: Result = {arm.name: {"new": [], "old": []} for arm in arms}
    found["before"] = {"new": [accuracy(before, new, 0)[0]], "old": [accuracy(before, old, 0)[0]]}
    with tempfile.TemporaryDirectory() as folder:
        write_class(Path(folder) / "class", before, told.class_pictures)
        for seed in range(told.seeds):
            data = Path(folder) / str(seed)
            write_pictures(data / "new", pairs, seed)
            write_pictures(data / "bare", pairs, seed, told=False)
            for arm in arms:
                pipeline = learn(options_of(told, arm, seed, data), told.base)
                for name, truths in (("new", new), ("old", old)):
                    share, row = accuracy(pipeline, truths, 0)
                    found[arm.name][name].append(share)
                    if told.pictures:
                        file = f"{arm.name} {name} {seed}.png".replace(", ", "-").replace(" ", "-")
                        save_image(told.pictures / file, row)
                print(seed, arm.name, {n: v[-1] for n, v in found[arm.name].items()}, flush=True)
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
        arms = [Arm(lora=lora, prior=prior) for lora in (True, False) for prior in (True, False)]
        figures["concept"] = compare(told, arms, [RED_CROSS])
        lines += lines_of("a red cross, from 12 pictures", figures["concept"])
    if "two" in wanted:
        prompts = ("", "red cross or white ring on background")
        arms = [Arm(lora=True, prior=True, prompt=prompt) for prompt in prompts]
        figures["two"] = compare(told, arms, [RED_CROSS, WHITE_RING])
        lines += lines_of("a red cross and a white ring, from 6 pictures each", figures["two"])
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(told).items()}
    common.report("finetune", {"options": options, **figures}, lines, told.output)


# Attention, and where the prompt scales and shifts the features of the embedded base.
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "proj_in", "proj_out", "ff.net.0.proj",
    "ff.net.2", "conv1", "conv2",
)  # fmt: skip

if __name__ == "__main__":
    main()

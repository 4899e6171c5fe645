"""Kills a run 50 times at random moments, looking at what it left each time, then lets it end.

    python tests/training/killed.py BASE OUT SEED

A child is forked after everything is imported, so that a life costs no start-up.
"""

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import diffusers
import torch
import torch.utils.tensorboard  # imported for every life at once
import transformers

from controlfill.options import TrainOptions
from controlfill.training.checkpoint import checkpoints_of, find_resume
from controlfill.training.run import train

KILLS = 50
STEPS = 120


def options_of(base: str, out: Path) -> TrainOptions:
    return TrainOptions(
        image_dir="world:shapes", pretrained_model_name_or_path=base, image_size=64, batch_size=1,
        learning_rate=1e-3, max_steps=STEPS, save_steps=3, log_steps=50, log_images_steps=0,
        num_workers=0, ema_decay=0.9, checkpoints_total_limit=2, output_dir=out,
        resume_from_checkpoint="latest",
    )  # fmt: skip


def live(options: TrainOptions, told: int) -> None:
    """One life of the run: tells its parent of each step, and goes on until it is killed."""
    logging.disable(logging.WARNING)
    for step in train(options):
        if told >= 0:
            os.write(told, b"%d\n" % step.index)
    os._exit(0)


def life(options: TrainOptions, chance: random.Random) -> str:
    """Start a life and kill it: while it loads, or some steps later, in a step or a saving."""
    mine, its = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(mine)
        live(options, its)
    os.close(its)
    with os.fdopen(mine) as heard:
        if chance.random() < 0.8:
            first, *_ = [heard.readline().strip() for _ in range(chance.randint(1, 5))]
            time.sleep(chance.uniform(0, 0.1))
        else:
            first = "loading"
            time.sleep(chance.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return first


def main() -> None:
    base, out, chance = sys.argv[1], Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    # Both load their classes lazily: once here, not in each life.
    for name in ("ControlNetModel", "AutoencoderKL", "UNet2DConditionModel", "DDPMScheduler"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)
    options = options_of(base, out)
    newest = 0
    for number in range(KILLS):
        first = life(options, chance)
        found = find_resume("latest", out)
        step = int(found.name.split("-")[1]) if found else 0
        whole = [p.name for p in checkpoints_of(found.parent)] if found else []
        print(f"kill {number + 1}: began at {first}, whole: {' '.join(whole)}", flush=True)
        assert step >= newest, f"step {newest} was whole before and is gone"
        newest = step
    print(f"{KILLS} kills survived, step {newest} of {STEPS}", flush=True)
    live(options, -1)


if __name__ == "__main__":
    main()

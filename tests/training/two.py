"""Trains on as many processes as the launcher started, and writes what each of them ended with.

First a ControlNet, then a LoRA with class pictures that the processes paint.

torchrun --nproc_per_node 2 tests/training/two.py OUT
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from controlfill.data.sample import PreparedSource
from controlfill.options import FinetuneOptions, TrainOptions
from controlfill.training import class_pictures
from controlfill.training import run as running
from controlfill.training.run import train


def options_of(out: Path) -> TrainOptions:
    return TrainOptions(
        image_dir="world:shapes", pretrained_model_name_or_path="embedded", image_size=64,
        controlnet_model_name_or_path="embedded", batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=0.05, learning_rate=1e-3, lr_scheduler="linear", lr_warmup_steps=1,
        max_steps=3, save_steps=2, log_steps=1,
        log_images_steps=3, val_split=0.2, validation_steps=2, max_train_samples=30,
        num_workers=0, ema_decay=0.5, output_dir=out,
    )  # fmt: skip


def tune_of(out: Path) -> FinetuneOptions:
    return FinetuneOptions(
        instance_data_dir="world:shapes", pretrained_model_name_or_path="embedded-inpaint",
        image_size=64, batch_size=1, max_train_samples=9, learning_rate=1e-4, max_steps=2,
        save_steps=9, log_steps=9, log_images_steps=0, num_workers=0, max_grad_norm=0.05,
        with_prior_preservation=True, class_prompt="a red circle", num_class_images=4,
        class_data_dir=out / "class", prior_loss_weight=0.5, use_lora=True, rank=2,
        train_text_encoder=True, output_dir=out,
    )  # fmt: skip


def finetune(out: Path, rank: int, networks: list) -> None:
    """Two steps, without the final model; the header tells what this process painted."""
    painted, paint = [], class_pictures.Painter.paint

    def note(self, numbers, attempt):
        painted.extend(numbers)
        paint(self, numbers, attempt)

    class_pictures.Painter.paint, class_pictures.STEPS = note, 1
    for step in train(tune_of(out)):
        if step.index == step.total:
            break
    weights = {n: p.detach().clone() for n, p in networks[-1].network.learned().items()}
    save_file(weights, out / f"tuned-{rank}.safetensors", {"painted": repr(painted)})


def main() -> None:
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    seen, rates, networks = [], [], []
    get, prepare = PreparedSource.__getitem__, running.prepare

    def note(self, place):
        seen.append((place[0], int(self.indices[place[1]])))
        return get(self, place)

    def keep(*arguments):
        networks.append(prepare(*arguments))
        return networks[-1]

    running.prepare = keep
    states = {}

    def before_step(optimizer, *_):
        number = len({name.split(".")[0] for name in states}) + 1
        for place, weight in enumerate(optimizer.param_groups[0]["params"]):
            states[f"{number}.weight.{place}"] = weight.detach().clone()
            states[f"{number}.grad.{place}"] = weight.grad.detach().clone()

    hook = register_optimizer_step_pre_hook(before_step)
    options = options_of(out)
    resumed = "resume" in sys.argv
    if resumed:
        options = replace(options, max_steps=5, resume_from_checkpoint="latest")
    for step in train(options):
        rates.append(step.learning_rate)
        if step.index == 1:
            PreparedSource.__getitem__ = note
    weights = {n: p.detach().clone() for n, p in networks[0].network.named_parameters()}
    if rank == 0 and not resumed:
        save_file(states, out / "steps.safetensors")
    hook.remove()
    PreparedSource.__getitem__ = get
    about = {"rates": repr(rates), "seen": repr(seen)}
    save_file(weights, out / f"rank-{rank}{'-resumed' if resumed else ''}.safetensors", about)
    if not resumed:
        finetune(out, rank, networks)


if __name__ == "__main__":
    main()

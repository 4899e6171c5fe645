"""The training loop with Accelerate, from batch to step.

This is the page to read to see how a ControlNet learns. Everything it calls has one job:
`objective` says what a batch costs, `batches` gives them in their order, and the caller decides
what to do with each Step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn

from controlfill.data.sample import Stack
from controlfill.diffusion.objective import Objective, step_rng
from controlfill.errors import UserError
from controlfill.options import RunOptions
from controlfill.training.optim import Average, learning_rate, set_learning_rate
from controlfill.training.sharding import autocast, entire, precision_of, settle
from controlfill.training.step import MicroBatches, Step
from controlfill.training.team import Team

# How long processes wait for one that has work of its own, such as encoding for a cache.
PATIENCE = timedelta(hours=3)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a run starts and ends, its options, and the average it keeps."""

    start: int
    total: int
    options: RunOptions
    average: Average | None = None


def make_accelerator(options: RunOptions) -> Accelerator:
    """Accelerate's hold on devices, processes, number formats and accumulation."""
    # Its state outlives a run and would refuse another number format in the same process.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    # Unless asked for a format, the one that `accelerate launch` was told stands.
    asked = None if options.mixed_precision == "no" else options.mixed_precision
    accelerator = Accelerator(
        mixed_precision=asked,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; bf16 works on a CPU too")
    settle(accelerator, options)
    return accelerator


def make_team(accelerator: Accelerator) -> Team:
    """What the rest of the training room may know of Accelerate."""

    def tell(word: Any) -> Any:
        words = [word]
        if accelerator.num_processes > 1:
            broadcast_object_list(words)
        return words[0]

    def total(values: Tensor) -> Tensor:
        summed: Any = accelerator.reduce(values.to(accelerator.device), "sum")
        return summed.cpu()

    return Team(
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device=accelerator.device,
        precision=precision_of(accelerator),
        tell=tell,
        total=total,
        autocast=partial(autocast, accelerator),
    )


def train_loop(
    accelerator: Accelerator,
    objective: Objective,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Stack],
    plan: Plan,
) -> Iterator[Step]:
    """Yield a Step after each optimizer step, from `plan.start` + 1 to `plan.total`."""
    options = plan.options
    micro_batches = options.gradient_accumulation_steps
    number = plan.start * micro_batches
    passes = MicroBatches()
    grad_norm = torch.zeros(())
    network.train()
    for batch in batches:
        rate = learning_rate(number // micro_batches, plan.total, options)
        set_learning_rate(optimizer, rate)
        with accelerator.accumulate(network):
            # 1) All randomness of this forward pass follows from its place in the run.
            rng = step_rng(options.seed, accelerator.process_index, number)
            # 2) Noise the picture, let ControlNet and frozen UNet predict, compare.
            with autocast(accelerator):
                cost = objective.cost(network, batch.to(accelerator.device), rng)
                loss = cost.losses.mean()
            # 3) Only the ControlNet gets gradients; Accelerate averages them between processes.
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                most = options.max_grad_norm or float("inf")
                norm = accelerator.clip_grad_norm_(network.parameters(), most)
                grad_norm = entire(torch.as_tensor(norm))
            # 4) Between the micro-batches of one step Accelerate makes these two do nothing.
            optimizer.step()
            optimizer.zero_grad(set_to_none=options.set_grads_to_none)
        passes.add(loss, cost.parts, batch.skipped)
        number += 1
        if not accelerator.sync_gradients:
            continue
        done = number // micro_batches
        if plan.average is not None:
            plan.average.update(accelerator.unwrap_model(network), done)
        yield Step(
            index=done,
            total=plan.total,
            grad_norm=grad_norm,
            learning_rate=rate,
            images=len(batch.prompts) * micro_batches * accelerator.num_processes,
            **passes.summed_up(),
        )
        passes = MicroBatches()

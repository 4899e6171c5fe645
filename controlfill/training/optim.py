"""Optimisation: the learning rate as a function of the step, AdamW, and averaged weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from controlfill.errors import UserError
from controlfill.options import RunOptions
from controlfill.training.sharding import learning, part_of

# What the names of a network's text encoders begin with.
TEXT = "encoders."


def learning_rate(step: int, total: int, options: RunOptions) -> float:
    """The learning rate of step number `step` (from 0) of `total`: linear warm-up, then a course.

    Linear and cosine fall to zero at `total`. A function keeps no state, so it can't be stepped
    too often by several processes, nor forgotten by a checkpoint.
    """
    warmup = options.lr_warmup_steps
    rise = min(1.0, (step + 1) / (warmup + 1))
    share = min(1.0, max(0, step - warmup) / max(1, total - warmup))
    fall = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": (1 + math.cos(math.pi * share)) / 2,
    }[options.lr_scheduler]
    return options.rate * rise * fall


def make_optimizer(network: nn.Module, options: RunOptions) -> torch.optim.Optimizer:
    """AdamW over all that learns in `network`; the fused kernel is three times faster.

    With `use_8bit_adam` that of bitsandbytes, whose moments take a quarter of the memory. Raises
    UserError without it.
    """
    groups = parameter_groups(network, options)
    common: Any = {"lr": options.rate, "weight_decay": options.adam_weight_decay}
    if not options.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **common)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "--use_8bit_adam needs bitsandbytes: pip install 'controlfill[bnb]', or leave it out"
        ) from error
    return AdamW8bit(groups, **common)


def parameter_groups(network: nn.Module, options: RunOptions) -> list[dict[str, Any]]:
    """What learns, text encoders apart from the rest, which learn at a share of its rate."""
    text = [p for name, p in learning(network) if name.startswith(TEXT)]
    rest = [p for name, p in learning(network) if not name.startswith(TEXT)]
    groups: list[dict[str, Any]] = [{"params": rest, "share": 1.0}]
    return groups + ([{"params": text, "share": options.text_share}] if text else [])


def renew(states: list[dict[str, Any]], network: nn.Module, options: RunOptions) -> None:
    """Let saved `states` of optimizers have what `options` ask for now, and their own moments.

    Raises UserError where weights were in other groups, as in runs from before there were two.
    """
    own = parameter_groups(network, options)
    for state in states:
        groups = state["param_groups"]
        if len(groups) != len(own):
            raise UserError(
                f"the checkpoint's optimizer has {len(groups)} groups of weights, and this run's "
                f"has {len(own)}: it comes from another version; start a new run"
            )
        for group, asked in zip(groups, own, strict=True):
            group |= {"share": asked["share"], "weight_decay": options.adam_weight_decay}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from now on, or a group's share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


class Average:
    """An exponential moving average of a network's weights.

    The decay rises with the steps as (1 + n) / (10 + n), so early averages are not stuck at the
    start. Where weights are split over processes, each averages the parts that it keeps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.start(network)

    def start(self, network: nn.Module) -> None:
        """Begin with the weights that `network` has now."""
        self.weights = {name: part_of(p).detach().clone().float() for name, p in learning(network)}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the weights that `network` has after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        new = [part_of(p).detach().float() for _, p in learning(network)]
        torch._foreach_lerp_(list(self.weights.values()), new, 1 - decay)

    def to(self, device: torch.device) -> None:
        """Keep the averages on `device` from now on."""
        self.weights = {name: w.to(device) for name, w in self.weights.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over saved averages, or their parts."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])

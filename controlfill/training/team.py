"""The team: which of several processes this is, and the few things that they must agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from controlfill.errors import UserError
from controlfill.inference.pipeline import DTYPES
from controlfill.options import FinetuneLightningOptions, FitOptions, Precision


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process among `ranks`, whatever engine started them.

    `tell(word)` gives the main process's word to all; `total(tensor)` adds a tensor up over all;
    `autocast()` is the engine's number format for a forward pass.
    """

    rank: int
    ranks: int
    device: torch.device
    precision: Precision
    tell: Callable[[Any], Any]
    total: Callable[[torch.Tensor], torch.Tensor]
    autocast: Callable[[], Any]

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The number format of frozen weights: half of the memory in half precision."""
        return DTYPES[self.precision]


def check_device(options: FitOptions) -> None:
    """Raise UserError for what Lightning would refuse in many lines."""
    here = torch.cuda.is_available()
    if options.accelerator == "gpu" and not here:
        raise UserError("--accelerator gpu, but no GPU is there; use --accelerator cpu")
    if options.precision == "16-mixed" and options.accelerator == "cpu":
        raise UserError("--precision 16-mixed needs a GPU; bf16-mixed works on a CPU too")
    if isinstance(options, FinetuneLightningOptions) and options.strategy in ("fsdp", "deepspeed"):
        raise UserError(
            f"--strategy {options.strategy} splits weights, which finetune does not; use ddp"
        )
    if options.lr_find and options.devices not in (1, -1):
        raise UserError("--lr_find works on one device; use --devices 1, then train on more")

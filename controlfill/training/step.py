"""A Step: what both engines hand to whoever watches a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step that is done: its number from 1 on, and what there is to say of it.

    `loss` and `grad_norm` stay on the device; read them only when needed, each reading waits for
    the device. `skipped` names pictures that could not be used. `parts` are what else there is to
    say of the loss, by name.
    """

    index: int
    total: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    images: int
    skipped: list[str]
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class MicroBatches:
    """The forward passes of one optimizer step, as they come in."""

    losses: list[Tensor] = field(default_factory=list)
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, loss: Tensor, parts: dict[str, Tensor], skipped: Sequence[str]) -> None:
        """Remember one forward pass."""
        self.losses.append(loss.detach())
        self.parts.append(parts)
        self.skipped += skipped

    def summed_up(self) -> dict[str, Any]:
        """What a Step says of them."""
        loss = torch.stack(self.losses).mean()
        return {"loss": loss, "parts": mean_parts(self.parts), "skipped": self.skipped}


def mean_parts(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The means by name over those that have it."""
    names = {name: None for one in parts for name in one}
    return {n: torch.stack([one[n] for one in parts if n in one]).mean() for n in names}

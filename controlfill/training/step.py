"""A Step: what both engines hand to whoever watches a run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step that is done: its number from 1 on, and what there is to say of it.

    `loss` and `grad_norm` stay on the device; read them only when needed, each reading waits for
    the device. `skipped` names pictures that could not be used.
    """

    index: int
    total: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    images: int
    skipped: list[str]

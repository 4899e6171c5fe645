"""What a run computes once: all that is the same at every step or in both halves of guidance.

The networks that come back share all weights with those that went in, which are left as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from controlfill.diffusion.condition import Condition

HINT = "controlnet_cond_embedding"


def embed_hint(network: nn.Module, condition: Condition) -> tuple[nn.Module, Condition]:
    """The ControlNet and the condition of a whole run, in which the hint is embedded only once.

    It is the same at every step, and its embedding works at the full size of the picture.
    """
    embedding = network.get_submodule(HINT)
    weight = next(embedding.parameters())
    hint = embedding(condition.hint.to(weight.dtype))
    return without_hint_embedding(network), replace(condition, hint=hint)


def without_hint_embedding(network: nn.Module) -> nn.Module:
    """The ControlNet for hints that are embedded already."""
    return with_parts(network, {HINT: nn.Identity()})


def remember_text(network: nn.Module) -> nn.Module:
    """A UNet or ControlNet that makes keys and values of the same text tensor only once."""
    names = ("attn2.to_k", "attn2.to_v")
    found = {n: Remembering(m) for n, m in network.named_modules() if n.endswith(names)}
    return with_parts(network, found)


def share_halves(network: nn.Module) -> nn.Module:
    """A UNet or ControlNet for batches of two halves that differ in nothing but their text.

    What comes before the first cross-attention is computed for one half only.
    """
    return with_parts(network, {n: Halved(network.get_submodule(n)) for n in textless(network)})


def textless(network: Any) -> Iterator[str]:
    """Names of the parts of a UNet or ControlNet that run before any part has seen the text."""
    if network.config.get("addition_embed_type"):
        return  # SDXL's time embedding knows the prompt already.
    yield "conv_in"
    for number, block in enumerate(network.down_blocks):
        name = f"down_blocks.{number}"
        if not hasattr(block, "attentions"):
            yield name
            continue
        yield f"{name}.resnets.0"
        first, inner = block.attentions[0], f"{name}.attentions.0"
        yield from (f"{inner}.norm", f"{inner}.proj_in")
        if not first.transformer_blocks[0].only_cross_attention:
            inner += ".transformer_blocks.0"
            yield from (f"{inner}.{part}" for part in ("norm1", "attn1", "norm2", "attn2.to_q"))
        return


def with_parts(network: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """`network` with other `parts` in the places of those names."""
    light = copy.copy(network)
    light._modules = dict(network._modules)
    # Accelerate and torch.compile leave calls on a module that would go to the one copied from.
    light.__dict__.pop("forward", None)
    light._compiled_call_impl = None
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, part in parts.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = part
        else:
            light._modules[first] = part
    for first, below in inner.items():
        light._modules[first] = with_parts(network.get_submodule(first), below)
    return light


class Remembering(nn.Module):
    """A module that gives its last answer again when asked with the same tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.asked: Tensor | None = None

    def forward(self, tensor: Tensor) -> Tensor:
        """The module's answer for `tensor`."""
        if tensor is not self.asked:
            self.asked, self.answer = tensor, self.module(tensor)
        return self.answer


class Halved(nn.Module):
    """A module whose inputs are two equal halves of a batch: it sees one and doubles its answer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's answer for the first half, twice."""
        answer = self.module(*each(args, first_half), **each(kwargs, first_half))
        return each(answer, lambda tensor: torch.cat([tensor] * 2))


def first_half(tensor: Tensor) -> Tensor:
    """The first half of a batch."""
    return tensor[: len(tensor) // 2]


def each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`values`, in tuples or dicts or alone, with all tensors changed."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, tuple):
        return tuple(each(value, change) for value in values)
    if isinstance(values, dict):
        return {key: each(value, change) for key, value in values.items()}
    return values

"""Merging checkpoints tensor by tensor: differences added, weighted sums, LoRAs baked in and out.

All is reckoned in float32, whatever is read and written; two tensors are in memory at a time.
A UNet of 4 channels takes part as the 9-channel one that it is when the mask and the masked
picture are ignored: with zeros for them. See docs/merging.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.models.configs import INPAINT_CHANNELS, PLAIN_CHANNELS
from controlfill.models.lora_bake import bake_loras
from controlfill.models.lora_extract import extract_lora
from controlfill.models.merge_blocks import BASE, find_blocks, read_block_alphas
from controlfill.models.merge_sources import (
    Draft,
    Merged,
    Report,
    Source,
    cast,
    check_out,
    make_recipe,
    open_sources,
    quiet,
    wanted_dtype,
    write_draft,
)
from controlfill.options import check_numbers
from controlfill.options.models import MergeOptions

Read = Callable[[int], Tensor]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Buffers that some versions of the libraries save and others don't.
BUFFERS = ("position_ids", "logit_scale")


def merge(options: MergeOptions, report: Report = quiet) -> Merged:
    """Do what `options` ask for. Raises UserError, and writes nothing then."""
    check_options(options)
    return METHODS[options.method](options, report)


def check_options(options: MergeOptions) -> None:
    """Raise UserError for options that only another method takes, and wrong numbers of models."""
    check_numbers(options)
    low, high, words = MODELS[options.method]
    if not low <= len(options.models) <= high:
        raise UserError(f"--method {options.method} takes {words}; found {len(options.models)}")
    defaults = {f.name: f.default for f in fields(MergeOptions)}
    for name, methods in USED_BY.items():
        if options.method not in methods and getattr(options, name) != defaults[name]:
            raise UserError(
                f"--{name} is for --method {' and '.join(methods)}, not for {options.method}"
            )
    numbers = (*options.weights, *options.lora_scales, options.alpha or 0.0)
    if not all(math.isfinite(number) for number in numbers):
        raise UserError("--alpha, --weights and --lora_scales are finite numbers, such as 0.5")


def combine(options: MergeOptions, report: Report) -> Merged:
    """A + alpha (B - C), or the weighted sum of all models, of the parts that are asked for."""
    with open_sources(options.models) as sources:
        like = sources[0]
        check_out(like, options.out)
        taking = find_merged(sources, options.parts)
        prediction = find_prediction(sources) if "unet" in options.parts else None
        shares = Shares(options, like)
        shares.check(sources, taking)
        shapes = {}
        for name in like.names:
            used = sources if name in taking else [like]
            shape = widest([source.shape(name) for source in used])
            shapes[name] = (wanted_dtype(like.dtype(name), options.dtype), shape)

        def make(name: str) -> Tensor:
            made = shares.merge(name, sources) if name in taking else like.read(name)
            return cast(made, shapes[name][0], name)

        recipe = make_recipe(
            options.method, **shares.about(), parts=list(options.parts), dtype=options.dtype,
            models=[source.about(options.parts, report) for source in sources],
        )  # fmt: skip
        draft = Draft(
            like=like, shapes=shapes, make=make, recipe=recipe,
            prediction=prediction,
        )  # fmt: skip
        write_draft(draft, options.out, report)
    what = f"{len(taking)} of {len(shapes)} tensors merged, the others are those of A"
    return Merged(path=options.out, what=what)


class Shares:
    """How much of each model goes into each tensor."""

    def __init__(self, options: MergeOptions, like: Source) -> None:
        self.adds = options.method == "add_difference"
        self.alpha = options.alpha if options.alpha is not None else (1.0 if self.adds else 0.5)
        self.weights = () if self.adds else read_weights(options)
        self.blocks = find_blocks(n for n in like.names if like.part(n) == "unet")
        self.alphas: dict[str, float] = {}
        if options.block_alphas is not None:
            if self.weights:
                raise UserError("--block_alphas goes with two models and --alpha, not --weights")
            self.alphas = read_block_alphas(options.block_alphas, self.blocks)
            if "unet" not in options.parts and self.alphas.keys() - {BASE}:
                raise UserError(
                    "--block_alphas names blocks of the UNet, which --parts leaves out; name "
                    f"{BASE} alone, or give --parts unet too"
                )

    def alpha_of(self, name: str) -> float:
        """Alpha of a tensor: its block's, if that has one of its own."""
        return self.alphas.get(self.blocks.get(name, BASE), self.alpha)

    def merge(self, name: str, sources: Sequence[Source]) -> Tensor:
        """The merged tensor `name`."""
        alpha, shapes = self.alpha_of(name), [source.shape(name) for source in sources]

        def read(index: int) -> Tensor:
            tensor = sources[index].read(name)
            # The 8-bit formats know no arithmetic.
            return tensor.float() if tensor.dtype.itemsize == 1 else tensor

        if self.adds:
            return add_difference(read, alpha, widest(shapes))
        return weighted_sum(read, self.weights or (1 - alpha, alpha), shapes)

    def check(self, sources: Sequence[Source], taking: set[str]) -> None:
        """Raise UserError unless A + alpha (B - C) would have the channels of masks just once."""
        for name in taking if self.adds else ():
            shapes = [source.shape(name) for source in sources]
            seeing = "".join(LETTERS[i] for i, s in enumerate(shapes) if s == widest(shapes))
            if seeing not in ("ABC", "A", "B"):
                raise UserError(
                    f"of A + alpha (B - C), the UNets of {' and '.join(seeing)} take 9 channels "
                    "and the others 4; for an inpaint model either A does alone or B does alone"
                )

    def about(self) -> dict[str, Any]:
        """What a recipe says of it."""
        if self.weights:
            return {"weights": list(self.weights)}
        about: dict[str, Any] = {"alpha": self.alpha}
        return about | ({"block_alphas": self.alphas} if self.alphas else {})


def read_weights(options: MergeOptions) -> tuple[float, ...]:
    """The shares of a weighted sum, which sum to 1; none of two models where alpha tells them."""
    count, given = len(options.models), options.weights
    if not given and count == 2:
        return ()
    if len(given) != count or options.alpha is not None:
        raise UserError(
            f"--weights has {len(given)} numbers for {count} models; give one for each and no "
            "--alpha, or of two models --alpha alone, the share of B"
        )
    total = sum(given)
    if abs(total) < 1e-6:
        raise UserError(f"--weights {' '.join(map(str, given))} sum to 0, so there is no mean")
    return tuple(weight / total for weight in given)


def add_difference(read: Read, alpha: float, shape: tuple[int, ...]) -> Tensor:
    """A + alpha (B - C) of `read(0)`, `read(1)` and `read(2)`, in float32.

    It comes out in `shape`, zeros standing for the input channels that a model lacks. With alpha 0
    it is A to the last bit.
    """
    if alpha == 0:
        return widen(read(0), shape)
    result = widen(read(1).float(), shape)
    result -= widen(read(2), shape)
    result *= alpha
    result += widen(read(0), shape)
    return result


def weighted_sum(read: Read, weights: Sequence[float], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """The sum of `weights` times tensors, in float32; of a single weight 1 the tensor itself.

    Where only some models see masks, the channels for that are the weighted mean of those models
    alone (of the first, where these weights sum to 0), so that the others' zeros don't dim them.
    """
    shape = widest(shapes)
    seeing = [i for i, own in enumerate(shapes) if own == shape]
    used = [i for i, weight in enumerate(weights) if weight]
    if len(used) == 1 and weights[used[0]] == 1 and shapes[used[0]] == shape:
        return read(used[0])
    result = torch.zeros(shape)
    if len(seeing) == len(shapes):
        for i in used:
            result.add_(read(i), alpha=weights[i])
        return result
    total = sum(weights[i] for i in seeing)
    extra = {i: weights[i] / total for i in seeing} if total else {seeing[0]: 1.0}
    for i in sorted({*used, *extra}):
        tensor = read(i)
        result[:, :PLAIN_CHANNELS].add_(tensor[:, :PLAIN_CHANNELS], alpha=weights[i])
        if i in extra:
            result[:, PLAIN_CHANNELS:].add_(tensor[:, PLAIN_CHANNELS:], alpha=extra[i])
    return result


def widen(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor`, or with zeros for the input channels it lacks: the network's output is the same."""
    if tensor.shape == shape:
        return tensor
    wide = tensor.new_zeros(shape)
    wide[:, : tensor.shape[1]] = tensor
    return wide


def widest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape with most input channels; apart from these all are equal."""
    return max(shapes)


def find_merged(sources: Sequence[Source], parts: Sequence[str]) -> set[str]:
    """The tensors of A to merge: numbers, of the parts that are asked for, which all models have.

    Raises UserError unless all models are of one layout, family and architecture.
    """
    like = sources[0]
    for part in parts:
        if not any(like.part(name) == part for name in like.names):
            raise UserError(f"A ({like.path}) has no {part} to merge; it is {like.layout}")
    for letter, other in zip(LETTERS[1:], sources[1:], strict=False):
        check_pair(like, other, letter, parts)
    found = {
        name
        for name in like.names
        if like.part(name) in parts
        and like.dtype(name).is_floating_point
        and all(name in source for source in sources)
    }
    for name in found:
        check_shapes(name, [source.shape(name) for source in sources])
    return found


def check_pair(like: Source, other: Source, letter: str, parts: Sequence[str]) -> None:
    """Raise UserError unless `other` has A's layout, family and tensors."""
    first, where = f"A ({like.path})", f"{letter} ({other.path})"
    if like.layout != other.layout:
        raise UserError(
            f"{first} is {like.layout}, but {where} is {other.layout}; bring them to one layout "
            "with `controlfill convert`"
        )
    if "unet" in parts:
        check_family(like, other, where)
    for one, two, has, lacks in ((like, other, first, where), (other, like, where, first)):
        names = (n for n in one.names if one.part(n) in parts and not n.endswith(BUFFERS))
        missing = next((name for name in names if name not in two), None)
        if missing:
            raise UserError(
                f"{lacks} lacks {missing}, which {has} has; models of one architecture merge"
            )


def check_family(like: Source, other: Source, where: str) -> None:
    """Raise UserError unless two UNets read the same text."""
    first = f"A ({like.path})"
    if like.text_width != other.text_width:
        raise UserError(
            f"{first} takes prompts of width {like.text_width}, {where} of {other.text_width}: "
            "models of different families (SD 1.x 768, SD 2 1024, SDXL 2048) don't merge"
        )


def find_prediction(sources: Sequence[Source]) -> str | None:
    """What the UNets predict, by those that say it. Raises UserError where they say two things."""
    told = [
        (f"{letter} ({source.path})", source.prediction)
        for letter, source in zip(LETTERS, sources, strict=False)
        if source.prediction
    ]
    for where, prediction in told:
        if prediction != told[0][1]:
            raise UserError(
                f"{told[0][0]} predicts {told[0][1]}, {where} {prediction}; their weights mean "
                "different things and don't merge (`controlfill convert` with --prediction_type "
                "makes a file that says what it predicts)"
            )
    return told[0][1] if told else None


def check_shapes(name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise UserError unless shapes are equal, or a first convolution's with 4 and 9 channels."""
    if len(set(shapes)) == 1:
        return
    mixed = {shape[1] for shape in shapes if len(shape) == 4} == {PLAIN_CHANNELS, INPAINT_CHANNELS}
    if not mixed or len({(shape[0], *shape[2:]) for shape in shapes}) > 1:
        found = " and ".join("x".join(map(str, shape)) for shape in dict.fromkeys(shapes))
        raise UserError(f"{name} is {found} in these models; models of one architecture merge")


METHODS: dict[str, Callable[[MergeOptions, Report], Merged]] = {
    "add_difference": combine,
    "weighted_sum": combine,
    "lora": bake_loras,
    "extract_lora": extract_lora,
}
# How many models each takes, at least and at most.
MODELS = {
    "add_difference": (3, 3, "three models, A B C"),
    "weighted_sum": (2, len(LETTERS), f"two to {len(LETTERS)} models"),
    "lora": (1, 1, "one model and --loras"),
    "extract_lora": (2, 2, "two models, the tuned one and the one it was made from"),
}
USED_BY = {
    "alpha": ("add_difference", "weighted_sum"), "weights": ("weighted_sum",),
    "block_alphas": ("add_difference", "weighted_sum"), "loras": ("lora",),
    "parts": ("add_difference", "weighted_sum", "extract_lora"), "lora_scales": ("lora",),
    "rank": ("extract_lora",), "conv_rank": ("extract_lora",), "energy": ("extract_lora",),
    "layout": ("extract_lora",),
}  # fmt: skip

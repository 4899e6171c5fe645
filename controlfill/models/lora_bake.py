"""LoRAs added into the weights they were trained beside: W + scale * alpha / rank * up @ down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.models.formats import open_model, rows_of
from controlfill.models.layout import THIRDS, How
from controlfill.models.lora import read_lora_header
from controlfill.models.lora_alphas import adapter_metadata, one_alpha, read_alphas
from controlfill.models.lora_names import Parts, find_parts, fold
from controlfill.models.merge_sources import (
    PARTS,
    Draft,
    Merged,
    Report,
    Source,
    cast,
    check_out,
    hash_files,
    is_finite,
    make_recipe,
    open_sources,
    plain,
    wanted_dtype,
    weights_files,
    write_draft,
)
from controlfill.models.recognise import family, recognise, text_parts
from controlfill.models.weights import Weights, open_weights
from controlfill.options.models import MergeOptions

EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")


class Layer(NamedTuple):
    """A layer of a network: `unet`, `text_encoder` or `text_encoder_2`, and diffusers' name."""

    network: str
    module: str


class Place(NamedTuple):
    """The tensor of a base that holds a layer's weight, and how the original layout holds it."""

    name: str
    how: How = "same"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a layer's matrices lie in a LoRA file, and the factor alpha / rank."""

    parts: Parts
    factor: float


class Lora:
    """An open LoRA of any tool; its matrices are read when they are asked for."""

    def __init__(self, path: Path, weights: Weights) -> None:
        self.path, self.weights = path, weights
        self.entries = read_entries(path, weights)

    def delta(self, layer: Layer) -> Tensor:
        """What the LoRA adds to the weight of `layer` at scale 1, float32, in its own shape.

        (out, in) of a linear layer, (out, in, k, k) of a convolution.
        """
        entry = self.entries[layer]
        up, down = (self._read(name).float() for name in (entry.parts.up, entry.parts.down))
        middle = entry.parts.middle
        down = fold(down, None if middle is None else self._read(middle), entry.parts.down)
        product = (up.flatten(1) @ down.flatten(1)) * entry.factor
        return product.reshape(up.shape[0], *down.shape[1:])

    def delta_shape(self, layer: Layer) -> tuple[int, ...]:
        """The shape of `delta`, told without reading."""
        down, up, _, middle = self.entries[layer].parts
        shapes = [self.weights.shape(name) for name in (up, down, middle or down)]
        return shapes[0][0], shapes[1][1], *shapes[2][2:]

    def _read(self, name: str) -> Tensor:
        tensor = self.weights[name]
        if not is_finite(tensor):
            raise UserError(f"{self.path}: {name} holds NaN or infinite numbers")
        return tensor


def bake_loras(options: MergeOptions, report: Report) -> Merged:
    """Write A with LoRAs in it. Raises UserError."""
    scales = options.lora_scales or (1.0,) * len(options.loras)
    if not options.loras or len(scales) != len(options.loras):
        raise UserError(
            f"--loras names {len(options.loras)} files, and --lora_scales has {len(scales)} "
            "numbers; give at least one file, and a number for each or none"
        )
    with open_sources(options.models) as (base,), ExitStack() as stack:
        check_out(base, options.out)
        places = find_places(base)
        loras = [Lora(p, stack.enter_context(open_weights(p))) for p in options.loras]
        for lora in loras:
            check_told(lora.path, base)
            check_fit(lora, base, places)
        baker = Baker(base, places, list(zip(loras, scales, strict=True)))
        shapes = {
            n: (wanted_dtype(base.dtype(n), options.dtype), base.shape(n)) for n in base.names
        }
        recipe = make_recipe(
            "lora", dtype=options.dtype, models=[base.about(tuple(PARTS.values()), report)],
            loras=[about_lora(p, s) for p, s in zip(options.loras, scales, strict=True)],
        )  # fmt: skip
        draft = Draft(
            like=base, shapes=shapes, recipe=recipe,
            make=lambda name: cast(baker.bake(name), shapes[name][0], name),
        )  # fmt: skip
        write_draft(draft, options.out, report)
    layers = {layer for lora in loras for layer in lora.entries}
    return Merged(path=options.out, what=f"{len(loras)} LoRAs in {len(layers)} layers of A")


class Baker:
    """Adds LoRAs, each with its scale, to the tensors of a base."""

    def __init__(
        self, base: Source, places: dict[Layer, Place], loras: Sequence[tuple[Lora, float]]
    ) -> None:
        self._base, self._loras = base, loras
        self._layers: dict[str, list[tuple[Layer, How]]] = {}
        for layer, place in places.items():
            self._layers.setdefault(place.name, []).append((layer, place.how))

    @torch.no_grad()
    def bake(self, name: str) -> Tensor:
        """The base's tensor with what all LoRAs add to it, float32; itself where they add none."""
        tensor = self._base.read(name)
        for layer, how in self._layers.get(name, ()):
            for lora, scale in self._loras:
                if scale and layer in lora.entries:
                    tensor = tensor.float()
                    target = tensor.chunk(3)[THIRDS.index(how)] if how in THIRDS else tensor
                    delta = lora.delta(layer)
                    delta = delta.T if how == "turned" else delta.reshape(target.shape)
                    target.add_(delta, alpha=scale)
        return tensor


def find_places(base: Source) -> dict[Layer, Place]:
    """The weights of a base that LoRAs may change."""
    if not base.is_original:
        found = ((layer_of(base, name), name) for name in base.names)
        return {layer: Place(name) for layer, name in found if layer}
    (weights,) = base.files.values()
    what = recognise(weights)
    if what.kind == "controlnet":
        raise UserError(f"{base.path} is a ControlNet, into which no LoRA goes; give a base")
    parts = {"unet": (what.prefix, False), **text_parts(weights.names)}
    model, places = open_model(base.path), {}
    for network, (prefix, opened) in parts.items():
        rows, _ = rows_of(network, opened)(model.parts[network].names)
        for row in rows:
            if is_layer(row.diffusers, model.parts[network].shape(row.diffusers)):
                layer = Layer(network, plain(row.diffusers).removesuffix(".weight"))
                places[layer] = Place(prefix + row.original, row.how)
    return places


def layer_of(source: Source, name: str) -> Layer | None:
    """The layer whose weight a tensor with diffusers' names is; None for all that is no weight."""
    network, _, key = name.rpartition("/")
    network = network or source.part(name)
    if network not in PARTS or network == "vae" or not is_layer(key, source.shape(name)):
        return None
    return Layer(network, plain(key).removesuffix(".weight"))


def is_layer(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer or convolution: no bias, norm, embedding."""
    return key.endswith(".weight") and len(shape) in (2, 4) and not key.endswith(EMBEDDINGS)


def read_entries(path: Path, weights: Weights) -> dict[Layer, Entry]:
    """Where the matrices of each layer lie in a LoRA file, by diffusers' names.

    Raises UserError for other kinds of adapters and for halves without the other.
    """
    try:
        found = find_parts({name: weights.shape(name) for name in weights.names})
        networks = {module.partition(".")[0] for module in found}
        told = read_alphas(adapter_metadata(path, weights.metadata, networks))
        entries = {}
        for module, parts in found.items():
            network, _, inner = module.partition(".")
            rank = weights.shape(parts.down)[0]
            own = parts.alpha
            alpha = one_alpha(weights[own], own) if own else told(module, rank)
            entries[Layer(network, plain(inner))] = Entry(parts=parts, factor=alpha / rank)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return entries


def check_told(lora: Path, base: Source) -> None:
    """Raise UserError where a LoRA of ours says that it was trained on another kind of base."""
    header = read_lora_header(weights_files(lora)[0])
    unet = base.files.get("unet") or base.files.get("")
    if header is None or unet is None:
        return
    told, found = (header.base_family, header.prediction_type), (family(unet), base.prediction)
    # What a network alone doesn't say may be anything.
    if any(has and has != wanted for wanted, has in zip(told, found, strict=True)):
        raise UserError(
            f"{lora} was trained on a {' '.join(told)} base, but {base.path} is "
            f"{' '.join(filter(None, found))}; give a base of that kind"
        )


def check_fit(lora: Lora, base: Source, places: dict[Layer, Place]) -> None:
    """Raise UserError unless every layer of a LoRA is in the base, with its shape."""
    networks = {layer.network for layer in places}
    for layer in lora.entries:
        name = ".".join(layer)
        if layer.network not in networks:
            raise UserError(
                f"{lora.path} changes the {layer.network} too, which {base.path} has not; give a "
                "whole base"
            )
        if layer not in places:
            raise UserError(f"{lora.path} was made for another base: {base.path} has no {name}")
        want, found = base.shape(places[layer].name), lora.delta_shape(layer)
        rows = want[0] // 3 if places[layer].how in THIRDS else want[0]
        if math.prod((rows, *want[1:])) != math.prod(found) or not (
            (rows, want[1]) == found[:2] or places[layer].how == "turned"
        ):
            seen, right = ("x".join(map(str, shape)) for shape in (found, (rows, *want[1:])))
            raise UserError(
                f"{lora.path} was made for another base: its {name} is {seen}, that of "
                f"{base.path} {right}"
            )


def about_lora(path: Path, scale: float) -> dict[str, Any]:
    """What a recipe says of a LoRA."""
    return {"name": path.name, "sha256": hash_files(weights_files(path)), "scale": scale}

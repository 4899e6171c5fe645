"""LoRA: small matrices beside the weights of a base, trained, written, and put into a base.

The one door to peft. A file has the names of diffusers' `load_lora_weights`; names of kohya's tools
(A1111, ComfyUI) are read too.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlfill.errors import UserError
from controlfill.files import read_header
from controlfill.models.bundle import Bundle, current_name
from controlfill.models.controlnet import HEADER_KEY
from controlfill.models.inpainter import PARTS, Inpainter, TunedHeader, unread_parts
from controlfill.models.lora_alphas import ADAPTER_KEY, adapter_metadata, read_alphas
from controlfill.models.lora_names import pairs, to_kohya
from controlfill.models.merge_sources import is_finite
from controlfill.models.weights import open_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
LORA = "pytorch_lora_weights.safetensors"
# What a folder may hold instead: as diffusers wrote it once, and PEFT's own.
OTHER_FILES = ("pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
# How peft calls an adapter of which there is only one, within the names of its weights.
ADAPTER = ".default."
# Text encoders of older files have a level more in their names than those of newer libraries.
LEVEL = "text_model."


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """Rank and alpha of adapters, and which layers of the UNet have them."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def add_lora(network: Inpainter, shape: LoraShape, seed: int) -> None:
    """Freeze `network` and put adapters beside its layers, which alone learn.

    They say nothing at first. Raises UserError when no layer is called as `shape` has it.
    """
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _add(network.unet, shape, shape.targets)
        for place, encoder in enumerate(network.encoders):
            spare = len(network.encoders) > 1 and place == 0
            _add(encoder, shape, text_targets(encoder, spare))


def text_targets(encoder: Any, spare_last: bool) -> tuple[str, ...]:
    """The names of the attention layers of a text encoder; the last one may go unread."""
    inner = getattr(encoder, "text_model", encoder)
    unread = unread_parts(encoder)[0] if spare_last else None
    kept = [i for i, layer in enumerate(inner.encoder.layers) if layer is not unread]
    return tuple(f"encoder.layers.{i}.self_attn.{name}" for i in kept for name in TEXT_TARGETS)


def _add(part: Any, shape: LoraShape, targets: Sequence[str]) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType]
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    try:
        part.add_adapter(config)
    except ValueError as error:
        raise UserError(
            f"--lora_target_modules {' '.join(targets)}: no layer of the UNet ends so; the usual "
            "ones are to_q to_k to_v to_out.0"
        ) from error


# -- files


def file_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters by the names that they have in files, from those that they have in a network."""
    return {_outside(name): tensor for name, tensor in weights.items()}


def _outside(name: str) -> str:
    own = next(part for part in PARTS if name.startswith(part))
    rest = name.removeprefix(own).replace(ADAPTER, ".")
    if own.startswith("encoders") and not rest.startswith(LEVEL):
        rest = LEVEL + rest
    return PARTS[own] + rest


def own_names(network: Inpainter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters of a file by the names that they have in `network`; strange ones keep theirs."""
    names = {_outside(name): name for name in network.learned()}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def save_lora(
    file: Path, weights: Mapping[str, Tensor], shape: LoraShape, header: TunedHeader
) -> None:
    """Write adapters, named as in a network, as diffusers reads them, with all that explains them.

    Alpha stands in the header where diffusers looks for it.
    """
    tensors = {n: t.detach().cpu().contiguous() for n, t in file_names(weights).items()}
    about: dict[str, Any] = {}
    for part in PARTS.values():
        layers = {_layer(n.removeprefix(part)) for n in tensors if n.startswith(part)}
        if layers:
            about |= {f"{part}r": shape.rank, f"{part}lora_alpha": shape.alpha}
            targets = shape.targets if part == "unet." else [n.removeprefix(LEVEL) for n in layers]
            about[f"{part}target_modules"] = sorted(targets)
    metadata = {**header.as_metadata(), ADAPTER_KEY: json.dumps(about)}
    save_file(tensors, file, metadata=metadata)


def _layer(name: str) -> str:
    """The layer that a weight of an adapter stands beside."""
    return name.rpartition(".lora_")[0]


def save_kohya(file: Path, lora: Path) -> None:
    """Write the LoRA `lora` again as `file`, under the names of A1111's and ComfyUI's tools."""
    header = read_header(lora)
    tensors = {n: t.contiguous() for n, t in to_kohya(load_file(lora), header).items()}
    about = {name: text for name, text in header.items() if name != ADAPTER_KEY}
    save_file(tensors, file, metadata=about)


def read_pairs(file: Path) -> list[tuple[str, Tensor, Tensor, float]]:
    """Layer, matrices A and B, and scale of a LoRA file of any tool. Raises UserError.

    The scale is alpha / rank, or alpha / sqrt(rank) where PEFT trained with rank stabilisation.
    """
    try:
        with open_weights(file) as weights:
            found = pairs({name: weights[name] for name in weights.names})
            networks = {layer.partition(".")[0] for layer in found}
            about = adapter_metadata(file, weights.metadata, networks)
        told = read_alphas(about)
    except UserError as error:
        raise UserError(f"the LoRA {file}: {error}") from error
    read = []
    for layer, (down, up, alpha) in found.items():
        rank = len(down)
        size = told(layer, rank) if alpha is None else alpha
        read.append((layer, down, up, size / rank))
    return read


def read_lora_header(file: Path) -> TunedHeader | None:
    """What a LoRA of ours says of itself; None for others. Raises UserError when it's damaged."""
    if file.suffix not in (".safetensors", ".sft"):
        return None
    text = read_header(file).get(HEADER_KEY) or "null"
    known = {f.name for f in fields(TunedHeader)}
    try:
        values = json.loads(text)
        if values is None:
            return None
        header = TunedHeader(**{k: v for k, v in values.items() if k in known})
        if {type(v) for v in (header.base, header.base_family, header.prediction_type)} != {str}:
            raise TypeError("words are expected")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"the header of the LoRA {file} is damaged: {text:.60}") from error
    return header


# -- putting one into a base


def find_lora(words: str) -> tuple[Path, float]:
    """The file and the scale that FILE[:scale] means; a folder or run means the LoRA in it.

    Raises UserError.
    """
    where, _, tail = words.rpartition(":")
    try:
        scale = float(tail) if where else 1.0
    except ValueError:
        where, scale = "", 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {words}: the scale {tail} is no finite number, such as 0.8")
    path = Path(where or words)
    # Of a folder of runs, the newest that came to its end.
    runs = sorted(path.glob(f"*/final_model/{LORA}"), reverse=True)
    inside = [path / name for name in (LORA, *OTHER_FILES)]
    for file in (path, *inside, path / "final_model" / LORA, *runs):
        if file.is_file():
            return file, scale
    raise UserError(f"--lora {words}: there is no such file; give a .safetensors, or FILE:0.8")


def fuse_lora(bundle: Bundle, file: Path, scale: float) -> None:
    """Add `scale` times the LoRA in `file` to the weights of `bundle`. Raises UserError.

    A weight W becomes W + scale * alpha / rank * B A (Hu et al. 2021, "LoRA").
    """
    check_header(read_lora_header(file), bundle, file)
    names = ("text_encoder", "text_encoder_2")
    parts = {"unet": bundle.unet, **dict(zip(names, bundle.text.encoders, strict=False))}
    for layer, down, up, share in read_pairs(file):
        name, _, path = layer.partition(".")
        module = _module(parts.get(name), path)
        _check_fit(module, down, up, f"{file} ({layer})", bundle)
        weight: Any = getattr(module, "weight", None)
        delta = (up.flatten(1).float() @ down.flatten(1).float()).view_as(weight)
        if not is_finite(delta):
            raise UserError(f"the LoRA {file} ({layer}) holds NaN or infinite numbers")
        weight.data += (scale * share * delta).to(weight)


def _module(part: PreTrainedModel | Any, path: str) -> nn.Module | None:
    """The layer at `path` of a network, whatever level its library leaves out."""
    if part is None:
        return None
    path = path if hasattr(part, "text_model") else path.removeprefix(LEVEL)
    try:
        return part.get_submodule(path)
    except AttributeError:
        return None


def _check_fit(
    module: nn.Module | None, down: Tensor, up: Tensor, where: str, bundle: Bundle
) -> None:
    """Raise UserError unless the matrices belong to the weight of this layer."""
    weight: Any = getattr(module, "weight", None)
    made = (up.shape[0], *down.shape[1:])
    found = None if weight is None else tuple(weight.shape)
    if found != made:
        has = f"is {found} there" if found else "is not there"
        raise UserError(
            f"the LoRA {where} was trained on another base: its layer is {made}, and in "
            f"{bundle.name} ({bundle.family}) it {has}"
        )


def check_header(header: TunedHeader | None, bundle: Bundle, file: Path) -> None:
    """Raise UserError when a LoRA was trained on another kind of base."""
    if header is None:
        return
    wanted = (header.base_family, header.prediction_type)
    found = (bundle.family, bundle.prediction_type)
    if wanted != found:
        raise UserError(
            f"the LoRA {file} was trained on a {' '.join(wanted)} base ({header.base}), but "
            f"{bundle.name} is {' '.join(found)}; give a base of that kind"
        )
    if current_name(header.base) != bundle.name:
        log.info("%s was trained on %s and is used with %s", file, header.base, bundle.name)

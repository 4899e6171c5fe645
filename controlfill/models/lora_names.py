"""LoRA files: the names of PEFT, which diffusers writes, and of kohya, which other tools read.

`unet.mid_block.attentions.0.proj_in.lora_A.weight` is `lora_unet_mid_block_attentions_0_proj_in
.lora_down.weight` there. kohya's product is scaled by alpha / rank, ours by 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.models.layout_text import full_name
from controlfill.models.layout_unet import FIXED, RESNET, UnetNames
from controlfill.models.recognise import NameLayout, other_method

Tensors = dict[str, Tensor]
# The key of diffusers' safetensors header that tells alphas and ranks, as JSON.
ADAPTER_KEY = "lora_adapter_metadata"
UNET = "unet"
# kohya's starts of the parts: with one text encoder and with two.
ONE, TWO = (
    {"text_encoder": "lora_te_"},
    {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
)
STARTS = {
    "lora_unet_": UNET, "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}  # fmt: skip
# How the two matrices are called: the one that goes down to the rank, and the one that goes up.
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight",
        ".lora_linear_layer.down.weight", ".lora_down.weight")  # fmt: skip
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", "_lora.up.weight",
      ".lora_linear_layer.up.weight", ".lora_up.weight")  # fmt: skip
# LyCORIS may put a third matrix between the two of a convolution.
MIDDLE = ".lora_mid.weight"
# Attention of text encoders in the old names of diffusers, which are the UNet's.
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Words with underscores of their own, among the underscores that stand for dots.
WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v",
    "to_out", "proj_in", "proj_out", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj",
    "time_embedding", "add_embedding", "linear_1", "linear_2", "text_model", "self_attn",
    "q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "token_embedding",
    "input_blocks", "output_blocks", "middle_block", "in_layers", "out_layers", "emb_layers",
    "skip_connection", "time_embed", "label_emb",
)  # fmt: skip
TOKEN = re.compile("|".join([*sorted(WORDS, key=len, reverse=True), "[A-Za-z0-9]+"]))


def detect(names: Iterable[str]) -> NameLayout | None:
    """`kohya` or `diffusers` (PEFT's names); None for names that are no LoRA's."""
    names = list(names)
    if not any(name.endswith(DOWN) for name in names):
        return None
    return "kohya" if any(name.startswith(tuple(STARTS)) for name in names) else "diffusers"


def from_kohya(weights: Mapping[str, Tensor]) -> Tensors:
    """Any LoRA under PEFT's names, its alphas multiplied into its matrices.

    Takes kohya's names of either UNet layout, and diffusers' old ones. Raises UserError for what
    is no LoRA of two matrices.
    """
    found: Tensors = {}
    for module, (down, up, alpha) in pairs(weights).items():
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        down_scale, up_scale = split_scale(scale)
        found[f"{module}.lora_A.weight"] = down if down_scale == 1 else down * down_scale
        found[f"{module}.lora_B.weight"] = up if up_scale == 1 else up * up_scale
    return found


def to_kohya(weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Tensors:
    """A LoRA under kohya's names; SDXL's UNet by those of the original layout.

    Alphas are the rank, or what diffusers' `metadata` says. Raises UserError for what is no LoRA
    of two matrices.
    """
    read = pairs(weights)
    two = is_sdxl(read)
    told = read_alphas(metadata or {})
    found: Tensors = {}
    for module, (down, up, alpha) in read.items():
        name = kohya_name(module, two)
        size = alpha
        if size is None:
            size = told(module, down.shape[0]) * rooted(metadata or {}, module, down.shape[0])
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down, up
        found[f"{name}.alpha"] = torch.tensor(size, dtype=down.dtype)
    return found


class Parts(NamedTuple):
    """What the tensors of a module's LoRA are called in a file; `middle` lies between the two."""

    down: str
    up: str
    alpha: str | None
    middle: str | None


def pairs(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float | None]]:
    """The matrices down and up and the alpha of each module, by its diffusers name.

    Raises UserError for other methods than LoRA, and for a matrix without its other.
    """
    found = {}
    for module, parts in find_parts({n: tuple(t.shape) for n, t in weights.items()}).items():
        middle = None if parts.middle is None else weights[parts.middle]
        alpha = None if parts.alpha is None else float(weights[parts.alpha])
        found[module] = (fold(weights[parts.down], middle), weights[parts.up], alpha)
    return found


def fold(down: Tensor, middle: Tensor | None) -> Tensor:
    """The matrix down (rank, in, k, k) that does what `down` (rank, in, 1, 1) and the k x k
    convolution `middle` (rank, rank, k, k) do one after the other."""
    if middle is None:
        return down
    folded = torch.einsum("rskl,si->rikl", middle.float(), down.flatten(1).float())
    return folded.to(down.dtype)


def find_parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parts]:
    """What of a file's tensors, given by name, is which part of which module's LoRA.

    Raises UserError for other methods than LoRA, for a matrix without its other, and for what
    belongs to neither and would be lost.
    """
    for name in shapes:
        if method := other_method(name):
            raise UserError(f"{name} belongs to no plain LoRA but to {method}, which is not read")
    found: dict[str, Parts] = {}
    for name, shape in shapes.items():
        tail = next((t for t in DOWN if name.endswith(t)), None)
        if tail is None:
            continue
        start = name[: -len(tail)]
        up, middle, alpha = start + UP[DOWN.index(tail)], start + MIDDLE, f"{start}.alpha"
        if shapes.get(up, (0, 0))[1] != shape[0] or shapes.get(middle, shape)[0] != shape[0]:
            raise UserError(f"{name} has no other matrix of its rank {shape[0]} beside it")
        module = module_name(start)
        if module in found:
            raise UserError(f"{name} and {found[module].down} are both of {module}")
        found[module] = Parts(
            name, up, alpha if alpha in shapes else None, middle if middle in shapes else None
        )
    if not found:
        raise UserError("no LoRA is found: no tensor is called .lora_A.weight or .lora_down.weight")
    used = {name for parts in found.values() for name in parts}
    odd = next((n for n in shapes if n not in used and not n.endswith(".alpha")), None)
    if odd:
        raise UserError(f"{odd} is no part of a plain LoRA, and would be lost")
    return found


def module_name(start: str) -> str:
    """The diffusers name of a module, `unet.` or `text_encoder.` before it."""
    for prefix, part in STARTS.items():
        if start.startswith(prefix):
            inner = ".".join(TOKEN.findall(start[len(prefix) :]))
            return f"{part}.{diffusers_unet(inner) if part == UNET else inner}"
    # diffusers once kept LoRAs in attention processors.
    start = start.removeprefix("base_model.model.").replace(".processor.", ".")
    part, _, inner = start.partition(".")
    if part not in (UNET, *TWO):
        text = full_name(start).startswith("text_model.")
        part, inner = ("text_encoder", start) if text else (UNET, start)
    return f"{part}.{current_layer(inner, part == UNET)}"


def current_layer(layer: str, of_unet: bool) -> str:
    """What a layer is called now of which an old file may name no more than the kind."""
    if of_unet:
        return re.sub(r"\.to_out$", ".to_out.0", layer)
    rest, _, kind = layer.rpartition(".")
    return full_name(f"{rest}.{OLD_TEXT[kind]}" if kind in OLD_TEXT else layer)


def diffusers_unet(module: str) -> str:
    """What diffusers calls a module of a UNet that may have its original name."""
    for old, new in sdxl_heads().items():
        if f"{module}.".startswith(old):
            tail = f"{module}."[len(old) :]
            if ".resnets." in new:
                tail = next((ours for ours, theirs in RESNET.items() if tail == theirs), tail)
            return f"{new}{tail}".removesuffix(".")
    if module.startswith(("input_blocks", "output_blocks")):
        raise UserError(
            f"lora_unet_{module.replace('.', '_')} is no layer of SDXL, and of no other base is "
            "called so"
        )
    return module


def kohya_name(module: str, two: bool) -> str:
    """kohya's name of a module; `two` says that the base is SDXL, with two text encoders."""
    part, _, inner = module.partition(".")
    if part != UNET:
        return (TWO if two else ONE)[part] + inner.replace(".", "_")
    if two:
        inner = (sdxl().original(f"{inner}.") or inner).removesuffix(".")
    return f"lora_unet_{inner.replace('.', '_')}"


def is_sdxl(modules: Iterable[str]) -> bool:
    """Whether the modules are those of SDXL: a second text encoder, or transformers of depth."""
    return any(
        name.startswith("text_encoder_2.") or re.search(r"^unet.*transformer_blocks\.[1-9]", name)
        for name in modules
    )


def split_scale(scale: float) -> tuple[float, float]:
    """Factors of the matrices down and up, of about the same size, whose product is `scale`.

    That of the matrix up is a power of two, which loses nothing; numbers of 16 bits vanish when
    one matrix takes a small scale alone.
    """
    down, up = scale, 1.0
    while 0 < down * 2 < up:
        down, up = down * 2, up / 2
    return down, up


def read_alphas(metadata: Mapping[str, str]) -> Any:
    """A function of a module and its rank that gives its alpha, as diffusers' header tells it."""
    try:
        told = json.loads(metadata.get(ADAPTER_KEY, "{}"))
    except ValueError as error:
        raise UserError(f"the LoRA's header is damaged: {error}") from error

    def alpha(module: str, rank: int) -> float:
        part, _, inner = module.partition(".")
        special = told.get(f"{part}.alpha_pattern") or {}
        found = next((size for end, size in special.items() if inner.endswith(end)), None)
        return found if found is not None else told.get(f"{part}.lora_alpha", rank)

    return alpha


def adapter_metadata(path: Path, metadata: dict[str, str], networks: set[str]) -> dict[str, str]:
    """What tells alphas of the LoRA at `path`: its header, or PEFT's config beside it as one."""
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if metadata.get(ADAPTER_KEY) or not beside.is_file():
        return metadata
    config = read_json(beside)
    return {ADAPTER_KEY: json.dumps({f"{n}.{k}": v for n in networks for k, v in config.items()})}


def rooted(metadata: Mapping[str, str], module: str, rank: int) -> float:
    """What to multiply an alpha by so that tools without rank stabilisation scale alike.

    With it, a LoRA is scaled by alpha over the root of its rank (Kalajdzievski 2023).
    """
    part = module.partition(".")[0]
    told = json.loads(metadata.get(ADAPTER_KEY, "{}"))
    return math.sqrt(rank) if told.get(f"{part}.use_rslora") else 1.0


@cache
def sdxl() -> UnetNames:
    """SDXL's blocks: two layers at each resolution, attention in the coarser two on the way up."""
    layers = [f"down_blocks.0.resnets.{n}.conv1" for n in (0, 1)]
    return UnetNames([*layers, *(f"up_blocks.{n}.attentions.0.proj_in" for n in (0, 1))])


@cache
def sdxl_heads() -> dict[str, str]:
    """The original names of SDXL's blocks and layers: what diffusers calls them."""
    names = [name for name in FIXED if not name.startswith(("controlnet", "class_"))]
    for block in range(3):
        names += [
            f"{side}_blocks.{block}.{what}.{n}."
            for side, layers in (("down", 2), ("up", 3))
            for what in ("resnets", "attentions")
            for n in range(layers)
        ]
        names += [f"down_blocks.{block}.downsamplers.0.", f"up_blocks.{block}.upsamplers.0."]
    heads: dict[str, str] = {}
    for name in names:
        ours = f"{name}conv." if ".downsamplers." in name else name
        heads.setdefault(sdxl().head(name)[0] or "", ours)
    return heads

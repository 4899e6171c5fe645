"""LoRA files: the names of PEFT, which diffusers writes, and of kohya, which other tools read.

`unet.mid_block.attentions.0.proj_in.lora_A.weight` is `lora_unet_mid_block_attentions_0_proj_in
.lora_down.weight` there. kohya's product is scaled by alpha / rank, ours by 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.models.layout import too_large
from controlfill.models.layout_text import NESTED, full_name
from controlfill.models.layout_unet import FIXED, RESNET, UnetNames
from controlfill.models.lora_alphas import one_alpha, read_alphas
from controlfill.models.recognise import DOWN, other_method

Tensors = dict[str, Tensor]
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
# How the other matrix is called, the one that goes up from the rank; in the order of DOWN.
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", "_lora.up.weight",
      ".lora_linear_layer.up.weight", ".lora_up.weight")  # fmt: skip
# LyCORIS may put a third matrix between the two of a convolution.
MIDDLE = ".lora_mid.weight"
# What the names of layers start with, in UNets and in text encoders.
UNET_HEADS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in.", "conv_out.",
              "time_embedding.", "add_embedding.")  # fmt: skip
TEXT_HEADS = ("text_model.encoder.layers.", "text_model.embeddings.", "text_projection.")
# The width of the text that SDXL's UNet reads.
SDXL_WIDTH = 2048
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


def from_kohya(weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Tensors:
    """Any LoRA under PEFT's names, its alphas multiplied into its matrices.

    Takes kohya's names of either UNet layout, and diffusers' old ones. Alphas that are no tensors
    are the rank, or what diffusers' `metadata` says. Raises UserError for what is no LoRA of two
    matrices, and for products that the matrices' format can't hold.
    """
    found: Tensors = {}
    told = read_alphas(metadata or {})
    for module, (down, up, alpha) in pairs(weights).items():
        rank = down.shape[0]
        scales = split_scale((told(module, rank) if alpha is None else alpha) / rank)
        for matrix, letter, scale in zip((down, up), "AB", scales, strict=True):
            name = f"{module}.lora_{letter}.weight"
            found[name] = matrix if scale == 1 else times(matrix, scale, name)
    return found


def to_kohya(weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Tensors:
    """A LoRA under kohya's names; SDXL's UNet by those of the original layout.

    Alphas, which are float32, are those of the file, else what diffusers' `metadata` says, else the
    rank. Raises UserError for what is no LoRA of two matrices.
    """
    read = pairs(weights)
    two = is_sdxl({module: down.shape[1] for module, (down, _, _) in read.items()})
    told = read_alphas(metadata or {})
    found: Tensors = {}
    for module, (down, up, alpha) in read.items():
        name = kohya_name(module, two)
        size = told(module, down.shape[0]) if alpha is None else alpha
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down, up
        found[f"{name}.alpha"] = torch.tensor(size, dtype=torch.float32)
    return found


def times(matrix: Tensor, factor: float, name: str) -> Tensor:
    """`factor` times a matrix, in its format, which may know no arithmetic."""
    wide = matrix.float() if matrix.dtype.itemsize < 4 else matrix
    return in_format(wide * factor, matrix.dtype, name)


def in_format(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in another number format. Raises UserError where that can't hold it."""
    result = tensor.to(dtype)
    if (tensor.isfinite() & ~result.float().isfinite()).any():
        raise too_large(tensor, dtype, name)
    return result


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
        alpha = None if parts.alpha is None else one_alpha(weights[parts.alpha], parts.alpha)
        down = fold(weights[parts.down], middle, parts.down)
        found[module] = (down, weights[parts.up], alpha)
    return found


def fold(down: Tensor, middle: Tensor | None, name: str) -> Tensor:
    """The matrix down (rank, in, k, k) that does what `down` (rank, in, 1, 1) and the k x k
    convolution `middle` (rank, rank, k, k) do one after the other."""
    if middle is None:
        return down
    folded = torch.einsum("rskl,si->rikl", middle.float(), down.flatten(1).float())
    return in_format(folded, down.dtype, name)


def find_parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parts]:
    """What of a file's tensors, given by name, is which part of which module's LoRA.

    Raises UserError for other methods than LoRA, for a matrix without its other, for what belongs
    to neither and would be lost, and for layers of networks that are no Stable Diffusion's.
    """
    for name in shapes:
        if method := other_method(name):
            raise UserError(f"{name} belongs to no plain LoRA but to {method}, which is not read")
    found: dict[str, Parts] = {}
    for name in shapes:
        tail = next((t for t in DOWN if name.endswith(t)), None)
        if tail is None:
            continue
        start = name[: -len(tail)]
        parts = Parts(
            down=name, up=start + UP[DOWN.index(tail)],
            alpha=next((alpha for alpha in alpha_names(start, tail) if alpha in shapes), None),
            middle=start + MIDDLE if start + MIDDLE in shapes else None,
        )  # fmt: skip
        check_shapes(parts, shapes)
        module = module_name(start)
        if module in found:
            raise UserError(f"{name} and {found[module].down} are both of {module}")
        found[module] = parts
    if not found:
        raise UserError("no LoRA is found: no tensor is called .lora_A.weight or .lora_down.weight")
    used = {name for parts in found.values() for name in parts}
    odd = next((name for name in shapes if name not in used), None)
    if odd:
        raise UserError(f"{odd} is no part of a plain LoRA, and would be lost")
    return found


def alpha_names(start: str, tail: str) -> Iterator[str]:
    """What the alpha of a module may be called whose matrix down is `start` and `tail`."""
    yield f"{start}.alpha"
    yield f"{start}{tail.removesuffix('.down.weight')}.alpha"
    yield f"{start}.lora.alpha"


def check_shapes(parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless the matrices of a module go together, by way of one rank."""
    for name in (parts.down, parts.up, parts.middle):
        shape = shapes.get(name or "", (1, 1))
        if len(shape) not in (2, 4) or 0 in shape:
            raise UserError(
                f"{name} has the shape {list(shape)}; a matrix of a LoRA has two sizes above 0, or "
                "four of a convolution"
            )
    down, rank = shapes[parts.down], shapes[parts.down][0]
    up, middle = shapes.get(parts.up, (0, 0)), shapes.get(parts.middle or "")
    if up[1] != rank or (middle and middle[:2] != (rank, rank)):
        raise UserError(f"{parts.down} has no other matrix of its rank {rank} beside it")
    small = [up[2:], down[2:]] if middle else [up[2:]]
    if any(kernel not in ((), (1, 1)) for kernel in small) or (middle and len(middle) == 2):
        raise UserError(f"{parts.down} and {parts.up} are convolutions that don't go together")


def module_name(start: str) -> str:
    """The diffusers name of a module, `unet.` or `text_encoder.` before it.

    Raises UserError for layers of other networks, whose names would come out as nonsense.
    """
    part, layer = split_name(start)
    if not f"{layer}.".startswith(UNET_HEADS if part == UNET else TEXT_HEADS):
        raise UserError(
            f"{start} is no layer of a Stable Diffusion's UNet or text encoder; LoRAs of other "
            "networks are not read"
        )
    return f"{part}.{layer}"


def split_name(start: str) -> tuple[str, str]:
    """The network that a module lies in, and its diffusers name there."""
    for prefix, part in STARTS.items():
        if start.startswith(prefix):
            inner = ".".join(TOKEN.findall(start[len(prefix) :]))
            return part, diffusers_unet(inner) if part == UNET else inner
    # diffusers once kept LoRAs in attention processors.
    start = start.removeprefix("base_model.model.").replace(".processor.", ".")
    part, _, inner = start.partition(".")
    if part not in (UNET, *TWO):
        text = full_name(start).startswith(NESTED)
        part, inner = ("text_encoder", start) if text else (UNET, start)
    return part, current_layer(inner, part == UNET)


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


def is_sdxl(modules: Mapping[str, int]) -> bool:
    """Whether modules, given with the width of what they read, are those of SDXL.

    It has a second text encoder, transformers of depth, and cross-attention to wide text.
    """
    return any(
        name.startswith("text_encoder_2.")
        or re.search(r"^unet.*transformer_blocks\.[1-9]", name)
        or (width == SDXL_WIDTH and re.search(r"^unet.*attn2\.to_[kv]$", name))
        for name, width in modules.items()
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

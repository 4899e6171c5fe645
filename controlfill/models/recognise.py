"""What a weights file holds, told by the names and shapes of its tensors alone.

The marks are those by which A1111 and ComfyUI tell files apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from controlfill.models.weights import Weights

Kind = Literal["checkpoint", "controlnet", "unet", "vae", "text_encoder", "lora", "unknown"]
NameLayout = Literal["original", "kohya", "diffusers"]

# Families by the width of the text that a network reads.
TEXT_WIDTHS = {768: "sd15", 1024: "sd2", 1280: "refiner", 2048: "sdxl", 128: "embedded"}
UNET, VAE, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
# Text encoders of whole checkpoints: prefix, part of a pipeline, whether it is OpenCLIP's.
TEXTS = (
    ("cond_stage_model.transformer.", "text_encoder", False),
    ("cond_stage_model.model.", "text_encoder", True),
    ("conditioner.embedders.0.transformer.", "text_encoder", False),
    ("conditioner.embedders.1.model.", "text_encoder_2", True),
    # SD 2.1 Turbo has SD 2's encoder under the names of SDXL's tools.
    ("conditioner.embedders.0.model.", "text_encoder", True),
)
LORA_MARKS = (
    ".lora_down.", ".lora_A.", ".lora.down.", "_lora.down.", ".lora_linear_layer.down.",
    ".lora_up.",
)  # fmt: skip
# How the matrix that goes down to the rank is called.
DOWN = (
    ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight",
    ".lora_linear_layer.down.weight", ".lora_down.weight",
)  # fmt: skip
# What is trained beside a base like a LoRA, and is none: parts of the names of its tensors.
OTHER_METHODS = {
    "hada_": "a LoHa", "lokr_": "a LoKr", "dora_scale.": "a DoRA",
    "lora_magnitude_vector": "a DoRA", "oft_": "an OFT", "a1.weight.": "a GLoRA",
    "on_input.": "an IA3", "diff.": "differences of whole weights",
    "w_norm.": "a LyCORIS of norms", "to_k_ip.": "an IP-Adapter",
}  # fmt: skip


@dataclass(frozen=True)
class What:
    """What a file holds: `family` is sd15, sd2, sdxl, embedded, or sd-WIDTH; "" is untold."""

    kind: Kind
    layout: NameLayout
    family: str = ""
    prefix: str = ""


def recognise(weights: Weights) -> What:
    """What `weights` are; kind `unknown` where no mark is found."""
    if any(mark in n for n in weights.names for mark in LORA_MARKS) or any(
        other_method(name) for name in weights.names
    ):
        kohya = any(name.startswith(("lora_unet_", "lora_te")) for name in weights.names)
        return What("lora", "kohya" if kohya else "diffusers", lora_family(weights))
    for mark, what in MARKS.items():
        if mark in weights:
            return _complete(weights, what)
    return What("unknown", "diffusers")


def other_method(name: str) -> str | None:
    """The method, no LoRA, that a tensor of this name is of; None for other tensors."""
    found = (what for mark, what in OTHER_METHODS.items() if f".{mark}" in f"{name}.")
    return next(found, None)


def _complete(weights: Weights, what: What) -> What:
    """The same with its family, and a checkpoint only where it is more than a UNet."""
    kind = what.kind
    if what.prefix == UNET and any(name.startswith((VAE, *PREFIXES)) for name in weights.names):
        kind = "checkpoint"
    return What(kind, what.layout, "" if kind == "vae" else family(weights), what.prefix)


def family(weights: Weights) -> str:
    """The family of a network that reads text; "" when it reads none."""
    width = text_width(weights)
    if width is None:
        return ""
    framed = any("label_emb." in name or "add_embedding.linear" in name for name in weights.names)
    return TEXT_WIDTHS.get(width) or f"{'sdxl' if framed else 'sd'}-{width}"


def text_width(weights: Weights) -> int | None:
    """The width of the text that the UNet or ControlNet among `weights` reads."""
    names = (name for name in weights.names if name.endswith(".attn2.to_k.weight"))
    return next((weights.shape(name)[1] for name in names), None)


def lora_family(weights: Weights) -> str:
    """The family of the base that a LoRA was made for; "" when it touches no cross-attention."""
    for name in weights.names:
        if "attn2" in name and "to_k" in name and name.endswith(DOWN):
            width = weights.shape(name)[1]
            return TEXT_WIDTHS.get(width) or f"sd-{width}"
    return ""


def text_parts(names: Iterable[str]) -> Mapping[str, tuple[str, bool]]:
    """The text encoders of a checkpoint: part, to its prefix and whether it is OpenCLIP's."""
    starts = {prefix for prefix in PREFIXES for name in names if name.startswith(prefix)}
    return {part: (prefix, opened) for prefix, part, opened in TEXTS if prefix in starts}


PREFIXES = tuple(prefix for prefix, _, _ in TEXTS)
# The first mark found decides, so what holds others stands before them.
MARKS = {
    # ControlNets that are the difference to a base, as a LoRA is.
    "lora_controlnet": What("unknown", "original"),
    "controlnet_cond_embedding.conv_in.weight": What("controlnet", "diffusers"),
    f"{CONTROL}zero_convs.0.0.weight": What("controlnet", "original", prefix=CONTROL),
    "zero_convs.0.0.weight": What("controlnet", "kohya"),
    f"{UNET}input_blocks.0.0.weight": What("unet", "original", prefix=UNET),
    "input_blocks.0.0.weight": What("unet", "original"),
    "down_blocks.0.resnets.0.time_emb_proj.weight": What("unet", "diffusers"),
    "encoder.down_blocks.0.resnets.0.conv1.weight": What("vae", "diffusers"),
    f"{VAE}encoder.down.0.block.0.conv1.weight": What("vae", "original", prefix=VAE),
    "encoder.down.0.block.0.conv1.weight": What("vae", "original"),
    "text_model.embeddings.token_embedding.weight": What("text_encoder", "diffusers"),
    "embeddings.token_embedding.weight": What("text_encoder", "diffusers"),
}

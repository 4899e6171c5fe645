"""Options of the commands that turn model files into other model files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from controlfill.options.base import Options

Layout = Literal["diffusers", "original", "kohya"]
NumberFormat = Literal["keep", "fp16", "bf16", "fp32"]
Prediction = Literal["epsilon", "v_prediction"]
MergeMethod = Literal["add_difference", "weighted_sum", "lora", "extract_lora"]
MergePart = Literal["unet", "vae", "text_encoder"]
LoraLayout = Literal["diffusers", "kohya"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Write a checkpoint, ControlNet or LoRA in the layout of other tools, and back."""

    source: Positional[Path]
    """A diffusers folder, or a file: .safetensors, .ckpt, .pt, .pth, .bin."""
    out: Positional[Path]
    """What to write: a .safetensors file, or a diffusers folder."""
    layout: Layout | None = None
    """Names of the tensors: `original` (A1111, ComfyUI), `kohya`, or `diffusers`; otherwise the
    usual one, original in a file and diffusers in a folder."""
    dtype: NumberFormat = "keep"
    """Number format of the tensors written."""
    prediction_type: Prediction | None = None
    """What the network of a single file predicts; otherwise what the file says, else epsilon."""
    tokenizer: str | None = None
    """Folder or hub id of a CLIP tokenizer, which single files lack; otherwise OpenAI's."""
    config_from: Path | None = None
    """A diffusers folder of the same architecture, for files of widths that no release has."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Merge checkpoints A B C, bake LoRAs into A, or take A's difference to B out as a LoRA."""

    models: Positional[tuple[str, ...]]
    """A B C ...: diffusers folders, folders of a network, or files, all of one layout."""
    out: Path
    """What to write: a folder if A is one, else a .safetensors file; a LoRA is a file."""
    method: MergeMethod = "add_difference"
    """`add_difference`: A + alpha (B - C), which makes an inpaint model of any: A the custom model,
    B the inpaint model, C what both come from. `weighted_sum`: a mean of all models. `lora`: A with
    --loras in it. `extract_lora`: the LoRA that makes A of B."""
    alpha: float | None = None
    """How much of the difference, otherwise 1; in a weighted sum of two the share of B, otherwise
    0.5."""
    weights: tuple[float, ...] = ()
    """The models' weights in a weighted sum, one each; they are divided by their sum."""
    block_alphas: str | None = None
    """Alphas of their own for blocks of the UNet: numbers with commas, for BASE, IN00 to IN11, M00,
    OUT00 to OUT11 (the first may lack), or a YAML file with such a list or with lines `IN04: 0.3`
    or `down_blocks.1: 0.3`. The others have --alpha."""
    parts: tuple[MergePart, ...] = ("unet",)
    """What is merged, or looked at for a LoRA; all else is A's. `text_encoder` is both of SDXL."""
    loras: tuple[Path, ...] = ()
    """LoRAs to bake in: files of diffusers, PEFT or kohya, or folders that hold one."""
    lora_scales: tuple[float, ...] = ()
    """Their weights, one each; otherwise 1."""
    rank: int = 32
    """The largest rank of an extracted LoRA."""
    conv_rank: int | None = None
    """The same for convolutions larger than 1x1, 0 for none of them; otherwise --rank."""
    energy: float = 1.0
    """The share of a weight's difference (of its squared singular values) at which the rank is
    high enough; 1 means --rank everywhere."""
    layout: LoraLayout = "diffusers"
    """Names of an extracted LoRA: `diffusers`, or `kohya` for A1111 and ComfyUI."""
    dtype: NumberFormat = "keep"
    """Number format of the tensors written; `keep` is A's. All is reckoned in fp32."""


@dataclass(frozen=True, kw_only=True)
class GlidSplitOptions(Options):
    """Write the UNet of a checkpoint as a file of its own, as glid-3-xl-stable has it."""

    source: Positional[Path]
    """A whole checkpoint: a file, or a diffusers folder."""
    out: Positional[Path]
    """The UNet, a .safetensors file."""


@dataclass(frozen=True, kw_only=True)
class GlidJoinOptions(Options):
    """Put a UNet back into a checkpoint, whatever its channels (4, 8 or 9)."""

    source: Positional[Path]
    """A whole checkpoint: a file, or a diffusers folder."""
    unet: Positional[Path]
    """The UNet: a file of it alone, another checkpoint, or a diffusers folder."""
    out: Positional[Path]
    """The new checkpoint: a .safetensors file, or a folder where SOURCE is one."""

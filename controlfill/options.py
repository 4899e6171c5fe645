"""Every knob of every command: frozen dataclasses, free of torch.

A field is a flag, a YAML key and a key of the settings saved with each result, all by one name; the
text below a field is its `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from tyro.conf import Positional

from controlfill.errors import UserError

SpecName = Literal["masked-image", "masked-image+mask", "masked-latent+mask"]
SchedulerName = Literal["ddim", "ddpm", "unipc", "dpm++2m", "euler"]
Precision = Literal["no", "fp16", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]

# The least value of options that are numbers, by name: the same name means the same everywhere.
LEAST = {
    "seed": 0, "num_workers": 0, "learning_rate": 0, "lr_warmup_steps": 0, "adam_weight_decay": 0,
    "max_grad_norm": 0, "log_images_steps": 0, "feather": 0, "guidance_scale": 0,
    "controlnet_conditioning_scale": 0, "batch_size": 1, "eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "num_epochs": 1, "max_steps": 1, "save_steps": 1,
    "log_steps": 1, "checkpoints_total_limit": 1, "num_inference_steps": 1, "num_samples": 1,
    "image_size": 8,
}  # fmt: skip
SHARES = {"ema_decay": (0, 0.999999), "proportion_empty_prompts": (0, 1)}
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Mask kinds drawn unless told otherwise; where no object is known, strokes stand in for it.
MASK_KINDS = (
    "rectangles", "strokes", "object", "object-box", "lama", "noise", "ellipse", "border",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all options share."""

    def as_dict(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def check_numbers(options: Options) -> None:
    """Raise UserError for the first number that can't be meant."""
    for name, least in LEAST.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; at least {least} is needed")
    for name, (low, high) in SHARES.items():
        value = getattr(options, name, low)
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}; it lies between {low} and {high}")


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The type of each field of an options class, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Where pictures come from, and what is masked in them."""

    ann_file: Path | None = None
    """COCO instances file; its polygons and RLEs become object masks."""
    captions_file: Path | None = None
    """COCO captions file; its captions become prompts."""
    mask_dir: Path | None = None
    """Folder of masks named like the pictures (white = fill); drawn fresh masks otherwise."""
    image_size: int = 512
    """Side of the square training crops, in pixels."""
    crop: Literal["random", "center"] = "random"
    """Where the square is cut from a picture whose short side was made to fit."""
    random_flip: bool = False
    """Mirror half of the pictures, with their masks."""
    mask_kinds: tuple[str, ...] = MASK_KINDS
    """Kinds of masks drawn, each with an optional weight: `strokes=2 object border=0.5`."""
    mask_area: tuple[float, float] = (0.1, 0.3)
    """Smallest and largest share of the picture that a drawn mask covers."""
    seed: int = 42
    """Seed of everything random; the same seed gives the same run."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Train a ControlNet to fill holes."""

    image_dir: str
    """Folder of pictures, or `world:shapes` for endless procedural ones."""
    pretrained_model_name_or_path: str = SD15
    """The base: a diffusers folder, a hub id, or `embedded`."""
    controlnet_model_name_or_path: str | None = None
    """ControlNet to start from; otherwise it starts as a copy of the base's encoder."""
    conditioning: SpecName = "masked-image"
    """What the ControlNet sees; saved with its weights."""
    batch_size: int = 4
    """Pictures per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    num_epochs: int = 100
    """Passes over the pictures, unless --max_steps says otherwise."""
    max_steps: int | None = None
    """Optimizer steps; overrides --num_epochs."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; linear and cosine end at zero."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    adam_weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that final_model then holds; 0 keeps no average."""
    proportion_empty_prompts: float = 0.0
    """Share of prompts replaced by the empty one."""
    mixed_precision: Precision = "no"
    """Number format of the forward pass."""
    output_dir: Path = Path("./outputs")
    """The run's folder is made in here."""
    save_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; older ones go after a new one is whole. All are kept otherwise."""
    log_steps: int = 50
    """Steps between log lines."""
    log_images_steps: int = 500
    """Steps between image panels; 0 draws none."""
    num_workers: int = 4
    """Processes that read pictures and draw masks."""
    resume_from_checkpoint: str | None = None
    """`latest`, or the path of a checkpoint or run, to go on from."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """How a picture is sampled."""

    prompt: str = ""
    """What should be in the hole."""
    negative_prompt: str = ""
    """What should not."""
    guidance_scale: float | None = None
    """Weight of the prompt; 1 turns guidance off. Otherwise the base's own usual value."""
    controlnet_conditioning_scale: float = 1.0
    """Weight of the ControlNet; 0 turns it off."""
    num_inference_steps: int = 20
    """Denoising steps."""
    scheduler: SchedulerName = "ddim"
    """Sampling method; unipc and dpm++2m use Karras sigmas where the base allows it."""
    seed: int = 42
    """Seed of the noise."""
    feather: int = 0
    """Pixels around the hole over which old and new blend; 0 leaves each known pixel alone."""


@dataclass(frozen=True, kw_only=True)
class FillOptions(SampleOptions):
    """What the filling commands share: how to sample, where to compute, where to write."""

    conditioning: SpecName | None = None
    """What the ControlNet was trained with; only for foreign weights, which don't say."""
    mixed_precision: Precision = "no"
    """Number format of the networks."""
    device: Device = "auto"
    """Where to compute."""
    output_dir: Path = Path("./outputs/inference")
    """Folder of the results."""


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(FillOptions):
    """Fill the white part of MASK in IMAGE; writes inpainted.png and comparison.png."""

    image: Positional[Path]
    """The picture."""
    mask: Positional[Path]
    """The mask, as large as the picture: white = fill, black = keep."""
    control: str | None = None
    """ControlNet: checkpoint folder, final_model, diffusers folder, .safetensors, or `embedded`."""
    base: str | None = None
    """The base; otherwise the one the ControlNet was trained on."""


@dataclass(frozen=True, kw_only=True)
class InferOptions(FillOptions):
    """Fill the white part of a mask with a trained checkpoint."""

    checkpoint_path: str
    """Checkpoint folder, final_model, diffusers folder, or a single .safetensors file."""
    input_image: Path
    """The picture."""
    input_mask: Path
    """The mask, as large as the picture: white = fill, black = keep."""
    pretrained_model_name_or_path: str | None = None
    """The base; otherwise the one recorded in the checkpoint."""
    num_inference_steps: int = 50
    """Denoising steps."""

    def as_inpaint(self) -> InpaintOptions:
        """The same request in the words of `controlfill inpaint`."""
        shared = {f.name: getattr(self, f.name) for f in fields(FillOptions)}
        return InpaintOptions(
            image=self.input_image,
            mask=self.input_mask,
            control=self.checkpoint_path,
            base=self.pretrained_model_name_or_path,
            **shared,
        )


@dataclass(frozen=True, kw_only=True)
class MaskOptions(Options):
    """Draw a test mask and write it as PNG."""

    out: Positional[Path]
    """The PNG to write."""
    size: str = "512x512"
    """Width x height in pixels."""
    kind: str = "rectangle"
    """rectangle, circle, text, or any kind that training draws (strokes, noise, border, ...)."""
    area: tuple[float, float] = (0.1, 0.3)
    """Smallest and largest share of the picture that is white; full and text ignore it."""
    text: str = "fill"
    """The text of kind `text`."""
    seed: int = 42
    """Another seed draws another mask."""


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(DataOptions):
    """Show what training will see: a grid of pictures, masks, hints and prompts."""

    data: Positional[str]
    """Folder of pictures, or `world:shapes`."""
    conditioning: SpecName = "masked-image"
    """The hint to show."""
    num_samples: int = 8
    """Rows of the grid."""
    output: Path = Path("data_sample.png")
    """The picture to write."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """Measure fills on pictures whose truth is known, beside classical fills."""

    data: Positional[str] = "world:shapes"
    """Folder of pictures, or `world:shapes` (its held-out pictures)."""
    image_size: int = 64
    """Side of the square pictures, in pixels."""
    num_samples: int = 256
    """Pictures measured."""
    control: str | None = None
    """ControlNet to measure; the embedded one otherwise."""
    base: str | None = None
    """The base; otherwise the one the ControlNet was trained on."""
    conditioning: SpecName | None = None
    """What the ControlNet was trained with; only for foreign weights, which don't say."""
    num_inference_steps: int = 20
    """Denoising steps."""
    scheduler: SchedulerName = "ddim"
    """Sampling method."""
    guidance_scale: float | None = None
    """Weight of the prompt; the base's own usual value otherwise."""
    classical: tuple[str, ...] = ("telea", "navier-stokes", "biharmonic")
    """Classical fills to compare with."""
    objects: bool = True
    """On a world, also mask each object wholly and check what comes back against the prompt."""
    eval_batch_size: int = 32
    """Pictures sampled together."""
    device: Device = "auto"
    """Where to compute."""
    output_dir: Path = Path("./outputs/evaluation")
    """Folder of report.json, report.html and the pictures."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """Check the installation: versions, device, memory, and one training and one sampling step."""

    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Walk the whole road on the embedded base: train, fill holes, measure, show a page."""

    output_dir: Path = Path("./demo")
    """Folder of the page and its pictures."""
    max_steps: int = 600
    """Training steps of the little run; the loss begins to fall after some 300."""
    num_samples: int = 64
    """Held-out pictures measured."""
    seed: int = 42
    """Seed of everything random."""

"""What all options share: names, bounds and how they become plain values."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from controlfill.errors import UserError

SpecName = Literal["masked-image", "masked-image+mask", "masked-latent+mask", "image"]
SchedulerName = Literal["ddim", "ddpm", "unipc", "dpm++2m", "euler"]
Precision = Literal["no", "fp16", "bf16"]
Anchor = Literal[
    "top-left", "top", "top-right", "left", "center", "right",
    "bottom-left", "bottom", "bottom-right",
]  # fmt: skip
FillName = Literal[
    "telea", "navier-stokes", "biharmonic", "edge", "mirror", "mosaic", "mean", "blur", "noise"
]
WindowOrder = Literal["outward", "rows", "joint"]
Device = Literal["auto", "cpu", "cuda", "mps"]

# The least value of options that are numbers, by name: the same name means the same everywhere.
LEAST = {
    "shuffle_buffer": 1, "max_train_samples": 1,
    "seed": 0, "num_workers": 0, "learning_rate": 0, "lr_warmup_steps": 0, "adam_weight_decay": 0,
    "max_grad_norm": 0, "log_images_steps": 0, "feather": 0, "guidance_scale": 0,
    "controlnet_conditioning_scale": 0, "batch_size": 1, "eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "num_epochs": 1, "max_steps": 1, "save_steps": 1,
    "log_steps": 1, "checkpoints_total_limit": 1, "num_inference_steps": 1, "num_samples": 1,
    "image_size": 8, "accumulate_grad_batches": 1, "gradient_clip_val": 0, "save_every_n_epochs": 1,
    "save_top_k": -1, "log_every_n_steps": 1, "log_images_every_n_steps": 0, "devices": -1,
    "num_nodes": 1, "early_stopping_patience": 1, "overfit_batches": 0, "snr_gamma": 0.001,
    "noise_offset": 0, "hole_weight": 0, "num_validation_images": 1, "validation_steps": 1,
    "variants": 1, "count": 1, "per_shard": 1, "window_size": 0,
    "window_batch": 1, "context": 1, "num_images": 1, "left": 0, "right": 0, "top": 0, "bottom": 0,
    "num_zooms": 1, "zoom_factor": 1.01, "seconds_per_zoom": 0.01, "fps": 1,
    "text_box_weight": 0, "text_loss": 0, "text_loss_feature": 0, "text_loss_ctc": 0,
    "rank": 1, "lora_alpha": 0.001, "text_encoder_lr": 0, "num_class_images": 1,
    "prior_loss_weight": 0, "text_loss_labels": 1, "low": 0, "high": 1, "max_new_tokens": 1,
    "clip_guidance_scale": 0, "clip_guidance_cutouts": 1,
    "conv_rank": 0,
}  # fmt: skip
SHARES = {
    "ema_decay": (0, 0.999999),
    "proportion_empty_prompts": (0, 1),
    "val_split": (0, 0.9),
    "window_overlap": (0, 0.9),
    "control_guidance_start": (0, 1),
    "control_guidance_end": (0, 1),
    "guidance_start": (0, 1),
    "guidance_end": (0, 1),
    "clip_guidance_end": (0, 1),
    "strength": (0, 1),
    "text_loss_max_t": (0.001, 1),
    "energy": (0.001, 1),
    "confidence": (0, 1),
}
# Other names that users know, for the same option.
ALIASES = {"checkpointing_steps": "save_steps"}
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


def shared_values(options: Options, cls: type[Options]) -> dict[str, Any]:
    """The values of all options of `cls`, which `options` have too, by name."""
    return {f.name: getattr(options, f.name) for f in fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


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


def read_size(option: str, text: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT, as --`option` has it. Raises UserError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not found or not all(int(side) for side in found.groups()):
        raise UserError(f"--{option} {text!r} is no size; WIDTHxHEIGHT such as 1920x1080 would be")
    return int(found[2]), int(found[1])


def check_values(cls: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` as the fields of options `cls` want them. Raises UserError that names `where`."""
    from pydantic import TypeAdapter, ValidationError

    types = field_types(cls)
    checked = {}
    for word, value in values.items():
        key = ALIASES.get(word, word)
        if key not in types:
            raise UserError(f"{where}: {key} is no option; there are: {', '.join(types)}")
        if value is False and "no" in get_args(types[key]):
            value = "no"  # noqa: PLW2901  (an unquoted no means false in YAML)
        try:
            checked[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            found = f"{error.errors()[0]['msg']}, found {value!r}"
            raise UserError(f"{where}: {key}: {found}") from error
    return checked


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The type of each field of an options class, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}

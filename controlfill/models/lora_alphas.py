"""What scales a LoRA: its alphas, as tensors, in diffusers' header, or in the config of PEFT.

A product is multiplied by alpha / rank; without an alpha, by 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.models.layout_text import NESTED
from controlfill.models.weights import find_weights

# The key of diffusers' safetensors header that tells alphas and ranks, as JSON.
ADAPTER_KEY = "lora_adapter_metadata"
# What that takes from PEFT's config; the rest differs between versions of PEFT.
PEFT_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
LARGEST_ALPHA = 1e30
NETWORKS = ("unet", "text_encoder", "text_encoder_2")


def read_alphas(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """A function of a module and its rank that gives its alpha, as diffusers' header tells it.

    With rank stabilisation a LoRA is scaled by alpha over the root of its rank (Kalajdzievski
    2023); the alpha is then the one that scales alike without. Raises UserError.
    """
    told = read_adapter(metadata)
    patterns = {
        part: [
            (pattern_of(key), size)
            for key, size in (told.get(f"{part}.alpha_pattern") or {}).items()
        ]
        for part in NETWORKS
    }

    def alpha(module: str, rank: int) -> float:
        part, _, inner = module.partition(".")
        # Text encoders have had a level more in their names, and less.
        names = (inner, inner.removeprefix(NESTED))
        found = (size for pattern, size in patterns[part] if any(map(pattern.match, names)))
        size = next(found, told.get(f"{part}.lora_alpha"))
        size = float(rank if size is None else size)
        return size * math.sqrt(rank) if told.get(f"{part}.use_rslora") else size

    return alpha


def pattern_of(key: str) -> re.Pattern[str]:
    """The names that a key of PEFT's patterns means, by PEFT's own rule: the ends of names."""
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise UserError(f"the LoRA's header is damaged: {key!r} is no pattern: {error}") from error


def read_adapter(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers' header tells of adapters. Raises UserError unless it can be used."""
    try:
        told = json.loads(metadata.get(ADAPTER_KEY) or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"the LoRA's header is damaged: {error}") from error
    if not isinstance(told, dict):
        raise UserError(f"the LoRA's header is damaged: {ADAPTER_KEY} is {told!r:.40}, no mapping")
    for key, value in told.items():
        fits = FITS.get(key.rpartition(".")[2])
        if fits and value is not None and not fits(value):
            raise UserError(f"the LoRA's header is damaged: {key} is {value!r:.60}")
    return told


def adapter_metadata(path: Path, metadata: dict[str, str], networks: set[str]) -> dict[str, str]:
    """What tells alphas of the LoRA at `path`: its header, or the config beside PEFT's own file."""
    file = find_weights(path) if path.is_dir() else path
    beside = file.parent / "adapter_config.json"
    is_peft = file.name.startswith("adapter_model.") and beside.is_file()
    if metadata.get(ADAPTER_KEY) or not is_peft:
        return metadata
    config = read_json(beside)
    if not isinstance(config, dict):
        raise UserError(f"{beside} is {config!r:.40}; PEFT writes a mapping there")
    kept = {key: config[key] for key in PEFT_KEYS if config.get(key) is not None}
    return {ADAPTER_KEY: json.dumps({f"{n}.{k}": v for n in networks for k, v in kept.items()})}


def one_alpha(tensor: Tensor, name: str) -> float:
    """The number in the tensor of an alpha. Raises UserError for others."""
    size = float(tensor) if tensor.numel() == 1 else math.nan
    if not is_alpha(size):
        seen = f"{tensor.numel()} numbers" if tensor.numel() != 1 else size
        raise UserError(f"{name} is {seen}; an alpha is one finite number, such as 16")
    return size


def is_alpha(value: Any) -> bool:
    """Whether a value is a number to scale by: none too large for float32, nor NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -LARGEST_ALPHA < value < LARGEST_ALPHA


# What values of diffusers' header have to be, by the last word of their keys.
FITS: dict[str, Callable[[Any], bool]] = {
    "lora_alpha": is_alpha,
    "alpha_pattern": lambda sizes: isinstance(sizes, dict) and all(map(is_alpha, sizes.values())),
    "use_rslora": lambda value: isinstance(value, bool),
}

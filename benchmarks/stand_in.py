"""The few transforms of torchvision that the stock script uses, for installations without it.

Only to be put in place after diffusers and transformers were imported: they look for torchvision
and would want more of it. On PIL pictures these do what torchvision's do, with the same calls.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(Enum):
    """The names that the script uses."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Resize:
    """The short side to `size`, antialiased as PIL does it."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.method = size, getattr(Image.Resampling, interpolation.name)

    def __call__(self, picture: Image.Image) -> Image.Image:
        short = min(picture.size)
        sides = [int(self.size * side / short) for side in picture.size]
        return picture.resize((sides[0], sides[1]), self.method)


class CenterCrop:
    """The square of `size` in the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """A PIL picture as float (C, H, W) in [0, 1], as torchvision makes it."""

    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """(x - mean) / std, by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.clone().sub_(self.mean).div_(self.std)


class Compose:
    """One after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


def stock_transform(size: int, normalize: bool) -> Compose:
    """What the stock script makes of a target (`normalize`) or of a conditioning picture."""
    steps = [Resize(size, InterpolationMode.BILINEAR), CenterCrop(size), ToTensor()]
    return Compose([*steps, Normalize([0.5], [0.5])] if normalize else steps)


def install() -> None:
    """Make `from torchvision import transforms` give these, unless torchvision is installed."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        package, module = types.ModuleType("torchvision"), types.ModuleType("transforms")
        for item in (Resize, CenterCrop, ToTensor, Normalize, Compose, InterpolationMode):
            setattr(module, item.__name__, item)
        vars(package)["transforms"] = module
        sys.modules |= {"torchvision": package, "torchvision.transforms": module}

"""Hints: what the ControlNet sees, built here for training and inference alike.

A conditioning spec is a name and a version, saved with the weights; weights trained with one spec
are never used with another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.images import to_uint8

HOLE = -1.0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A conditioning spec: `channels` of the hint, whether it is made at latent size, and how.

    `make(image, mask)` takes the picture (B, 3, H, W) in [0, 1] and the mask (B, 1, H, W) of 0 and
    1, and returns the pixel part of the hint. Where `given`, the data brings the hint instead, a
    picture in [0, 1] (edges, poses, layouts), and everything is generated. `about` tells people.
    """

    name: str
    channels: int
    make: Callable[[Tensor, Tensor], Tensor]
    about: str
    at_latent_size: bool = False
    given: bool = False
    version: int = 1

    @property
    def label(self) -> str:
        """What is written beside weights, such as "masked-image/1"."""
        return f"{self.name}/{self.version}"


def masked_image(image: Tensor, mask: Tensor) -> Tensor:
    """Known pixels in [0, 1], the hole exactly -1 in all three channels.

    This is the convention of control_v11p_sd15_inpaint, so its weights interchange with ours.
    """
    return torch.where(mask > 0.5, torch.full_like(image, HOLE), image)


def masked_image_and_mask(image: Tensor, mask: Tensor) -> Tensor:
    """`masked_image` with the mask as a fourth channel."""
    return torch.cat([masked_image(image, mask), (mask > 0.5).to(image.dtype)], dim=1)


def blanked_image(image: Tensor, mask: Tensor) -> Tensor:
    """Known pixels in [-1, 1], the hole mid-grey (0): what the VAE encodes for the latent spec."""
    return torch.where(mask > 0.5, torch.zeros_like(image), image * 2 - 1)


def no_hint(image: Tensor, mask: Tensor) -> Tensor:
    """Raise UserError: hints of this kind come with the data and can't be made from a picture."""
    raise UserError(
        "conditioning `image` needs a conditioning picture for every picture; this data has none"
    )


def check_range(hint: Tensor, mask: Tensor, spec: Spec) -> None:
    """Raise AssertionError unless known pixels lie in [0, 1] and the hole is exactly -1.

    A hint that came with the data has no hole: all of it lies in [0, 1].

    Feeding hints in [-1, 1] is the classic silent mismatch: a black pixel then equals the hole.
    """
    if spec.at_latent_size:
        return
    pixels = hint[:, :3]
    hole = ((mask > 0.5) & (not spec.given)).expand(-1, 3, -1, -1)
    known = pixels[~hole]
    if not bool((pixels[hole] == HOLE).all()):
        raise AssertionError(f"{spec.label}: the hole of a hint must be exactly {HOLE}")
    if known.numel() and (float(known.min()) < 0 or float(known.max()) > 1):
        raise AssertionError(f"{spec.label}: known pixels of a hint must lie in [0, 1]")


def show_hint(hint: Tensor, spec: Spec) -> np.ndarray:
    """The pixel part of a hint for people, uint8 (B, H, W, 3), a hole of -1 in magenta."""
    pixels = hint[:, :3].cpu()
    if spec.at_latent_size:
        return to_uint8(pixels / 2 + 0.5)
    hole = (pixels == HOLE).all(dim=1, keepdim=True)
    magenta = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    return to_uint8(torch.where(hole, magenta, pixels))


def open_spec(name: str) -> Spec:
    """The spec called `name` ("masked-image" or "masked-image/1"). Raises UserError."""
    bare, _, version = name.partition("/")
    spec = HINTS.get(bare)
    if spec is None:
        raise UserError(f"no conditioning is called {name!r}; there are: {', '.join(HINTS)}")
    if version and version != str(spec.version):
        raise UserError(
            f"these weights want conditioning {name}, but this version of controlfill makes "
            f"{spec.label}; use the version that trained them"
        )
    return spec


HINTS = {
    spec.name: spec
    for spec in (
        Spec(
            name="masked-image",
            channels=3,
            make=masked_image,
            about="known pixels in [0, 1], the hole exactly -1 in all three channels",
        ),
        Spec(
            name="masked-image+mask",
            channels=4,
            make=masked_image_and_mask,
            about="known pixels in [0, 1], the hole -1; the mask is a fourth channel",
        ),
        Spec(
            name="masked-latent+mask",
            channels=5,
            make=blanked_image,
            about="VAE latents of the picture with a grey hole; the latent mask",
            at_latent_size=True,
        ),
        Spec(
            name="image",
            channels=3,
            make=no_hint,
            about="the conditioning picture, RGB in [0, 1]",
            given=True,
        ),
    )
}

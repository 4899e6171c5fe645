"""How far edges of a decoded picture are off: soft ones count as much as bold ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# From linear RGB to XYZ of white.
TO_XYZ = (
    (0.433953, 0.376219, 0.189828), (0.212671, 0.715160, 0.072169), (0.017758, 0.109477, 0.872766)
)  # fmt: skip


def to_lab(images: Tensor) -> Tensor:
    """RGB in [-1, 1] as Lab (N, 3, H, W), lightness up to 255 as in OpenCV, differentiable."""
    rgb = ((images + 1) / 2).clamp(1e-4, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,njhw->nihw", torch.tensor(TO_XYZ, device=images.device), linear)
    roots = torch.where(xyz > 0.008856, xyz.clamp(min=1e-5) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = roots.unbind(dim=1)
    return torch.stack([(116 * y - 16) * 2.55, 500 * (x - y), 200 * (y - z)], dim=1)


def steps_of(lab: Tensor) -> list[Tensor]:
    """Colour steps to the right and down, each both as they are and as means along the edge."""
    right = functional.pad(lab[..., :, 1:] - lab[..., :, :-1], (0, 1))
    down = functional.pad(lab[..., 1:, :] - lab[..., :-1, :], (0, 0, 0, 1))
    along_right = functional.avg_pool2d(right, (9, 1), 1, (4, 0))
    return [right, along_right, down, functional.avg_pool2d(down, (1, 9), 1, (0, 4))]


def edge_error(decoded: Tensor, truth: Tensor) -> Tensor:
    """How far steps of colour are off, relative to the strongest nearby: soft edges count too."""
    total = torch.zeros((), device=truth.device)
    pairs = zip(steps_of(decoded), steps_of(truth), (0.5, 1, 0.5, 1), (3, 2, 3, 2), strict=True)
    for found, wanted, share, least in pairs:
        size = wanted.square().sum(dim=1, keepdim=True).sqrt()
        nearby = functional.max_pool2d(size, 9, 1, 4) + least
        total = total + share * ((found - wanted).abs().sum(dim=1, keepdim=True) / nearby).mean()
    return total

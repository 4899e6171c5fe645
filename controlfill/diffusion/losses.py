"""What a sample's error counts for: by its noise level, and by where in the picture it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from controlfill.data.sample import Batch
from controlfill.diffusion.condition import latent_mask
from controlfill.diffusion.noise import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How errors are weighted: `snr_gamma` of Min-SNR (None: not), `hole` against known pixels.

    `text` is what the boxes of labels count against the rest.
    """

    snr_gamma: float | None = None
    hole: float = 1.0
    text: float = 1.0


def snr_weights(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (B,) for the schedule's own kind of prediction.

    With snr = abar / (1 - abar): min(snr, gamma) for x_0, divided by snr for epsilon and by
    snr + 1 for v (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy",
    section 3.4). At zero terminal SNR the weight of epsilon is its limit, 1.
    """
    abar = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = abar / (1 - abar)
    capped = snr.clamp(max=gamma)
    if schedule.prediction_type == "sample":
        return capped
    if schedule.prediction_type == "epsilon":
        return torch.where(snr > 0, capped / snr, torch.ones_like(snr))
    return capped / (snr + 1)


def cell_weights(batch: Batch, factor: int, weighting: Weighting) -> Tensor | None:
    """Weights (B, 1, h, w) of mean 1 at latent size; None where all count alike.

    Cells of the hole and those of labels count as `weighting` says. Texts that nobody knows count
    nothing (Tuo et al. 2024, "AnyText"). `factor` is pixels per latent cell.
    """
    unknown = any(label.text is None for labels in batch.labels for label in labels)
    if weighting.hole == 1 and weighting.text == 1 and not unknown:
        return None
    cells = 1 + (weighting.hole - 1) * latent_mask(batch.mask, factor)
    for row, labels in enumerate(batch.labels):
        for label in labels:
            b = label.box
            down = slice(b.top // factor, -(-b.bottom // factor))
            across = slice(b.left // factor, -(-b.right // factor))
            cells[row, :, down, across] *= 0 if label.text is None else weighting.text
    return cells / cells.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


def split_means(errors: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `errors` (B, C, h, w) where `cells` (B, 1, h, w) is 1, and where it is 0; each (B,).

    A part that a picture does not have is nan.
    """
    spread = cells.expand_as(errors)
    hole = (errors * spread).sum(dim=(1, 2, 3)) / spread.sum(dim=(1, 2, 3))
    known = (errors * (1 - spread)).sum(dim=(1, 2, 3)) / (1 - spread).sum(dim=(1, 2, 3))
    return hole, known

"""Metrics of completed pictures against the truth, by region: hole, known, whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skimage.metrics import structural_similarity

# A single picture that equals the truth has no finite PSNR; means of pictures count it as this.
PSNR_CAP = 60.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Sums over one picture, so that any set of pictures can be pooled.

    `squared` and `count` are of the hole, `ssim` its mean there, `known_error` the largest change
    of a known byte, `steps` and `true_steps` sums of grey-level steps across the hole's rim.
    """

    squared: float
    count: int
    ssim: float
    whole_ssim: float
    whole_squared: float
    whole_count: int
    known_error: int
    steps: float
    true_steps: float


def score(output: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> Scores:
    """Compare uint8 pictures (H, W, 3) whose hole is the white of `mask` (H, W)."""
    hole = mask > 0
    errors = (output.astype(np.float64) - truth) ** 2
    known = np.abs(output.astype(np.int16) - truth)[~hole]
    similarity = ssim_map(output, truth)
    return Scores(
        squared=float(errors[hole].sum()),
        count=int(hole.sum()) * 3,
        ssim=float(similarity[hole].mean()),
        whole_ssim=float(similarity.mean()),
        whole_squared=float(errors.sum()),
        whole_count=errors.size,
        known_error=int(known.max(initial=0)),
        steps=rim_steps(output, hole),
        true_steps=rim_steps(truth, hole),
    )


def ssim_map(output: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """SSIM around each pixel (H, W), Gaussian window of sigma 1.5 (Wang et al. 2004)."""
    if min(truth.shape[:2]) < 11:
        return (output == truth).all(axis=2).astype(np.float64)
    _, similarity = structural_similarity(  # pyright: ignore[reportAssignmentType]
        output,
        truth,
        channel_axis=-1,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return similarity.mean(axis=2)


def rim_steps(image: np.ndarray, hole: np.ndarray) -> float:
    """Sum of the steps between neighbours of which just one lies in the hole, mean of channels."""
    values = image.astype(np.float64)
    total = 0.0
    for axis in (0, 1):
        crossing = np.diff(hole.astype(np.int8), axis=axis) != 0
        total += float(np.abs(np.diff(values, axis=axis)).mean(axis=2)[crossing].sum())
    return total


def psnr(squared: float, count: int) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures; infinite when nothing differs."""
    if not squared:
        return float("inf")
    return float(10 * np.log10(255**2 * count / squared))


def summarize(scores: Sequence[Scores]) -> dict[str, float]:
    """The figures of a set of pictures.

    `hole_psnr` pools all pixels of all holes; `hole_psnr_mean` is the mean of the pictures' own,
    each capped at 60 dB. `seam` is the mean step across the rim over the truth's own step there:
    1 is perfect, more is a visible edge, less is blur.
    """
    per_picture = [min(PSNR_CAP, psnr(s.squared, s.count)) for s in scores]
    true_steps = sum(s.true_steps for s in scores)
    return {
        "pictures": len(scores),
        "hole_psnr": psnr(sum(s.squared for s in scores), sum(s.count for s in scores)),
        "hole_psnr_mean": float(np.mean(per_picture)),
        "hole_ssim": float(np.mean([s.ssim for s in scores])),
        "whole_psnr": psnr(
            sum(s.whole_squared for s in scores), sum(s.whole_count for s in scores)
        ),
        "whole_ssim": float(np.mean([s.whole_ssim for s in scores])),
        "known_max_error": max(s.known_error for s in scores),
        "seam": sum(s.steps for s in scores) / true_steps if true_steps else float("nan"),
    }

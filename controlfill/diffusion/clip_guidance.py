"""CLIP guidance: each prediction leans to where CLIP finds the picture nearer to its prompt.

After Katherine Crowson's CLIP-guided diffusion (2021), as glid-3-xl has it. CLIP sees random cuts
of the clean picture that a prediction implies; its opinion takes a classifier's place in

    eps' = eps - sqrt(1 - abar_t) grad log p(y | x_t)     (Dhariwal and Nichol 2021, equation 14)

with log p = -scale * the mean of d over the cuts, d = 2 arcsin(|u - w| / 2)^2 for the directions u
of the cut and w of the prompt: half the square of the angle between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from controlfill.diffusion.noise import NoiseSchedule
from controlfill.diffusion.sampler import Times
from controlfill.diffusion.tiles import Place, Predict
from controlfill.models.bundle import Bundle
from controlfill.models.clip import Clip

# Below this sqrt(abar_t) there is nothing of a picture in the noise, and nothing to say of it.
LEAST_SIGNAL = 0.01
# What random seeds must never be, and places may be: negative.
POSITIVE = 2**31


@dataclass(frozen=True, kw_only=True)
class ClipGuide:
    """A CLIP's wishes for pictures made by `bundle`: the directions `wanted` (B, D) of its prompts.

    `scale` is how loud, `cuts` how many it sees of each picture, `times` when. Cuts are a function
    of each picture's seed, of the time and of the place, counted in cells from `origin`.
    """

    clip: Clip
    bundle: Bundle
    wanted: Tensor
    seeds: Sequence[int]
    scale: float
    cuts: int = 16
    times: Times = None
    origin: Place = (0, 0)

    def score(self, latents: Tensor, t: Tensor, places: Sequence[Place]) -> Tensor:
        """log p of clean `latents` (B x places, C, h, w), summed over all of them."""
        pictures = self.bundle.decode_freely(latents)
        seen = [
            self.clip.fit(picture[None, :, top : top + side, left : left + side])
            for picture, rng in zip(pictures, self.rngs(t, places), strict=True)
            for top, left, side in draw_cuts(rng, picture.shape[1:], self.clip.size, self.cuts)
        ]
        wanted = self.wanted.repeat(len(places), 1).repeat_interleave(self.cuts, dim=0)
        return -self.scale / self.cuts * apart(self.clip.look(torch.cat(seen)), wanted).sum()

    def rngs(self, t: Tensor, places: Sequence[Place]) -> list[np.random.Generator]:
        """A generator for each picture: first those of the first place."""
        when = round(float(t) * 1000)
        corners = [
            [at + begin + POSITIVE for at, begin in zip(place, self.origin, strict=True)]
            for place in places
        ]
        return [
            np.random.default_rng([seed, when, *corner])
            for corner in corners
            for seed in self.seeds
        ]


class ClipGuided:
    """A denoiser of the windows at `places` whose predictions `guide` leans to their prompts."""

    def __init__(
        self, denoise: Predict, guide: ClipGuide, places: Sequence[Place] = ((0, 0),)
    ) -> None:
        self.denoise, self.guide, self.places = denoise, guide, places
        self.schedule = NoiseSchedule(guide.bundle.scheduler_config)

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        """The prediction for `latents` at the single timestep `t`."""
        step = t.detach().cpu().round().long().reshape(1)
        signal = float(self.schedule.alphas_cumprod[step].sqrt())
        silent = self.guide.times is not None and float(t) not in self.guide.times
        if silent or signal < LEAST_SIGNAL:
            return self.denoise(latents, t)
        with torch.enable_grad():
            noisy = latents.detach().requires_grad_()
            prediction = self.denoise(noisy, t)
            # Halves would lose what is left of a gradient after a decoder and a CLIP.
            clean = self.schedule.to_x0(prediction.float(), noisy.float(), step)
            (slope,) = torch.autograd.grad(self.guide.score(clean, t, self.places), noisy)
        return prediction.detach() + lean(self.schedule.prediction_type, signal) * slope


def lean(prediction_type: str, signal: float) -> float:
    """By how much of the slope of log p a prediction changes where sqrt(abar_t) is `signal`.

    It is one change of x_t's score in three coordinates: eps' = eps - s g, hence x0' = x0 + s^2/a g
    and v' = a eps' - s x0' = v - s/a g, with a = sqrt(abar_t) and s = sqrt(1 - abar_t).
    """
    noise = (1 - signal**2) ** 0.5
    return {
        "epsilon": -noise,
        "v_prediction": -noise / signal,
        "sample": noise**2 / signal,
    }[prediction_type]


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Half the square of the angle between unit directions (B, D)."""
    return (a - b).norm(dim=-1).div(2).arcsin().pow(2).mul(2)


def draw_cuts(
    rng: np.random.Generator, size: Sequence[int], least: int, count: int
) -> list[tuple[int, int, int]]:
    """(top, left, side) of `count` random squares in (height, width) = `size`.

    Sides are uniform from `least`, what CLIP itself looks at, to the shorter one of the picture.
    """
    most = min(size)
    sides = rng.integers(min(least, most), most, size=count, endpoint=True)
    down, right = (rng.integers(length - sides, endpoint=True) for length in size)
    return [(int(t), int(left), int(s)) for t, left, s in zip(down, right, sides, strict=True)]

"""The noise schedule of a base: how pictures are noised, and what the network must say about it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor


class NoiseSchedule:
    """Adds noise and states the target, as the scheduler config of a base demands.

    Notation of Ho et al. 2020: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. The velocity
    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 is that of Salimans and Ho 2022.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        scheduler: Any = DDPMScheduler.from_config(config)
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        self.prediction_type: str = scheduler.config["prediction_type"]
        self.steps: int = scheduler.config["num_train_timesteps"]

    def draw_timesteps(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` whole timesteps, uniform in [0, steps)."""
        return torch.randint(0, self.steps, (count,), generator=rng)

    def _scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
        shape = (-1,) + (1,) * (like.ndim - 1)
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
        return signal.view(shape).to(like.dtype), noise.view(shape).to(like.dtype)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of x_0 = `latents` and eps = `noise` (both B, C, H, W) at `timesteps` (B,)."""
        signal, share = self._scales(timesteps, latents)
        return signal * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict: eps, v or x_0, as the base was trained."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, share = self._scales(timesteps, latents)
        return signal * noise - share * latents

    def to_x0(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that `prediction` implies for `noisy`."""
        if self.prediction_type == "sample":
            return prediction
        signal, share = self._scales(timesteps, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - share * prediction) / signal
        return signal * noisy - share * prediction

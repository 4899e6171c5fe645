"""The sampler: from noise to latents, step by step, around latents that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from controlfill.diffusion.condition import Condition
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Known:
    """Latents that must be kept where `mask` (B, 1, h, w) is 0."""

    latents: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): `scale`, and the text `without` prompt."""

    scale: float
    without: Tensor

    def repeated(self, times: int) -> Guidance:
        """The same for `times` windows of each picture."""
        return Guidance(scale=self.scale, without=self.without.repeat(times, 1, 1))


def make_scheduler(name: str, config: dict[str, Any], steps: int, device: torch.device) -> Any:
    """A fresh diffusers scheduler for one call, set to `steps` timesteps.

    UniPC and DPM++ 2M get Karras sigmas (Karras et al. 2022), without which they are no better than
    DDIM; not on a zero-terminal-SNR base, whose largest sigma is infinite.
    """
    if name not in SCHEDULERS:
        raise UserError(f"no scheduler is called {name!r}; there are: {', '.join(SCHEDULERS)}")
    most = config.get("num_train_timesteps", 1000)
    if not 1 <= steps <= most:
        raise UserError(f"--num_inference_steps is {steps}; it lies between 1 and {most}")
    cls, extra = SCHEDULERS[name]
    if config.get("rescale_betas_zero_snr"):
        extra = {key: value for key, value in extra.items() if key != "use_karras_sigmas"}
    scheduler = cls.from_config(config, **extra)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    rng: torch.Generator,
    known: Known | None = None,
) -> Iterator[Tensor]:
    """Yield the latents (B, C, h, w) after each step, from unit `noise` to the picture's.

    Known latents are put back after every step, noised as far as that step has come.
    """
    latents = noise * scheduler.init_noise_sigma
    times = scheduler.timesteps
    extra: dict[str, Any] = {"generator": rng} if isinstance(scheduler, TAKES_NOISE) else {}
    for i, t in enumerate(times):
        prediction = denoise(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
        if known is not None:
            there = known.latents
            if i + 1 < len(times):
                there = scheduler.add_noise(there, noise, times[i + 1 : i + 2])
            latents = torch.where(known.mask > 0.5, latents, there)
        yield latents


class Denoise:
    """A denoiser with everything but latents and time filled in, guided by a prompt if asked."""

    def __init__(
        self,
        denoiser: ControlDenoiser,
        network: nn.Module | None,
        condition: Condition,
        guidance: Guidance | None = None,
        scale: float = 1.0,
    ) -> None:
        self.denoiser, self.network, self.scale, self.guidance = denoiser, network, scale, guidance
        self.condition = condition.doubled(guidance.without) if guidance else condition

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        """The prediction for `latents` at the single timestep `t`."""
        doubled = torch.cat([latents] * 2) if self.guidance else latents
        prediction = self.denoiser(self.network, doubled, t, self.condition, self.scale)
        if self.guidance is None:
            return prediction
        without, with_ = prediction.chunk(2)
        return without + self.guidance.scale * (with_ - without)


TAKES_NOISE = (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)
KARRAS = {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, KARRAS),
    "dpm++2m": (DPMSolverMultistepScheduler, KARRAS),
    "euler": (EulerDiscreteScheduler, {}),
}

"""The sampler: from noise to latents, step by step, around latents that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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
from controlfill.diffusion.reuse import embed_hint
from controlfill.errors import UserError
from controlfill.models.text import Words


@dataclass(frozen=True, kw_only=True)
class Known:
    """Latents that must be kept where `mask` (B, 1, h, w) is 0.

    Between 0 and 1 they are kept until that share of the steps is left, so they change little
    (differential diffusion, Levin and Fried 2023).
    """

    latents: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run that does not begin from pure noise begins: `latents` noised as by `step`."""

    latents: Tensor
    step: int


Times = frozenset[float] | None


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): `scale`, and the text `without` prompt.

    At all `times` or only some (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited
    Interval"); a step without it costs half.
    """

    scale: float
    without: Words
    times: Times = None

    def repeated(self, count: int) -> Guidance:
        """The same for `count` windows of each picture."""
        return replace(self, without=self.without.repeated(count))


@dataclass(frozen=True, kw_only=True)
class Control:
    """How loud the ControlNet is, at which `times`; with `prompted_only` not where guidance looks
    without the prompt, which costs less and lets the hint weigh more."""

    scale: float = 1.0
    times: Times = None
    prompted_only: bool = False


def times_between(times: Tensor, start: float, end: float, wholly: bool = True) -> Times:
    """Those of a run's `times` whose steps lie between the shares `start` and `end` of all.

    `wholly`, as diffusers' control_guidance_start and control_guidance_end mean it, or with their
    beginning, so that the first does however few there are. None means all.
    """
    if start <= 0 and end >= 1:
        return None
    count, last = len(times), 1 if wholly else 0
    return frozenset(
        float(t)
        for i, t in enumerate(times)
        if i / count >= start and (i + last) / count <= end and i / count < end
    )


def make_scheduler(name: str, config: dict[str, Any], steps: int, device: torch.device) -> Any:
    """A fresh diffusers scheduler for one call, set to `steps` timesteps.

    UniPC and DPM++ 2M get Karras sigmas (Karras et al. 2022), without which they are no better than
    DDIM; on a zero-terminal-SNR base they follow a first step from pure noise.
    """
    if name not in SCHEDULERS:
        raise UserError(f"no scheduler is called {name!r}; there are: {', '.join(SCHEDULERS)}")
    most = config.get("num_train_timesteps", 1000)
    if not 1 <= steps <= most:
        raise UserError(f"--num_inference_steps is {steps}; it lies between 1 and {most}")
    cls, extra = SCHEDULERS[name]
    scheduler = cls.from_config(config, **extra)
    if config.get("rescale_betas_zero_snr") and "use_karras_sigmas" in extra:
        scheduler._convert_to_karras = sigmas_after_noise
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def sigmas_after_noise(in_sigmas: np.ndarray, num_inference_steps: int) -> np.ndarray:
    """The largest sigma, which is all but infinite, then Karras's from FIRST_SIGMA on (rho 7).

    From the largest down by his formula most steps would be spent where nothing is to be seen.
    """
    least, most = float(min(in_sigmas)), float(max(in_sigmas))
    share = np.linspace(0, 1, num_inference_steps - 1)
    ends = FIRST_SIGMA ** (1 / 7), least ** (1 / 7)
    return np.concatenate([[most], (ends[0] + share * (ends[1] - ends[0])) ** 7])


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    rng: torch.Generator | list[torch.Generator],
    known: Known | None = None,
    start: Start | None = None,
) -> Iterator[Tensor]:
    """Yield the latents (B, C, h, w) after each step, from unit `noise` to the picture's.

    Known latents are put back after every step, noised as far as that step has come. `rng` is one
    for all pictures or one for each.
    """
    times = scheduler.timesteps
    latents = begin(scheduler, noise, start)
    extra: dict[str, Any] = {"generator": rng} if isinstance(scheduler, TAKES_NOISE) else {}
    for i, t in enumerate(times):
        if start is not None and i < start.step:
            continue
        prediction = denoise(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
        if known is not None:
            there = known.latents
            if i + 1 < len(times):
                there = scheduler.add_noise(there, noise, times[i + 1 : i + 2])
            latents = torch.where(known.mask > 1 - (i + 1) / len(times), latents, there)
        yield latents


def begin(scheduler: Any, noise: Tensor, start: Start | None) -> Tensor:
    """The latents before the first step: pure noise, or those of `start` with its share of it."""
    if start is None:
        return noise * scheduler.init_noise_sigma
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start.step)
    return scheduler.add_noise(
        start.latents, noise, scheduler.timesteps[start.step : start.step + 1]
    )


class Denoise:
    """A denoiser with everything but latents and time filled in, guided by a prompt if asked."""

    def __init__(
        self,
        denoiser: ControlDenoiser,
        network: nn.Module | None,
        condition: Condition,
        guidance: Guidance | None = None,
        control: Control = Control(),
    ) -> None:
        if network is not None and control.scale:
            network, condition = embed_hint(network, condition)
        whole = condition.doubled(guidance.without) if guidance else condition
        self.guidance, self.control = guidance, control
        self.whole, self.prompted = whole, whole.last(len(condition.text))
        self.alone = self.twice = denoiser.for_run(network)
        if guidance:
            self.twice = denoiser.for_run(network, True, not control.prompted_only)

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        """The prediction for `latents` at the single timestep `t`."""
        scale = self.control.scale if _among(t, self.control.times) else 0.0
        if self.guidance is None or not _among(t, self.guidance.times):
            return self.alone(latents, t, self.prompted, scale)
        spared = len(latents) if self.control.prompted_only else 0
        prediction = self.twice(torch.cat([latents] * 2), t, self.whole, scale, spared)
        without, with_ = prediction.chunk(2)
        return without + self.guidance.scale * (with_ - without)


def _among(t: Tensor, times: Times) -> bool:
    return times is None or float(t) in times


# Measured on the embedded base: docs/filling.md.
FIRST_SIGMA = 20.0
TAKES_NOISE = (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)
KARRAS = {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, KARRAS),
    "dpm++2m": (DPMSolverMultistepScheduler, KARRAS),
    "euler": (EulerDiscreteScheduler, {}),
}

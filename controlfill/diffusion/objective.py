"""The objective: what one batch costs. Written once, for every engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlfill.data.hints import Spec
from controlfill.data.sample import Batch
from controlfill.diffusion.condition import encode_condition
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.models.bundle import Bundle


def step_rng(seed: int, rank: int, micro_batch: int) -> torch.Generator:
    """The randomness of one forward pass, a function of its place in the run and nothing else."""
    state = np.random.SeedSequence((seed, rank, micro_batch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class Objective:
    """The loss of control training on a frozen base.

    The network that learns is an argument: kept as an attribute it would bypass the wrapper that
    averages gradients between processes.
    """

    def __init__(self, bundle: Bundle, spec: Spec, empty_prompts: float = 0.0) -> None:
        self.bundle, self.spec, self.empty_prompts = bundle, spec, empty_prompts
        self.schedule = NoiseSchedule(bundle.scheduler_config)
        self.denoiser = ControlDenoiser(bundle.unet)

    def __call__(self, network: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
        """The mean squared error of each sample, (B,), differentiable in `network`.

        Latents are noised to random times and the prediction is compared with the base's own kind
        of target (Ho et al. 2020 for epsilon, Salimans and Ho 2022 for v).
        """
        latents = self.bundle.encode_image(batch.image * 2 - 1, rng).float()
        timesteps = self.schedule.draw_timesteps(len(latents), rng).to(latents.device)
        noise = torch.randn(latents.shape, generator=rng).to(latents)
        condition = encode_condition(self.bundle, self.spec, self._drop_prompts(batch, rng))
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.denoiser(network, noisy, timesteps, condition)
        target = self.schedule.target(latents, noise, timesteps)
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return errors.mean(dim=(1, 2, 3))

    def _drop_prompts(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Replace a share of the prompts by the empty one, as guidance needs it."""
        if not self.empty_prompts:
            return batch
        dropped = (torch.rand(len(batch.prompts), generator=rng) < self.empty_prompts).tolist()
        prompts = ["" if d else p for d, p in zip(dropped, batch.prompts, strict=True)]
        return replace(batch, prompts=prompts)

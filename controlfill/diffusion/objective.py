"""The objective: what one batch costs. Written once, for every engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from controlfill.data.hints import Spec
from controlfill.data.sample import Batch
from controlfill.diffusion.condition import encode_condition, latent_mask
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.losses import Weighting, cell_weights, snr_weights, split_means
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.diffusion.text_loss import TextLoss, gather
from controlfill.models.bundle import Bundle
from controlfill.models.text import Words

GOLDEN = (5**0.5 - 1) / 2


def step_rng(seed: int, rank: int, micro_batch: int) -> torch.Generator:
    """The randomness of one forward pass, a function of its place in the run and nothing else."""
    state = np.random.SeedSequence((seed, rank, micro_batch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Unweighted errors of a batch, each (B,): all of it, its hole, its known part; their times.

    `texts` are what its labels cost and how they are read, by name (N,), at the times `text_times`.
    """

    loss: Tensor
    hole: Tensor
    known: Tensor
    timesteps: Tensor
    texts: dict[str, Tensor] = field(default_factory=dict)
    text_times: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a batch costs, (B,), differentiable; and the means of its `parts`, by name."""

    losses: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Latents, the same noised to `timesteps`, what was predicted of them, and what was wanted."""

    latents: Tensor
    noisy: Tensor
    prediction: Tensor
    target: Tensor
    timesteps: Tensor

    def errors(self) -> Tensor:
        """Squared errors (B, C, h, w)."""
        return (self.prediction.float() - self.target.float()).square()

    def after(self, count: int) -> Seen:
        """What there is beyond the first `count` samples."""
        return Seen(
            latents=self.latents[count:],
            noisy=self.noisy[count:],
            prediction=self.prediction[count:],
            target=self.target[count:],
            timesteps=self.timesteps[count:],
        )


class Objective:
    """The loss of control training on a frozen base.

    The network that learns is an argument: kept as an attribute it would bypass the wrapper that
    averages gradients between processes.
    """

    def __init__(
        self,
        bundle: Bundle,
        spec: Spec,
        empty_prompts: float = 0.0,
        noise_offset: float = 0.0,
        weighting: Weighting = Weighting(),  # noqa: B008  (frozen)
        reading: TextLoss | None = None,
    ) -> None:
        self.bundle, self.spec = bundle, spec
        self.empty_prompts, self.noise_offset = empty_prompts, noise_offset
        self.weighting, self.reading = weighting, reading
        self.schedule = NoiseSchedule(bundle.scheduler_config)
        self.denoiser = ControlDenoiser(bundle.unet)

    def __call__(self, network: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
        """The weighted mean squared error of each sample, (B,), differentiable in `network`."""
        return self.cost(network, batch, rng).losses

    def cost(self, network: nn.Module, batch: Batch, rng: torch.Generator) -> Cost:
        """The same, with the text loss if there is one, and the parts it is made of.

        Samples whose labels are read come a second time in the same forward pass, at times of their
        own: at most times nothing could be read in what is predicted.
        """
        count = len(batch.prompts)
        timesteps = self.schedule.draw_timesteps(count, rng)
        batch = self._drop_prompts(batch, rng)
        reading = self.reading
        rows, spots = gather(reading.draw(batch, rng) if reading is not None else [])
        if reading is None or not rows:
            seen = self._see(network, batch, timesteps, rng)
            return Cost(losses=self._losses(seen.errors(), batch, timesteps))
        timesteps = torch.cat([timesteps, reading.draw_times(self.schedule, len(rows), rng)])
        seen = self._see(network, batch.take([*range(count), *rows]), timesteps, rng)
        losses = self._losses(seen.errors()[:count], batch, timesteps[:count])
        text, parts = reading.cost(self.bundle, self.schedule, seen.after(count), spots)
        return Cost(losses=losses + text, parts=parts)

    def _losses(self, errors: Tensor, batch: Batch, timesteps: Tensor) -> Tensor:
        """The means (B,) of `errors` (B, C, h, w), weighted by place and by time."""
        cells = cell_weights(batch, self.bundle.factor, self.weighting)
        losses = (errors if cells is None else errors * cells).mean(dim=(1, 2, 3))
        if self.weighting.snr_gamma is not None:
            weights = snr_weights(self.schedule, timesteps, self.weighting.snr_gamma)
            losses = losses * weights.to(losses)
        return losses if batch.weights is None else losses * batch.weights

    @torch.no_grad()
    def measure(
        self, network: nn.Module, batch: Batch, rng: torch.Generator, first: int
    ) -> Measured:
        """Errors for validation: nothing dropped or weighted.

        The same `rng` gives the same noise, so one step compares with another. Times follow from
        the place of the picture, that of the batch's first being `first`: by steps of the golden
        ratio any number of pictures is spread evenly.
        """
        places = first + torch.arange(len(batch.prompts), dtype=torch.float64)
        timesteps = ((0.5 + places * GOLDEN) % 1 * self.schedule.steps).long()
        seen = self._see(network, batch, timesteps, rng)
        errors, texts, times = seen.errors(), {}, timesteps[:0]
        if self.reading is not None:
            texts, times = self.reading.measure(self.bundle, self.schedule, seen, batch)
        cells = latent_mask(batch.mask, self.bundle.factor).to(errors)
        hole, known = split_means(errors, cells)
        return Measured(
            loss=errors.mean(dim=(1, 2, 3)), hole=hole, known=known, timesteps=timesteps,
            texts=texts, text_times=times,
        )  # fmt: skip

    def _see(
        self, network: nn.Module, batch: Batch, timesteps: Tensor, rng: torch.Generator
    ) -> Seen:
        """What is predicted for latents noised to `timesteps`.

        The target is the base's own kind (Ho et al. 2020 for epsilon, Salimans and Ho 2022 for v).
        """
        latents = self._latents(batch, rng)
        timesteps = timesteps.to(latents.device)
        noise = self._noise(latents, rng)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        return Seen(
            latents=latents,
            noisy=noisy,
            prediction=self.predict(network, noisy, timesteps, batch),
            target=self.schedule.target(latents, noise, timesteps),
            timesteps=timesteps,
        )

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """What the base predicts (B, C, h, w) for `noisy`, steered by `network`."""
        condition = encode_condition(self.bundle, self.spec, batch)
        return self.denoiser(network, noisy, timesteps, condition)

    def _latents(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Latents drawn from the posterior: the cached one, or that of the VAE."""
        if batch.moments is not None:
            return self.bundle.draw_latents(batch.moments.float(), rng)
        return self.bundle.encode_image(batch.image * 2 - 1, rng).float()

    def _noise(self, latents: Tensor, rng: torch.Generator) -> Tensor:
        """Noise like `latents`; with an offset, also shared by all cells of a channel.

        The offset lets pictures become darker or lighter as a whole (Guttenberg 2023, "Diffusion
        with Offset Noise").
        """
        noise = torch.randn(latents.shape, generator=rng)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn((*latents.shape[:2], 1, 1), generator=rng)
        return noise.to(latents)

    def _drop_prompts(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Replace a share of the prompts by the empty one, as guidance needs it."""
        if not self.empty_prompts:
            return batch
        dropped = (torch.rand(len(batch.prompts), generator=rng) < self.empty_prompts).tolist()
        prompts = ["" if d else p for d, p in zip(dropped, batch.prompts, strict=True)]
        return replace(batch, prompts=prompts)


class TuneObjective(Objective):
    """The same loss for a base that learns itself: the network handed in is all that predicts.

    Where its text encoders learn too, it reads the prompts by them.
    """

    def __init__(self, bundle: Bundle, spec: Spec, *, learns_text: bool, **more: Any) -> None:
        super().__init__(bundle, spec, **more)
        self.learns_text = learns_text

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """What `network` predicts (B, C, h, w) for `noisy`."""
        unread = Words(noisy.new_zeros(len(noisy), 0)) if self.learns_text else None
        condition = encode_condition(self.bundle, self.spec, batch, unread)
        masked = condition.masked
        seen = noisy if masked is None else torch.cat([noisy, masked], dim=1)
        told = batch.prompts if self.learns_text else condition.text
        return network(seen, timesteps, told, condition.framing)

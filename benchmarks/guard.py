"""The equality guard: our objective and the formula of the stock script, on one batch.

A faster step that computes something else is no faster step. Both sides get the same pictures, the
same posterior noise, timesteps and noise; the losses and the ControlNet's gradients must agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Result

TOLERANCE = 1e-4


@contextmanager
def recorded(draws: list[Tensor]) -> Iterator[None]:
    """Keeps what torch.randn and torch.randint give meanwhile."""
    names = ("randn", "randint", "randn_like")
    kept = {name: getattr(torch, name) for name in names}

    def keep(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*words: Any, **more: Any) -> Tensor:
            draws.append(draw(*words, **more))
            return draws[-1]

        return drawn

    for name, draw in kept.items():
        setattr(torch, name, keep(draw))
    try:
        yield
    finally:
        for name, draw in kept.items():
            setattr(torch, name, draw)


def stock_loss(bundle: Any, network: nn.Module, batch: Any, draws: list[Tensor]) -> Tensor:
    """The loss as `train_controlnet.py` writes it, with what it draws given.

    `draws` are the posterior's noise, the timesteps and the noise, in any order.
    """
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler.from_config(bundle.scheduler_config)
    (timesteps,) = [d for d in draws if not d.is_floating_point()]
    posterior_noise, noise = [d for d in draws if d.is_floating_point()]
    vae = bundle.vae
    posterior = vae.encode(batch.image * 2 - 1).latent_dist
    latents = (posterior.mean + posterior.std * posterior_noise) * vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, noise, timesteps)
    text = stock_text(bundle, batch.prompts)
    down, middle = network(
        noisy, timesteps, encoder_hidden_states=text, controlnet_cond=batch.hint, return_dict=False
    )
    prediction = bundle.unet(
        noisy, timesteps, encoder_hidden_states=text, down_block_additional_residuals=down,
        mid_block_additional_residual=middle, return_dict=False,
    )[0]  # fmt: skip
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return F.mse_loss(prediction, target)


def stock_text(bundle: Any, prompts: list[str]) -> Tensor:
    """Prompts as the script encodes them; where there are only shapes, the bundle's own."""
    tokenizer = getattr(bundle.text, "tokenizer", None)
    if tokenizer is None:
        return bundle.text.encode(prompts).tokens
    tokens = tokenizer(
        prompts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    return bundle.text.encoder(tokens.input_ids, return_dict=False)[0]


def read_batch(pairs: Path, size: int, count: int) -> Any:
    """The first `count` pairs as a batch of ours."""
    from controlfill.data.hints import open_spec
    from controlfill.data.sample import Sample, collate
    from controlfill.data.sources import make_preparation
    from controlfill.images import open_image
    from controlfill.options import DataOptions

    prepare = make_preparation(DataOptions(image_size=size, crop="center"))
    samples = []
    for line in (pairs / "train.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        image, hint = (open_image(pairs / row[k]).rgb for k in ("image", "conditioning_image"))
        sample = Sample(image=image, hint=hint, prompt=row["text"])
        samples.append(prepare(sample, np.random.default_rng(0)))
    return collate(samples, open_spec("image"))


def gradients(network: nn.Module, loss: Tensor) -> Tensor:
    """All gradients of `network` in one vector."""
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def compare(base: Path, pairs: Path, size: int, count: int) -> Result:
    """Relative differences of loss and gradient, and whether both are within the tolerance."""
    from controlfill.data.hints import open_spec
    from controlfill.diffusion.objective import Objective, step_rng
    from controlfill.models.bundle import load_bundle
    from controlfill.models.controlnet import find_controlnet, load_controlnet

    bundle = load_bundle(str(base))
    torch.manual_seed(0)
    network = load_controlnet(find_controlnet(str(base / "controlnet")), bundle, 3)
    # A fresh ControlNet ends in zeros, behind which all gradients vanish: give it weights.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch, draws = read_batch(pairs, size, count), []
    with recorded(draws):
        ours = Objective(bundle, open_spec("image"))(network, batch, step_rng(0, 0, 0)).mean()
    our_gradient = gradients(network, ours)
    stock = stock_loss(bundle, network, batch, draws)
    stock_gradient = gradients(network, stock)
    return differences(ours, stock, our_gradient, stock_gradient)


def differences(
    ours: Tensor, stock: Tensor, our_gradient: Tensor, stock_gradient: Tensor
) -> Result:
    """Relative differences, and whether both are within the tolerance."""
    mine, theirs = float(ours.detach()), float(stock.detach())
    loss_error = abs(mine - theirs) / abs(theirs)
    gradient_error = float((our_gradient - stock_gradient).norm() / stock_gradient.norm())
    return {
        "loss": mine, "stock_loss": theirs, "loss_error": loss_error,
        "gradient_error": gradient_error, "tolerance": TOLERANCE,
        "equal": max(loss_error, gradient_error) <= TOLERANCE,
    }  # fmt: skip

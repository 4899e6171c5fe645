"""The objective is the formula of diffusers' train_controlnet.py, on a frozen base."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from controlfill.data.hints import HINTS, open_spec
from controlfill.data.sample import Sample, collate
from controlfill.diffusion.objective import Objective, step_rng
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import make_controlnet


def make_batch(spec, side=64):
    rng = np.random.default_rng(0)
    mask = np.zeros((side, side), np.uint8)
    mask[10:40, 8:30] = 255
    samples = [
        Sample(image=rng.integers(0, 256, (side, side, 3)).astype(np.uint8), mask=mask, prompt=p)
        for p in ("a red cat", "a mat")
    ]
    return collate(samples, spec)


def awake(network):
    """Give zero convolutions something to say, so that every gradient counts."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return network


def plain_formula(bundle, network, batch, rng):
    """The training step of diffusers' train_controlnet.py, with our noise and timesteps."""
    vae, unet, text = bundle.vae, bundle.unet, bundle.text
    timesteps = torch.randint(0, 1000, (len(batch.prompts),), generator=rng)
    posterior = vae.encode(batch.image * 2 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=rng)
    latents = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=rng)
    scheduler = DDPMScheduler.from_config(bundle.scheduler_config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    tokens = text.tokenizer(batch.prompts, padding="max_length", max_length=32, return_tensors="pt")
    words = text.encoder(tokens.input_ids)[0]
    down, middle = network(
        noisy, timesteps, encoder_hidden_states=words, controlnet_cond=batch.hint, return_dict=False
    )
    prediction = unet(
        noisy, timesteps, encoder_hidden_states=words,
        down_block_additional_residuals=down, mid_block_additional_residual=middle,
    ).sample  # fmt: skip
    if scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(prediction.float(), target.float())


@pytest.mark.parametrize("base", ["embedded", "narrow"])
def test_loss_and_gradient_equal_the_plain_formula(base, pipe, narrow_base):
    bundle = pipe.bundle if base == "embedded" else load_bundle(str(narrow_base))
    assert bundle.prediction_type == {"embedded": "v_prediction", "narrow": "epsilon"}[base]
    spec = open_spec("masked-image")
    network = awake(make_controlnet(bundle, spec.channels))
    batch = make_batch(spec)
    ours = Objective(bundle, spec)(network, batch, step_rng(3, 0, 5)).mean()
    ours.backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    theirs = plain_formula(bundle, network, batch, step_rng(3, 0, 5))
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(n for n, spec in HINTS.items() if not spec.given))
def test_no_frozen_parameter_ever_gets_a_gradient(name, pipe):
    spec = HINTS[name]
    bundle = pipe.bundle
    network = make_controlnet(bundle, spec.channels, at_latent_size=spec.at_latent_size)
    Objective(bundle, spec)(network, make_batch(spec), step_rng(0, 0, 0)).mean().backward()
    for frozen in (bundle.vae, bundle.unet, bundle.text.encoder):
        assert all(not p.requires_grad and p.grad is None for p in frozen.parameters())
    learning = dict(network.named_parameters())
    assert all(p.requires_grad for p in learning.values())
    # At the start only the zero convolutions feel anything: all else is multiplied by their zeros.
    assert learning["controlnet_mid_block.weight"].grad.abs().sum() > 0


def test_the_randomness_of_a_step_is_a_function_of_its_place():
    draws = {
        place: torch.randn(2, generator=step_rng(*place)).tolist()
        for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }
    assert len({tuple(d) for d in draws.values()}) == 4
    assert torch.randn(2, generator=step_rng(0, 1, 0)).tolist() == draws[0, 1, 0]


def test_prompts_are_dropped_as_often_as_asked(pipe, monkeypatch):
    spec = open_spec("masked-image")
    batch = make_batch(spec)
    seen = []
    encode = pipe.bundle.text.encode
    monkeypatch.setattr(pipe.bundle.text, "encode", lambda p: seen.extend(p) or encode(p))
    objective = Objective(pipe.bundle, spec, empty_prompts=0.3)
    for number in range(100):
        objective._drop_prompts(batch, step_rng(0, 0, number))
        seen += objective._drop_prompts(batch, step_rng(0, 0, number)).prompts
    assert 0.2 < seen.count("") / len(seen) < 0.4
    seen.clear()
    network = make_controlnet(pipe.bundle, 3)
    Objective(pipe.bundle, spec, empty_prompts=1.0)(network, batch, step_rng(0, 0, 0))
    assert seen == ["", ""]

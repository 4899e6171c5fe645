"""Our noise schedule equals that of diffusers, for every kind of prediction."""

import pytest
import torch
from diffusers import DDPMScheduler

from controlfill.diffusion.noise import NoiseSchedule

KINDS = ["epsilon", "v_prediction", "sample"]


@pytest.fixture
def parts():
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 5, 4, 8, 8), generator=rng)
    return latents, noise, torch.tensor([0, 1, 400, 998, 999])


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_velocity_equal_diffusers(parts, zero_snr):
    latents, noise, t = parts
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    ours = NoiseSchedule(dict(scheduler.config))
    theirs = scheduler.add_noise(latents, noise, t)
    torch.testing.assert_close(ours.add_noise(latents, noise, t), theirs, rtol=0, atol=1e-6)
    velocity = scheduler.get_velocity(latents, noise, t)
    torch.testing.assert_close(ours.target(latents, noise, t), velocity, rtol=0, atol=1e-6)
    if zero_snr:
        torch.testing.assert_close(ours.add_noise(latents, noise, t)[-1], noise[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_gives_the_clean_latents(parts, kind):
    latents, noise, t = parts
    schedule = NoiseSchedule(dict(DDPMScheduler(prediction_type=kind).config))
    noisy = schedule.add_noise(latents, noise, t)
    clean = schedule.to_x0(schedule.target(latents, noise, t), noisy, t)
    torch.testing.assert_close(clean, latents, rtol=1e-3, atol=1e-3)


def test_timesteps_are_uniform_and_seeded():
    schedule = NoiseSchedule(dict(DDPMScheduler().config))
    drawn = schedule.draw_timesteps(4000, torch.Generator().manual_seed(1))
    again = schedule.draw_timesteps(4000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert abs(drawn.float().mean() - 499.5) < 15

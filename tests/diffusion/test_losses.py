"""Weights of errors: Min-SNR for every kind of prediction, the hole against the known part."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from controlfill.data.geometry import Label
from controlfill.data.hints import open_spec
from controlfill.data.sample import Batch
from controlfill.diffusion.losses import Weighting, cell_weights, snr_weights, split_means
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.diffusion.objective import Objective, step_rng
from controlfill.models.controlnet import make_controlnet
from controlfill.skins.layout import Box


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_is_the_formula_of_the_paper(kind, zero_snr):
    scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule(dict(scheduler.config))
    times = torch.tensor([0, 10, 300, 700, 999])
    found = snr_weights(schedule, times, 5.0)
    for weight, time in zip(found.tolist(), times.tolist(), strict=True):
        abar = float(scheduler.alphas_cumprod[time])
        snr = abar / (1 - abar)
        # The loss on x_0 is snr times that on epsilon, and snr + 1 times that on v.
        wanted = {
            "epsilon": min(1.0, 5.0 / snr) if snr else 1.0,
            "v_prediction": min(snr, 5.0) / (snr + 1),
            "sample": min(snr, 5.0),
        }[kind]
        assert weight == pytest.approx(wanted, rel=1e-4, abs=1e-9)
        assert math.isfinite(weight)


def test_the_three_kinds_weigh_the_same_error_alike():
    """One wrong guess of x_0, told as epsilon, v or x_0, costs the same under Min-SNR."""
    times = torch.tensor([200, 600])
    x0, noise, guess = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    costs = []
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule(dict(DDPMScheduler(prediction_type=kind).config))
        noisy = schedule.add_noise(x0, noise, times)
        signal, share = schedule._scales(times, x0)
        implied = (noisy - signal * guess) / share
        wrong = schedule.target(guess, implied, times) - schedule.target(x0, noise, times)
        errors = wrong.square().mean(dim=(1, 2, 3))
        costs.append(errors * snr_weights(schedule, times, 5.0))
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-3, atol=1e-6)


def batch_of(mask, labels=((), ())):
    image = torch.zeros(2, 3, 32, 32)
    return Batch(image=image, mask=mask, hint=image, prompts=["", ""], labels=list(labels))


def test_hole_weights_have_mean_one_and_their_ratio():
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, 8:16, 8:16] = 1
    weights = cell_weights(batch_of(mask), 4, Weighting(hole=5.0))
    assert weights.shape == (2, 1, 8, 8)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    assert weights[0].max() / weights[0].min() == pytest.approx(5.0)
    assert (weights[1] == 1).all()


def test_labels_weigh_what_is_asked_and_unknown_ones_nothing():
    mask = torch.ones(2, 1, 32, 32)
    known, unknown = (Label(text=text, box=Box(9, 8, 16, 16)) for text in ("A", None))
    weights = cell_weights(batch_of(mask, [(known,), (unknown,)]), 4, Weighting(text=3.0))
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    inside, outside = weights[:, :, 2:4, 2:4], weights[:, :, :2]
    assert (inside[0] / outside[0].max()).tolist() == [[[3, 3], [3, 3]]]
    assert (inside[1] == 0).all()
    assert (outside[1] > 1).all()
    assert cell_weights(batch_of(mask, [(known,), ()]), 4, Weighting()) is None


def test_errors_split_into_hole_and_known():
    errors = torch.ones(2, 3, 4, 4)
    errors[:, :, :2] = 3
    cells = torch.zeros(2, 1, 4, 4)
    cells[0, :, :2] = 1
    hole, known = split_means(errors, cells)
    assert (hole[0], known[0]) == (3, 1)
    assert torch.isnan(hole[1])
    assert known[1] == 2


@pytest.fixture
def step(pipe):
    """The losses (B,) of one fixed step under other options."""
    from test_objective import make_batch

    spec = open_spec("masked-image")
    network = make_controlnet(pipe.bundle, spec.channels)
    batch = make_batch(spec)

    def losses(**options):
        objective = Objective(pipe.bundle, spec, **options)
        return objective(network, batch, step_rng(0, 0, 0)).detach()

    return losses


def test_min_snr_in_the_objective_is_the_plain_loss_times_its_weight(step, pipe):
    plain, weighted = step(), step(weighting=Weighting(snr_gamma=5.0))
    schedule = NoiseSchedule(pipe.bundle.scheduler_config)
    times = schedule.draw_timesteps(2, step_rng(0, 0, 0))
    torch.testing.assert_close(weighted, plain * snr_weights(schedule, times, 5.0))


def test_hole_weight_and_noise_offset_change_the_loss(step):
    plain = step()
    assert torch.equal(plain, step(weighting=Weighting(hole=1.0)))
    assert not torch.equal(plain, step(weighting=Weighting(hole=4.0)))
    assert not torch.equal(plain, step(noise_offset=0.1))


def test_noise_offset_is_shared_by_a_channel(pipe):
    objective = Objective(pipe.bundle, open_spec("masked-image"), noise_offset=3.0)
    noise = objective._noise(torch.zeros(64, 4, 16, 16), step_rng(0, 0, 0))
    means = noise.mean(dim=(2, 3))
    assert means.std() == pytest.approx(3.0, rel=0.15)
    assert (noise - means[:, :, None, None]).std() == pytest.approx(1.0, rel=0.05)


def test_measuring_is_the_same_every_time_and_splits_the_error(pipe):
    from test_objective import make_batch

    spec = open_spec("masked-image")
    network = make_controlnet(pipe.bundle, spec.channels)
    objective = Objective(pipe.bundle, spec, empty_prompts=1.0, weighting=Weighting(hole=9.0))
    batch = make_batch(spec)
    first, again = (objective.measure(network, batch, step_rng(1, 0, 0), 0) for _ in range(2))
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, objective.measure(network, batch, step_rng(2, 0, 0), 0).loss)
    assert first.timesteps.tolist() == [500, 118]
    assert objective.measure(network, batch, step_rng(1, 0, 0), 2).timesteps.tolist() == [736, 354]
    assert bool((first.loss > first.hole.minimum(first.known)).all())

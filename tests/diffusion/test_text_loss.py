"""The text loss reads labels in what is predicted, and its gradient reaches the ControlNet."""

from dataclasses import replace

import pytest
import torch

from controlfill.data.geometry import Label
from controlfill.data.hints import open_spec
from controlfill.data.masks import make_recipe
from controlfill.data.sample import Preparation, collate
from controlfill.data.skin_world import SKIN_WORLDS, SkinSource
from controlfill.diffusion.legibility import TextWeighting
from controlfill.diffusion.objective import Objective, Seen, step_rng
from controlfill.diffusion.text_loss import HALO, Spot, TextLoss, gather, place_windows
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import make_controlnet
from controlfill.models.ocr import has_reader, load_reader
from controlfill.skins.layout import Box

SPEC = open_spec("image")
WEIGHTS = TextWeighting(scale=1.0, feature=1.0, ctc=0.1)

pytestmark = pytest.mark.skipif(
    not (has_reader("v6") and has_reader("v4")), reason="the models of PP-OCR are not installed"
)


@pytest.fixture(scope="module")
def bundle():
    return load_bundle("embedded-skins")


@pytest.fixture(scope="module")
def batch():
    source = SkinSource(SKIN_WORLDS["skins"], 0, 10)
    cut = Preparation(side=128, recipe=make_recipe(("full",), (0.1, 0.3)), crop="patch")
    rngs = (torch.Generator().manual_seed(0), __import__("numpy").random.default_rng(5))
    return collate([cut(source[i], rngs[1]) for i in range(4)], SPEC), source.signs


def make(batch, **changes):
    return TextLoss([load_reader("v6"), load_reader("v4")], WEIGHTS, batch[1], **changes)


def test_the_gradient_reaches_the_controlnet_and_grows_the_loss(bundle, batch):
    torch.manual_seed(0)
    network = make_controlnet(bundle, SPEC.channels)
    plain, reading = (Objective(bundle, SPEC, reading=r) for r in (None, make(batch)))
    gradients = []
    for objective in (plain, reading):
        network.zero_grad()
        cost = objective.cost(network, batch[0], step_rng(1, 0, 0))
        assert cost.losses.shape == (4,)
        cost.losses.mean().backward()
        blocks = network.controlnet_down_blocks
        gradients.append(torch.cat([b.weight.grad.flatten() for b in blocks]))
        assert (set(cost.parts) == {"ctc", "floor", "excess", "feature"}) == (objective is reading)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert not torch.allclose(gradients[0], gradients[1])


def test_the_true_picture_costs_nothing_and_noise_does(bundle, batch):
    latents = bundle.encode_image(batch[0].image * 2 - 1)
    times = torch.zeros(4, dtype=torch.long)
    objective = Objective(bundle, SPEC)
    loss = make(batch)
    spots = loss.spread(batch[0])

    def cost(x0):
        noisy = objective.schedule.add_noise(latents, torch.zeros_like(latents), times)
        target = objective.schedule.target(x0, (noisy - x0), times)
        abar = objective.schedule.alphas_cumprod[0]
        # The v that says `x0` of `noisy`.
        v = (abar.sqrt() * noisy - x0) / (1 - abar).sqrt()
        seen = Seen(latents=latents, noisy=noisy, prediction=v, target=target, timesteps=times)
        return loss.cost(bundle, objective.schedule, seen, spots)

    true, parts = cost(latents)
    assert true < 1e-3
    assert parts["excess"] < 1e-3
    noise = 0.5 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert cost(latents + noise)[0] > 10 * true


def test_labels_are_chosen_by_the_rng_from_a_quarter_of_the_pictures(batch):
    loss = make(batch, most=3)
    draws = [loss.draw(batch[0], step_rng(0, 0, n)) for n in range(20)]
    assert draws[0] == loss.draw(batch[0], step_rng(0, 0, 0))
    assert all(len({spot.row for spot in draw}) == 1 for draw in draws)
    assert all(1 <= len(draw) <= 3 for draw in draws)
    assert len({spot.row for draw in draws for spot in draw}) > 1


def test_unknown_and_foreign_labels_are_not_read(batch):
    box = Box(8, 8, 40, 32)
    labels = [Label(text=None, box=box), Label(text="Q\ue000", box=box), Label(text="OK", box=box)]
    other = replace(batch[0], labels=[tuple(labels), (), (), ()])
    loss = TextLoss([load_reader("v6")], WEIGHTS, batch[1] + "\ue000")
    assert "\ue000" not in loss.signs
    assert [spot.text for spot in loss.legible(other)] == ["OK"]
    assert loss.draw(replace(other, labels=[(), (), (), ()]), step_rng(0, 0, 0)) == []


def test_times_stay_below_the_most(bundle, batch):
    loss = TextLoss([load_reader("v6")], replace(WEIGHTS, most_t=0.1), batch[1])
    times = loss.draw_times(Objective(bundle, SPEC).schedule, 500, step_rng(0, 0, 0))
    assert 80 < times.max() < 100


def test_windows_hold_their_labels_and_stay_on_the_canvas():
    boxes = [Box(0, 0, 9, 12), Box(60, 100, 128, 128), Box(50, 50, 60, 61)]
    spots = [Spot(row=2, text="A", box=box) for box in boxes]
    windows = place_windows(spots, (32, 32), 4)
    assert len({window.size for window in windows}) == 1
    for spot, window in zip(spots, windows, strict=True):
        assert window.inside(Box(0, 0, 32, 32))
        assert spot.box.left >= 4 * window.left
        assert spot.box.right <= 4 * window.right
    assert windows[2].size == (7 + 2 * HALO, 17 + 2 * HALO)
    assert gather(spots)[0] == [2]
    assert gather(spots)[1][0].row == 0


def test_what_is_measured_is_read_by_all_readers(bundle, batch):
    network = make_controlnet(bundle, SPEC.channels)
    measured = Objective(bundle, SPEC, reading=make(batch)).measure(
        network, batch[0], step_rng(0, 0, 0), 0
    )
    assert set(measured.texts) == {"ctc", "floor", "excess", "feature", "read_v6", "read_v4"}
    assert all(len(v) == len(measured.text_times) > 3 for v in measured.texts.values())
    assert set(measured.texts["read_v4"].tolist()) <= {0.0, 1.0}

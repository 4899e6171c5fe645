"""The text loss: true gradients at batch size 1, nothing for true crops, and a way down."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from controlfill.diffusion.legibility import (
    TextErrors,
    TextWeighting,
    combine,
    text_errors,
    time_weights,
)
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.errors import UserError
from controlfill.images import to_tensor
from controlfill.models.ocr import READERS, decode, fit_crops, load_reader
from controlfill.skins.draw import open_font

SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
BOTH = TextWeighting(scale=1.0, feature=0.1, ctc=1.0)
WORDS = ["HELLO", "Q", "SPACE"]


@pytest.fixture(params=list(READERS))
def reader(request):
    return open_reader(request.param)


def open_reader(name):
    """A reader; where it isn't installed the test is skipped, saying what would be."""
    try:
        return load_reader(name)
    except UserError as error:
        pytest.skip(str(error))


def crop_of(text):
    """A tight crop of dark text on light ground (3, h, w)."""
    font = open_font(None, False, 32)
    left, top, right, bottom = (int(side) for side in font.getbbox(text, anchor="lt"))
    image = Image.new("RGB", (right - left + 8, bottom - top + 8), (230, 232, 240))
    pen = ImageDraw.Draw(image)
    pen.text((4 - left, 4 - top), text, fill=(30, 30, 40), font=font, anchor="lt")
    return to_tensor(np.array(image))


def blurred(crop, side=13):
    """A crop (3, h, w) seen through a box blur of that many pixels, thrice."""
    for _ in range(3):
        padded = F.pad(crop[None], (side // 2,) * 4, mode="replicate")
        crop = F.avg_pool2d(padded, side, 1)[0]
    return crop


@pytest.mark.parametrize("labels", [WORDS[:1], WORDS])
def test_gradients_are_those_of_finite_differences(reader, labels):
    exact = copy.deepcopy(reader).double()
    true = [crop_of(label).double() for label in labels]
    seen = [blurred(crop).requires_grad_() for crop in true]

    def total(crops):
        return combine(text_errors(exact, crops, true, labels, SIGNS), BOTH).sum()

    gradients = torch.autograd.grad(total(seen), seen)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > 1e-3
    ways = [gradient / norm * 1e-6 for gradient in gradients]
    with torch.no_grad():
        ahead = total([crop + way for crop, way in zip(seen, ways, strict=True)])
        back = total([crop - way for crop, way in zip(seen, ways, strict=True)])
    assert float((ahead - back) / 2e-6) == pytest.approx(float(norm), rel=1e-3)


def test_the_true_crop_costs_nothing_and_a_blurred_one_something(reader):
    true = [crop_of(word) for word in WORDS]
    with torch.no_grad():
        none = text_errors(reader, true, true, WORDS, SIGNS)
        some = text_errors(reader, [blurred(crop) for crop in true], true, WORDS, SIGNS)
    assert torch.equal(combine(none, BOTH), torch.zeros(3))
    assert torch.equal(none.ctc, none.floor)
    assert (none.floor > 0).all()
    assert (some.feature > 0).all()
    assert (some.excess > 0).all()
    assert torch.equal(some.floor, none.floor)


def test_descent_makes_a_lone_blurred_word_readable(reader):
    """With the wrong gradient of batch size 1 the error rises instead."""
    true = crop_of("HELLO")
    seen = blurred(true).requires_grad_()
    optimizer = torch.optim.Adam([seen], lr=0.03)
    costs = []
    for _ in range(12):
        errors = text_errors(reader, [seen], [true], ["HELLO"], SIGNS)
        costs.append(float(errors.ctc.detach()))
        optimizer.zero_grad()
        errors.ctc.sum().backward()
        optimizer.step()
        seen.data.clamp_(0, 1)
    with torch.no_grad():
        texts = [
            decode(reader, reader(fit_crops([crop])).logits, SIGNS)
            for crop in (blurred(true), seen)
        ]
    assert texts[0] != ["HELLO"]
    assert texts[1] == ["HELLO"]
    assert costs[-1] < 0.25 * costs[0]


def test_the_width_of_a_neighbour_hardly_matters():
    """Errors are means over a crop's own frames, not over those that pad it."""
    reader = open_reader("v6")
    labels = ["Q", "KEYBOARD26" * 3]
    true = [crop_of(label) for label in labels]
    seen = [blurred(crop) for crop in true]
    assert fit_crops(true).shape[3] > 4 * fit_crops(true[:1]).shape[3]
    with torch.no_grad():
        lone = text_errors(reader, seen[:1], true[:1], labels[:1], SIGNS)
        both = text_errors(reader, seen, true, labels, SIGNS)
    for a, b in ((lone.ctc, both.ctc), (lone.feature, both.feature)):
        assert float(b[0]) == pytest.approx(float(a[0]), rel=0.5)


def test_only_the_signs_compete():
    """CTC over few signs is CTC over all with the others made impossible."""
    reader = open_reader("v6")
    crop = blurred(crop_of("HELLO"))
    with torch.no_grad():
        errors = text_errors(reader, [crop], [crop], ["HELLO"], SIGNS)
        wide = text_errors(reader, [crop], [crop], ["HELLO"], SIGNS + "abcdefghijklmnopqrstuvwxyz")
        logits = reader(fit_crops([crop])).logits
    ids = [reader.index[sign] for sign in SIGNS]
    masked = torch.full_like(logits, -torch.inf)
    masked[..., [0, *ids]] = logits[..., [0, *ids]]
    target = torch.tensor([[reader.index[sign] for sign in "HELLO"]])
    frames = logits.shape[1]
    nats = F.ctc_loss(
        masked.log_softmax(2).transpose(0, 1), target, torch.tensor([frames]), torch.tensor([5])
    )
    assert float(errors.ctc) == pytest.approx(float(nats) * 5 / frames, rel=1e-4)
    assert float(wide.ctc) > float(errors.ctc)


def test_no_gradient_reaches_the_true_crop_or_the_reader():
    reader = open_reader("v4")
    true = crop_of("OK").requires_grad_()
    seen = blurred(true.detach()).requires_grad_()
    errors = text_errors(reader, [seen], [true], ["OK"], SIGNS)
    combine(errors, BOTH).sum().backward()
    assert true.grad is None
    assert seen.grad is not None
    assert not errors.floor.requires_grad


def test_labels_longer_than_their_crop_cost_nothing():
    reader = open_reader("v4")
    crop = crop_of("OK").requires_grad_()
    errors = text_errors(reader, [crop], [crop], ["A" * 30], SIGNS)
    assert errors.ctc.tolist() == errors.excess.tolist() == [0]
    combine(errors, BOTH).sum().backward()
    assert crop.grad is not None
    assert torch.isfinite(crop.grad).all()


def test_what_does_not_fit_is_refused():
    reader, crop = open_reader("v4"), torch.rand(3, 20, 20)
    with pytest.raises(UserError, match="a label is empty"):
        text_errors(reader, [crop], [crop], [""], SIGNS)
    with pytest.raises(UserError, match="'a' has signs that are not among"):
        text_errors(reader, [crop], [crop], ["a"], SIGNS)
    with pytest.raises(UserError, match="does not know"):
        text_errors(reader, [crop], [crop], ["\ue000"], SIGNS + "\ue000")
    with pytest.raises(ValueError, match="1 crops, 1 true ones and 2 labels"):
        text_errors(reader, [crop], [crop], ["A", "B"], SIGNS)
    with pytest.raises(ValueError, match="0 crops"):
        text_errors(reader, [], [], [], SIGNS)
    with pytest.raises(ValueError, match=r"its true one \(3, 20, 22\)"):
        text_errors(reader, [crop], [torch.rand(3, 20, 22)], ["A"], SIGNS)


def test_parts_are_weighed():
    errors = TextErrors(
        feature=torch.tensor([1.0, 2.0]), ctc=torch.tensor([3.0, 1.0]), floor=torch.tensor([1.0, 2])
    )
    assert errors.excess.tolist() == [2, 0]
    assert combine(errors, TextWeighting(scale=2, feature=0.5, ctc=10)).tolist() == [41, 2]
    assert combine(errors, TextWeighting(scale=0, feature=0.5, ctc=10)).tolist() == [0, 0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noisier_times_count_less(prediction):
    schedule = NoiseSchedule({"prediction_type": prediction, "num_train_timesteps": 1000})
    times = torch.tensor([0, 200, 500, 999])
    abar = schedule.alphas_cumprod[times]
    snr = abar / (1 - abar)
    assert torch.equal(time_weights(schedule, times, "abar"), abar)
    assert time_weights(schedule, times, "none").tolist() == [1, 1, 1, 1]
    found = time_weights(schedule, times, "minsnr")
    assert torch.allclose(found, torch.minimum(snr, torch.tensor(5.0)) / 5)
    assert found[0] == 1
    assert 0 < found[3] < 1e-4

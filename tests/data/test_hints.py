"""Hints are exactly what their spec says, and the same formula for training and inference."""

import pytest
import torch

from controlfill.data import hints
from controlfill.errors import UserError


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(0)
    image = torch.rand((2, 3, 16, 24), generator=rng)
    mask = (torch.rand((2, 1, 16, 24), generator=rng) > 0.7).float()
    return image, mask


def test_masked_image_is_the_formula_of_control_v11p_sd15_inpaint(pair):
    image, mask = pair
    theirs = image * 255
    theirs = torch.where(mask.expand_as(image) > 0.5, torch.full_like(image, -255.0), theirs) / 255
    ours = hints.masked_image(image, mask)
    torch.testing.assert_close(ours, theirs)
    assert (ours[mask.expand_as(image) > 0.5] == -1).all()
    assert ours.max() <= 1


def test_black_known_pixels_differ_from_the_hole(pair):
    _, mask = pair
    hint = hints.masked_image(torch.zeros(2, 3, 16, 24), mask)
    assert set(hint.unique().tolist()) == {-1.0, 0.0}


def test_the_mask_is_the_fourth_channel(pair):
    hint = hints.open_spec("masked-image+mask").make(*pair)
    assert hint.shape[1] == 4
    assert torch.equal(hint[:, 3:], pair[1])


MADE = sorted(name for name, spec in hints.HINTS.items() if not spec.given)


@pytest.mark.parametrize("name", MADE)
def test_right_hints_pass_the_range_check(name, pair):
    spec = hints.open_spec(name)
    hints.check_range(spec.make(*pair), pair[1], spec)


@pytest.mark.parametrize("name", ["masked-image", "masked-image+mask"])
def test_wrong_ranges_are_caught(name, pair):
    spec = hints.open_spec(name)
    hint = spec.make(*pair)
    with pytest.raises(AssertionError, match="must lie in"):
        hints.check_range(hint * 2 + 1, pair[1], spec)  # the hole stays -1, the rest leaves [0, 1]
    with pytest.raises(AssertionError, match="exactly -1"):
        hints.check_range(hint.clamp(min=0), pair[1], spec)


def test_specs_carry_a_version_and_refuse_others():
    assert hints.open_spec("masked-image/1").label == "masked-image/1"
    with pytest.raises(UserError, match="want conditioning masked-image/9"):
        hints.open_spec("masked-image/9")
    with pytest.raises(UserError, match="no conditioning is called 'canny'"):
        hints.open_spec("canny")


def test_a_given_hint_lies_in_0_1_everywhere_and_cant_be_made(pair):
    image, mask = pair
    spec = hints.open_spec("image")
    hints.check_range(image, mask, spec)
    with pytest.raises(AssertionError, match="must lie in"):
        hints.check_range(image * 2 - 1, mask, spec)
    with pytest.raises(UserError, match="needs a conditioning picture for every picture"):
        spec.make(image, mask)


@pytest.mark.parametrize("name", MADE)
def test_hints_can_be_shown(name, pair):
    spec = hints.open_spec(name)
    shown = hints.show_hint(spec.make(*pair), spec)
    assert shown.shape == (2, 16, 24, 3)
    if spec.at_latent_size:
        black = hints.show_hint(spec.make(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)), spec)
        assert not black.any()
    else:
        hole = (pair[1][:, 0] > 0.5).numpy()
        assert (shown[hole] == (255, 0, 255)).all()

"""Masks reach latent size without losing a pixel; latent hints hold what they promise."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controlfill.data.hints import open_spec
from controlfill.data.sample import Batch
from controlfill.diffusion.condition import (
    encode_condition,
    known_latents,
    latent_mask,
    smooth_fill,
)


@given(st.integers(0, 63), st.sampled_from([4, 8]), st.booleans())
def test_a_one_pixel_stroke_survives(place, factor, upright):
    mask = torch.zeros(1, 1, 64, 64)
    if upright:
        mask[..., place] = 1
    else:
        mask[..., place, :] = 1
    cells = latent_mask(mask, factor)
    assert cells.shape[-1] == 64 // factor
    line = cells[0, 0].amin(dim=0 if upright else 1)
    own = place // factor
    assert line[own] == 1
    assert all(line[c] == 1 for c in (own - 1, own + 1) if 0 <= c < 64 // factor)
    assert line.sum() <= 3


def test_a_4_px_stripe_keeps_all_its_cells():
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., 101:105] = 1  # touches two columns of cells; nearest sampling keeps one
    assert latent_mask(mask, 8)[0, 0, 0].nonzero().flatten().tolist() == [11, 12, 13, 14]


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (64, 48), (16, 200)])
def test_the_smooth_fill_keeps_what_is_known_and_forgets_the_rest(size):
    rng = torch.Generator().manual_seed(0)
    image = torch.rand((2, 3, *size), generator=rng)
    mask = (torch.rand((2, 1, *size), generator=rng) > 0.5).float()
    filled = smooth_fill(image, mask)
    known = (mask == 0).expand_as(image)
    torch.testing.assert_close(filled[known], image[known])
    changed = torch.where(known, image, torch.zeros(()))
    assert torch.equal(smooth_fill(changed, mask), filled)
    assert filled.min() >= 0
    assert filled.max() <= 1
    nothing = smooth_fill(image, torch.ones_like(mask))
    torch.testing.assert_close(nothing, torch.full_like(image, 0.5))


def test_the_smooth_fill_of_a_plain_picture_is_plain():
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 10:30, 10:30] = 1
    filled = smooth_fill(torch.full((1, 3, 40, 40), 0.3), mask)
    torch.testing.assert_close(filled, torch.full_like(filled, 0.3))


def test_known_latents_hold_nothing_of_the_hole(pipe):
    made = batch(open_spec("masked-image"))
    other = replace(made, image=torch.where(made.mask > 0, torch.zeros(()), made.image))
    assert torch.equal(known_latents(pipe.bundle, made), known_latents(pipe.bundle, other))


def batch(spec) -> Batch:
    image = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 20:40, 20:40] = 1
    return Batch(image=image, mask=mask, hint=spec.make(image, mask), prompts=["a", "b"])


def test_latent_hints_are_latents_of_the_blanked_picture_and_the_mask(pipe):
    spec = open_spec("masked-latent+mask")
    made = batch(spec)
    hint = encode_condition(pipe.bundle, spec, made).hint
    assert hint.shape == (2, 5, 16, 16)
    assert torch.equal(hint[:, 4:], latent_mask(made.mask, 4))
    torch.testing.assert_close(hint[:, :4], pipe.bundle.encode_image(made.hint))


@pytest.mark.parametrize("name", ["masked-image", "masked-image+mask"])
def test_pixel_hints_pass_unchanged(pipe, name):
    spec = open_spec(name)
    made = batch(spec)
    condition = encode_condition(pipe.bundle, spec, made)
    assert condition.hint is made.hint
    doubled = condition.doubled(condition.text.each(torch.zeros_like))
    assert doubled.hint.shape[0] == len(doubled.text) == 4
    assert not doubled.text[:2].tokens.any()

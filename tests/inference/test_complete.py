"""Holes are filled at any size, known pixels are the bytes they were, settings come along."""

import numpy as np
import pytest
import torch
from PIL import Image

from controlfill.data.sample import Sample, collate
from controlfill.data.worlds import HELD_OUT, WORLDS
from controlfill.errors import UserError
from controlfill.images import Photo, read_settings
from controlfill.inference.complete import Result, inpaint
from controlfill.inference.generate import generate_batch
from controlfill.options import HoleOptions

FAST = HoleOptions(num_inference_steps=2)


@pytest.mark.parametrize("size", [(1, 1), (45, 70), (64, 64), (400, 6), (17, 131)])
def test_any_size_comes_back_in_its_size(pipe, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[: max(1, size[0] // 2)] = 255
    result = inpaint(pipe, image, mask, FAST)
    assert result.image.shape == image.shape
    np.testing.assert_array_equal(result.image[mask == 0], image[mask == 0])


def test_a_long_thin_picture(pipe):
    image = np.full((40, 5000, 3), 90, np.uint8)
    mask = np.zeros((40, 5000), np.uint8)
    mask[10:30, 2000:2100] = 255
    result = inpaint(pipe, image, mask, HoleOptions(num_inference_steps=1))
    np.testing.assert_array_equal(result.image[mask == 0], image[mask == 0])


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "unipc", "dpm++2m", "euler"])
@pytest.mark.parametrize("feather", [0, 5])
def test_known_bytes_for_every_scheduler(pipe, photo, hole, scheduler, feather):
    options = HoleOptions(num_inference_steps=3, scheduler=scheduler, feather=feather)
    result = inpaint(pipe, photo, hole, options)
    far = np.ones_like(hole, bool)
    far[10 - feather : 30 + feather, 20 - feather : 50 + feather] = False
    np.testing.assert_array_equal(result.image[far], photo[far])
    assert not np.array_equal(result.image[hole > 0], photo[hole > 0])
    if feather:
        assert not np.array_equal(result.image[hole == 0], photo[hole == 0])


def test_alpha_is_kept_and_settings_travel(pipe, photo, hole, tmp_path):
    alpha = np.arange(photo[..., 0].size, dtype=np.uint32).reshape(hole.shape).astype(np.uint8)
    options = HoleOptions(num_inference_steps=1, prompt="a red star", seed=9)
    result = inpaint(pipe, Photo(rgb=photo, alpha=alpha), hole, options)
    path = result.save(tmp_path / "out")
    with Image.open(path) as written:
        assert written.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(written)[..., 3], alpha)
    settings = read_settings(path)
    assert settings["prompt"] == "a red star"
    assert settings["seed"] == 9
    assert settings["base"] == settings["control"] == "embedded"
    assert settings["conditioning"] == "masked-image/1"
    assert settings["guidance_scale"] == pipe.bundle.guidance_scale
    with Image.open(tmp_path / "out" / "comparison.png") as comparison:
        assert comparison.size == (3 * (3 * 70 + 4) + 4, 3 * 45 + 8)


def test_comparisons_of_large_pictures_are_small():
    large = np.zeros((100, 2000, 3), np.uint8)
    made = Result(image=large, alpha=None, known=large, mask=large[..., 0], settings={})
    assert made.comparison().shape == (26 + 8, 3 * (512 + 4) + 4, 3)


def test_seed_prompt_guidance_and_control_change_the_hole(pipe, photo, hole):
    base = {"num_inference_steps": 3, "prompt": "red circle on plain white background"}
    changes = [
        {}, {"seed": 1}, {"prompt": "navy star"}, {"negative_prompt": "red"},
        {"guidance_scale": 1.0}, {"controlnet_conditioning_scale": 0.0},
        {"control_guidance_start": 0.5}, {"control_guidance_end": 0.5}, {"guidance_start": 0.5},
        {"guidance_end": 0.5}, {"control_prompted_only": True},
    ]  # fmt: skip
    pictures = [inpaint(pipe, photo, hole, HoleOptions(**{**base, **c})).image for c in changes]
    again = inpaint(pipe, photo, hole, HoleOptions(**base)).image
    np.testing.assert_array_equal(pictures[0], again)
    assert len({p.tobytes() for p in pictures}) == len(changes)


def test_the_fill_is_told_nothing_of_the_hole(pipe, photo, hole):
    other = photo.copy()
    other[hole > 0] = 0
    first, second = (inpaint(pipe, p, hole, FAST).image for p in (photo, other))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", ["pil", "tensor", "path"])
def test_pictures_of_all_kinds_give_the_same(pipe, photo, hole, kind, tmp_path):
    Image.fromarray(photo).save(tmp_path / "i.png")
    Image.fromarray(hole).save(tmp_path / "m.png")
    given = {
        "pil": (Image.fromarray(photo), Image.fromarray(hole)),
        "tensor": (torch.from_numpy(photo).permute(2, 0, 1), torch.from_numpy(hole)),
        "path": (tmp_path / "i.png", str(tmp_path / "m.png")),
    }[kind]
    expected = inpaint(pipe, photo, hole, FAST).image
    np.testing.assert_array_equal(inpaint(pipe, *given, FAST).image, expected)


def test_progress_is_told_and_can_cancel(pipe, photo, hole):
    told = []
    inpaint(pipe, photo, hole, FAST, lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    with pytest.raises(InterruptedError, match="cancelled after 1 of 2 steps"):
        inpaint(pipe, photo, hole, FAST, lambda done, total: False)
    assert not pipe.lock.locked()


def test_mistakes_are_refused(pipe, photo, hole):
    with pytest.raises(UserError, match="the mask is 69x45 but the picture is 70x45"):
        inpaint(pipe, photo, hole[:, :-1], FAST)
    with pytest.raises(UserError, match="all black"):
        inpaint(pipe, photo, hole * 0, FAST)


def test_values_that_are_no_numbers_are_refused(pipe):
    picture = WORLDS["shapes"].draw(HELD_OUT)
    batch = collate([Sample(image=picture.image, mask=picture.object_mask)], pipe.spec)
    weight = pipe.network.conv_in.weight.data
    before = weight.clone()
    weight.fill_(torch.nan)
    try:
        with pytest.raises(UserError, match="are no numbers; try --mixed_precision no"):
            generate_batch(pipe, batch, FAST)
    finally:
        weight.copy_(before)


def test_half_precision_runs(photo, hole):
    from controlfill.inference.pipeline import load

    half = load(device="cpu", mixed_precision="bf16")
    assert half.network.dtype == torch.bfloat16
    result = inpaint(half, photo, hole, FAST)
    np.testing.assert_array_equal(result.image[hole == 0], photo[hole == 0])

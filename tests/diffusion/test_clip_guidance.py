"""CLIP guidance follows its gradient, raises what it should, and is nothing at scale 0."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_clip import make_clip

from controlfill.data.sample import Sample, collate
from controlfill.diffusion.clip_guidance import ClipGuide, ClipGuided, draw_cuts, lean
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.diffusion.sampler import make_scheduler, sample
from controlfill.diffusion.tiles import draw_noise
from controlfill.errors import UserError
from controlfill.inference.generate import generate_batch
from controlfill.inference.pipeline import load
from controlfill.models.clip import load_clip
from controlfill.options import SampleOptions

CPU = torch.device("cpu")
T = torch.tensor(600)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def narrow_pipe(narrow):
    """A narrow base whose UNet fills holes alone."""
    return load(str(narrow("sd15", in_channels=8)), device="cpu")


def make_guide(bundle, folder, prompts, **changes) -> ClipGuide:
    clip = load_clip(folder, CPU)
    usual = {"scale": 100.0, "cuts": 3, "seeds": range(len(prompts))}
    return ClipGuide(clip=clip, bundle=bundle, wanted=clip.read(prompts), **{**usual, **changes})


def predict(latents, t):
    """A smooth network of which every cell sees its neighbours."""
    return torch.tanh(latents + latents.roll(1, -1)) * 0.7


def predicting(bundle, kind):
    return replace(bundle, scheduler_config={**bundle.scheduler_config, "prediction_type": kind})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_lean_is_the_slope_of_the_score(pipe, clip_folder, kind):
    bundle = predicting(pipe.bundle, kind)
    guide = make_guide(bundle, clip_folder, ["a red star"])
    schedule = NoiseSchedule(bundle.scheduler_config)
    noisy = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))

    def score(x):
        with torch.no_grad():
            return float(guide.score(schedule.to_x0(predict(x, T), x, T[None]), T, [(0, 0)]))

    leaned = ClipGuided(predict, guide)(noisy, T)
    signal = float(schedule.alphas_cumprod[600].sqrt())
    slope = (leaned - predict(noisy, T)) / lean(kind, signal)
    along, small = slope / slope.norm(), 0.02
    found = (score(noisy + small * along) - score(noisy - small * along)) / (2 * small)
    assert found == pytest.approx(float(slope.norm()), rel=0.02)
    # Whatever is predicted, the clean picture moves by the same s^2 / a of the slope: upwards.
    moved, still = (schedule.to_x0(p, noisy, T[None]) for p in (leaned, predict(noisy, T)))
    torch.testing.assert_close(
        moved - still, (1 - signal**2) / signal * slope, atol=1e-4, rtol=1e-3
    )


def test_the_slope_goes_through_the_networks(pipe, clip_folder):
    """UNet, ControlNet, both halves of guidance: finite differences know of them all."""
    from controlfill.inference.generate import make_denoise

    bundle, image = pipe.bundle, np.full((64, 64, 3), 128, np.uint8)
    mask = np.full((64, 64), 255, np.uint8)
    batch = collate([Sample(image=image, mask=mask, prompt="a red star")], pipe.spec)
    open_ = torch.ones(1, 1, 16, 16)
    with torch.no_grad():
        denoise = make_denoise(pipe, batch, SampleOptions(), open_, T[None])
    guide = make_guide(bundle, clip_folder, ["a red star"])
    schedule = NoiseSchedule(bundle.scheduler_config)
    noisy = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))

    def score(x):
        return float(guide.score(schedule.to_x0(denoise(x, T), x, T[None]), T, [(0, 0)]))

    with torch.no_grad():
        leaned = ClipGuided(denoise, guide)(noisy, T)
        slope = (leaned - denoise(noisy, T)) / lean(
            bundle.prediction_type, float(schedule.alphas_cumprod[600].sqrt())
        )
        along, small = slope / slope.norm(), 0.005
        found = (score(noisy + small * along) - score(noisy - small * along)) / (2 * small)
    assert found == pytest.approx(float(slope.norm()), rel=0.05)


def test_pure_noise_and_silent_times_are_left_alone(pipe, clip_folder):
    guide = make_guide(pipe.bundle, clip_folder, ["a red star"], times=frozenset({600.0}))
    noisy = torch.randn(1, 4, 16, 16)
    leaned = ClipGuided(predict, guide)
    assert (leaned(noisy, T) != predict(noisy, T)).any()
    assert torch.equal(leaned(noisy, torch.tensor(500)), predict(noisy, T))
    # At the end of a zero-terminal-SNR schedule a prediction of v says nothing of the noise.
    always = ClipGuided(predict, replace(guide, times=None))
    assert torch.equal(always(noisy, torch.tensor(999)), predict(noisy, T))


def test_pictures_and_windows_do_not_know_of_each_other(pipe, clip_folder):
    prompts = ["a red star", "a cat"]
    both = make_guide(pipe.bundle, clip_folder, prompts)
    places = [(0, 0), (0, 8)]
    noisy = torch.randn((4, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    together = ClipGuided(predict, both, places)(noisy, T)
    for number, (place, seed) in enumerate((p, s) for p in places for s in (0, 1)):
        one = make_guide(pipe.bundle, clip_folder, prompts[seed : seed + 1], seeds=[seed])
        alone = ClipGuided(predict, one, [place])(noisy[number : number + 1], T)
        torch.testing.assert_close(alone, together[number : number + 1], atol=1e-4, rtol=1e-4)
        # A window's place in the world counts, not that in its own canvas.
        moved = replace(one, origin=place)
        again = ClipGuided(predict, moved)(noisy[number : number + 1], T)
        torch.testing.assert_close(again, alone)


def test_cuts_lie_in_the_picture_and_none_is_smaller_than_clip_sees():
    rng = np.random.default_rng(0)
    cuts = draw_cuts(rng, (40, 70), 16, 500)
    assert all(top + side <= 40 and left + side <= 70 for top, left, side in cuts)
    assert {side for *_, side in cuts} == set(range(16, 41))
    assert max(left for _, left, _ in cuts) > 40
    assert draw_cuts(rng, (8, 9), 16, 1)[0][2] == 8


@pytest.mark.parametrize("scheduler", ["ddim", "unipc"])
def test_more_of_it_brings_pictures_nearer_to_their_prompt(pipe, clip_folder, scheduler):
    """Where latents are plain normal numbers, v is exactly 0 and guidance all there is."""
    bundle, clip, found = pipe.bundle, load_clip(clip_folder, CPU), []
    seeds, words = range(3), ["a red star"] * 3
    for scale in (0.0, 30.0, 100.0):
        guide = make_guide(bundle, clip_folder, words, scale=scale, cuts=2)
        times = make_scheduler(scheduler, bundle.scheduler_config, 6, CPU)
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            leaned = ClipGuided(lambda x, t: torch.zeros_like(x), guide)
            *_, latents = sample(leaned, times, draw_noise(seeds, (4, 8, 8)), rngs)
            made = bundle.decode(latents)
            found.append((clip.look(clip.fit(made)) * clip.read(words)).sum(dim=1))
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()


def test_results_come_nearer_to_their_prompt(pipe, clip_folder):
    image, mask = np.full((64, 64, 3), 128, np.uint8), np.full((64, 64), 255, np.uint8)
    mask[:8] = 0
    batch = collate([Sample(image=image, mask=mask, prompt="a red star")] * 4, pipe.spec)
    clip, found = load_clip(clip_folder, CPU), []
    for scale in (0.0, 200.0):
        asked = SampleOptions(
            prompt="a red star", num_inference_steps=4, guidance_scale=1.0, scheduler="ddim",
            clip_guidance_scale=scale, clip_guidance_model=clip_folder, clip_guidance_cutouts=2,
        )  # fmt: skip
        made = generate_batch(pipe, batch, asked)
        found.append(float((clip.look(clip.fit(made)) * clip.read(["a red star"])).sum(1).mean()))
    assert found[0] + 0.02 < found[1]


def ask(folder, **changes):
    usual = {
        "num_inference_steps": 2, "prompt": "a cat", "clip_guidance_scale": 300.0,
        "clip_guidance_model": folder, "clip_guidance_cutouts": 2,
    }  # fmt: skip
    return {**usual, **changes}


def hole(height=64, width=64):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[13:50, 11:-11] = 255
    return image, mask


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "unipc", "dpm++2m", "euler"])
def test_every_scheduler_listens_and_known_pixels_stay(narrow_pipe, clip_folder, scheduler):
    image, mask = hole()
    asked = ask(clip_folder, scheduler=scheduler)
    made, again, without = (
        narrow_pipe.inpaint(image, mask, **{**asked, "clip_guidance_scale": scale}).image
        for scale in (300.0, 300.0, 0.0)
    )
    assert (made == again).all()
    assert (made != without).any()
    assert (made[mask == 0] == image[mask == 0]).all()


@pytest.mark.parametrize("order", ["joint", "rows"])
def test_windows_listen_too(narrow_pipe, clip_folder, order):
    image, mask = hole(64, 128)
    asked = ask(clip_folder, window_size=64, window_order=order, num_inference_steps=1)
    made = narrow_pipe.inpaint(image, mask, **asked).image
    without = narrow_pipe.inpaint(image, mask, **{**asked, "clip_guidance_scale": 0.0}).image
    assert (made[mask == 0] == image[mask == 0]).all()
    for half in (slice(None, 64), slice(64, None)):
        assert (made[:, half] != without[:, half]).any()
    if order == "joint":
        few = narrow_pipe.inpaint(image, mask, **asked, window_batch=1).image
        assert np.abs(few.astype(int) - made).max() <= 1


def test_scale_0_looks_at_nothing(narrow_pipe, clip_folder):
    image, mask = hole()
    without = narrow_pipe.inpaint(image, mask, "a cat", num_inference_steps=1).image
    asked = ask("./nowhere", num_inference_steps=1, clip_guidance_scale=0.0)
    assert (narrow_pipe.inpaint(image, mask, **asked).image == without).all()
    ended = ask(clip_folder, num_inference_steps=1, clip_guidance_end=0.0)
    assert (narrow_pipe.inpaint(image, mask, **ended).image == without).all()


def test_what_it_lacks_is_told_in_one_line(narrow_pipe, clip_folder):
    image, mask = hole()
    for changes, words in [
        ({"clip_guidance_model": None}, "needs --clip_guidance_model, a CLIP's folder"),
        ({"prompt": ""}, "needs a --prompt"),
        ({"clip_guidance_model": "./nowhere"}, "is no folder; give one, or a hub id"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            narrow_pipe.inpaint(image, mask, **ask(clip_folder, **changes))
        assert "\n" not in str(caught.value)
    other = replace(narrow_pipe, denoiser=object())
    with pytest.raises(UserError, match="gradients, which --engine openvino does not give"):
        other.inpaint(image, mask, **ask(clip_folder))

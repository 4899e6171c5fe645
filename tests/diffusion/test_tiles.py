"""Windows cover every cell, average without seams, and noise belongs to places."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlfill.data.hints import open_spec
from controlfill.data.sample import Sample, collate
from controlfill.diffusion import tiles
from controlfill.diffusion.tiles import (
    Blend,
    TiledDenoise,
    decode_tiled,
    draw_noise,
    encode_tiled,
    make_windows,
    starts,
)
from controlfill.errors import UserError
from controlfill.inference.generate import choose_windows, generate_batch, make_denoise
from controlfill.inference.pipeline import load
from controlfill.models.controlnet import make_controlnet
from controlfill.options import SampleOptions

SIDES = st.integers(1, 200)
TIMES = torch.tensor([500])


@given(length=SIDES, window=st.integers(1, 64), share=st.floats(0, 0.9))
def test_windows_cover_an_axis_and_end_at_its_border(length, window, share):
    window = min(window, length)
    overlap = min(round(window * share), window - 1)
    places = starts(length, window, overlap)
    covered = np.zeros(length, int)
    for place in places:
        assert 0 <= place <= length - window
        covered[place : place + window] += 1
    assert covered.min() >= 1
    assert places == sorted(set(places))
    assert all(b - a <= window - overlap for a, b in pairwise(places))


@settings(max_examples=50, deadline=None)
@given(height=SIDES, width=SIDES, side=st.integers(6, 40), share=st.floats(0, 0.9))
def test_the_average_of_equal_windows_is_the_canvas(height, width, side, share):
    canvas = torch.arange(height * width, dtype=torch.float32).reshape(1, 1, height, width) / 1e3
    windows = make_windows((height, width), side, min(round(side * share), side - 1))
    blend = Blend(windows, canvas)
    for place in windows.places():
        blend.add(place, windows.part(canvas, place))
    torch.testing.assert_close(blend.mean(), canvas, rtol=1e-5, atol=1e-6)
    assert float(windows.weight().min()) > 0


def test_windows_are_averaged_smoothly():
    windows = make_windows((8, 24), 16, 8)
    blend = Blend(windows, torch.zeros(1, 1, 1, 1))
    for number, place in enumerate(windows.places()):
        blend.add(place, torch.full((1, 1, 8, 16), float(number)))
    row = blend.mean()[0, 0, 4]
    assert torch.equal(row[:8], torch.zeros(8))
    assert torch.equal(row[16:], torch.ones(8))
    steps = row[7:17].diff()
    assert float(steps.min()) > 0
    assert float(steps.max()) < 0.25


def batch_of(pipe, height, width, count=1):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    return collate([Sample(image=i, mask=mask, prompt=f"star {n}") for n, i in enumerate(images)],
                   pipe.spec)  # fmt: skip


def test_a_window_as_large_as_the_canvas_changes_nothing(pipe):
    batch = batch_of(pipe, 80, 96)
    whole = generate_batch(pipe, batch, SampleOptions(num_inference_steps=2, window_size=0))
    windowed = generate_batch(pipe, batch, SampleOptions(num_inference_steps=2, window_size=96))
    torch.testing.assert_close(windowed, whole, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def exact():
    """The embedded pair in double precision, where kernels for other batch sizes agree."""
    made = load(device="cpu")
    made.bundle.to(torch.device("cpu"), torch.float64)
    made.network.double()
    return made


@pytest.mark.parametrize("spec", ["masked-image", "masked-latent+mask"])
def test_the_number_of_windows_together_changes_nothing(exact, spec):
    made = exact
    if spec != "masked-image":
        asked = open_spec(spec)
        network = make_controlnet(exact.bundle, asked.channels, at_latent_size=True)
        torch.nn.init.normal_(network.controlnet_mid_block.weight, std=0.1)
        network.eval().requires_grad_(False).double()
        made = replace(exact, spec=asked, network=network)
    batch = batch_of(made, 64, 112, count=2)
    few = {"num_inference_steps": 1, "window_size": 48}
    one, four, all_ = (
        generate_batch(made, batch, SampleOptions(**few, window_batch=n)) for n in (1, 4, 99)
    )
    torch.testing.assert_close(four, one, atol=1e-5, rtol=0)
    torch.testing.assert_close(all_, one, atol=1e-5, rtol=0)
    whole = generate_batch(made, batch, SampleOptions(num_inference_steps=1, window_size=0))
    assert float((whole - one).abs().max()) > 1e-3


def test_a_window_sees_its_own_part_of_the_hint_and_its_own_prompt(pipe):
    batch = batch_of(pipe, 64, 128, count=2)
    options = SampleOptions(window_size=64, window_overlap=0.0, guidance_scale=3.0)
    latents = torch.randn((2, 4, 16, 32), generator=torch.Generator().manual_seed(0))
    open_ = torch.ones(2, 1, 16, 32)
    tiled = make_denoise(pipe, batch, options, open_, TIMES)
    assert isinstance(tiled, TiledDenoise)
    with torch.no_grad():
        together = tiled(latents, torch.tensor(500))
        for left in (0, 16):
            pixels = slice(4 * left, 4 * left + 64)
            part = collate(
                [Sample(image=(i[:, pixels] * 255).round().byte().numpy(), mask=m, prompt=p)
                 for i, m, p in zip(batch.image.permute(0, 2, 3, 1),
                                    (batch.mask[:, 0, :, pixels] * 255).byte().numpy(),
                                    batch.prompts, strict=True)],
                pipe.spec,
            )  # fmt: skip
            alone = make_denoise(pipe, part, options, open_[..., :16], TIMES)
            expected = alone(latents[..., left : left + 16], torch.tensor(500))
            found = together[..., left : left + 16]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_windows_without_anything_to_do_are_left_out(pipe):
    batch = batch_of(pipe, 64, 256)
    open_ = torch.zeros(1, 1, 16, 64)
    open_[..., 60:] = 1
    tiled = make_denoise(
        pipe, batch, SampleOptions(window_size=64, window_overlap=0.5), open_, TIMES
    )
    assert isinstance(tiled, TiledDenoise)
    assert tiled.batches == [[(0, 48)]]


def test_windows_are_chosen_by_size(pipe):
    def size(canvas, **options):
        return choose_windows(pipe.bundle, canvas, SampleOptions(**options)).size

    assert size((16, 24)) == (16, 24)
    assert size((16, 25)) == (16, 16)
    assert size((20, 400), window_size=96) == (20, 24)
    assert size((400, 400), window_size=0) == (400, 400)
    with pytest.raises(UserError, match="--window_size is 60, but embedded needs a multiple of 16"):
        size((20, 400), window_size=60)
    overlaps = [
        choose_windows(pipe.bundle, (99, 99), SampleOptions(window_overlap=s)).overlap
        for s in (0.25, 0.5)
    ]
    assert overlaps == [4, 8]


@settings(max_examples=20, deadline=None)
@given(
    top=st.integers(-80, 40), left=st.integers(-80, 40), up=st.integers(0, 70),
    before=st.integers(0, 70), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_noise_belongs_to_places(top, left, up, before, seed):
    old = draw_noise([seed, 5], (4, 20, 30), (top, left))
    grown = draw_noise([seed, 5], (4, 20 + up + 9, 30 + before + 40), (top - up, left - before))
    torch.testing.assert_close(grown[..., up : up + 20, before : before + 30], old, rtol=0, atol=0)
    assert torch.equal(draw_noise([5], (4, 20, 30), (top, left)), old[1:])
    assert seed == 5 or not torch.equal(old[0], old[1])


def test_noise_is_normal_without_repetition():
    noise = draw_noise([7], (4, 96, 96))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    blocks = noise.unfold(2, 32, 32).unfold(3, 32, 32).reshape(4, 9, -1)[0]
    assert float(torch.corrcoef(blocks).fill_diagonal_(0).abs().max()) < 0.15


def test_the_vae_in_windows_is_the_vae(pipe, monkeypatch):
    rows, columns = np.mgrid[0:256, 0:320]
    waves = np.stack([np.sin(rows / 9), np.cos(columns / 13), np.sin((rows + columns) / 17)])
    image = torch.from_numpy(waves)[None].float()
    whole = pipe.bundle.encode_image(image)
    picture = pipe.bundle.decode(whole)
    monkeypatch.setattr(tiles, "VAE_WINDOW", 128)
    monkeypatch.setattr(tiles, "VAE_OVERLAP", 32)
    calls = []
    encode = type(pipe.bundle).encode_image
    monkeypatch.setattr(
        type(pipe.bundle), "encode_image", lambda b, i: calls.append(i.shape) or encode(b, i)
    )
    latents = encode_tiled(pipe.bundle, image)
    assert set(calls) == {(1, 3, 128, 128)}
    assert float((latents - whole).abs().mean()) < 0.05
    decoded = decode_tiled(pipe.bundle, whole)
    assert decoded.shape == picture.shape
    assert float((decoded - picture).abs().mean()) < 0.01
    # No line of pixels at a window's border stands out from its neighbours.
    steps = (decoded - picture).diff(dim=3).abs().mean(dim=(0, 1, 2))
    assert float(steps.max()) < 0.02


def test_small_pictures_go_through_the_vae_whole(pipe):
    image = torch.rand((1, 3, 64, 512), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(encode_tiled(pipe.bundle, image), pipe.bundle.encode_image(image))

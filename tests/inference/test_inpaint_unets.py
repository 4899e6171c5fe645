"""UNets that take the mask themselves, with and without a ControlNet, are diffusers' own."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)

from controlfill.data.sample import Sample, collate
from controlfill.diffusion.condition import encode_condition, known_latents, latent_mask
from controlfill.diffusion.tiles import draw_noise, make_windows
from controlfill.errors import UserError
from controlfill.inference.generate import generate_batch
from controlfill.inference.pipeline import load
from controlfill.models.bundle import load_bundle
from controlfill.options import SampleOptions


@pytest.fixture(scope="module")
def inpaint_base(narrow_base, tmp_path_factory):
    """The narrow base with a 9-channel UNet whose VAE has but one opinion of a picture."""
    import shutil

    folder = tmp_path_factory.mktemp("inpaint") / "base"
    shutil.copytree(narrow_base, folder)
    torch.manual_seed(1)
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    UNet2DConditionModel.from_config(config, in_channels=9).save_pretrained(folder / "unet")
    bundle = load_bundle(str(folder), inpainting=True)
    with torch.no_grad():
        bundle.vae.quant_conv.bias[4:] = -60.0
        bundle.vae.quant_conv.weight[4:] = 0.0
    bundle.vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def control(inpaint_base, tmp_path_factory):
    """A ControlNet whose zero layers have learned something."""
    torch.manual_seed(2)
    bundle = load_bundle(str(inpaint_base), inpainting=True)
    network = ControlNetModel.from_unet(bundle.unet)
    # diffusers keeps the nine channels; a ControlNet for inpainting has the plain four.
    network.conv_in = torch.nn.Conv2d(4, network.conv_in.out_channels, 3, padding=1)
    network.register_to_config(in_channels=4)
    for layer in [*network.controlnet_down_blocks, network.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.2)
    folder = tmp_path_factory.mktemp("control")
    network.save_pretrained(folder)
    return folder


def picture(height=64, width=96):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[13:50, 21:77] = 255  # no multiple of a cell
    return image, mask


@pytest.mark.parametrize("with_control", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_it_paints_what_diffusers_paints(inpaint_base, control, with_control, strength):
    """Outside of what diffusers never promised: the noise is given, and we paste afterwards."""
    image, mask = picture()
    ours = load(
        str(inpaint_base),
        str(control) if with_control else None,
        conditioning="masked-image" if with_control else None,
        device="cpu",
    )
    batch = collate([Sample(image=image, mask=mask, prompt="a red cat")], ours.spec)
    asked = SampleOptions(
        prompt="a red cat",
        num_inference_steps=5,
        guidance_scale=5.0,
        seed=3,
        strength=strength,
        guidance_end=1.0,
        scheduler="ddim",
    )
    made = generate_batch(ours, batch, asked)
    bundle = ours.bundle
    parts = {
        "vae": bundle.vae, "text_encoder": bundle.text.encoder, "tokenizer": bundle.text.tokenizer,
        "unet": bundle.unet, "safety_checker": None, "feature_extractor": None,
        "scheduler": DDIMScheduler.from_config(bundle.scheduler_config),
        "requires_safety_checker": False,
    }  # fmt: skip
    if with_control:
        theirs = StableDiffusionControlNetInpaintPipeline(controlnet=ours.network, **parts)
        extra = {"control_image": batch.hint, "controlnet_conditioning_scale": 1.0}
    else:
        theirs, extra = StableDiffusionInpaintPipeline(**parts), {}
    theirs.set_progress_bar_config(disable=True)
    noise = draw_noise([3], (4, 8, 12))
    if strength < 1:
        # Their pipelines take given latents for noised ones already.
        times = parts["scheduler"]
        times.set_timesteps(5)
        start = bundle.encode_image(batch.image * 2 - 1)
        noise = times.add_noise(start, noise, times.timesteps[2:3])
    wanted = theirs(
        "a red cat", image=batch.image, mask_image=batch.mask, height=64, width=96,
        latents=noise, num_inference_steps=5, guidance_scale=5.0, negative_prompt="",
        strength=strength, output_type="pt", **extra,
    ).images  # fmt: skip
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def glid_base(narrow):
    """A base whose UNet has the 8 channels of glid-3-xl-stable."""
    return narrow("sd15", in_channels=8)


def test_eight_channels_see_known_latents_and_zeros(glid_base):
    image, mask = picture()
    ours = load(str(glid_base), device="cpu")
    batch = collate([Sample(image=image, mask=mask)], ours.spec)
    seen = encode_condition(ours.bundle, ours.spec, batch).masked
    open_ = latent_mask(batch.mask, ours.bundle.factor)
    assert seen.shape == (1, 4, 8, 12)
    assert 0 < open_.mean() < 1
    assert not (seen * open_).any()
    assert torch.equal(seen, known_latents(ours.bundle, batch) * (1 - open_))
    hidden = np.where(mask[..., None] > 0, 255 - image, image)
    other = collate([Sample(image=hidden, mask=mask)], ours.spec)
    assert torch.equal(encode_condition(ours.bundle, ours.spec, other).masked, seen)
    # Without a picture it sees nothing but zeros, as a fifth of what it was trained on.
    nothing = collate([Sample(image=image, mask=np.full_like(mask, 255))], ours.spec)
    assert not encode_condition(ours.bundle, ours.spec, nothing).masked.any()


def test_eight_channels_paint_what_their_formula_says(glid_base):
    """The UNet sees [x, known latents]; after each step the known ones are put back, noised."""
    image, mask = picture()
    ours = load(str(glid_base), device="cpu")
    batch = collate([Sample(image=image, mask=mask, prompt="a red cat")], ours.spec)
    asked = SampleOptions(
        prompt="a red cat", num_inference_steps=4, guidance_scale=5.0, seed=3, guidance_end=1.0,
        scheduler="ddim",
    )  # fmt: skip
    bundle = ours.bundle
    times = DDIMScheduler.from_config(bundle.scheduler_config)
    times.set_timesteps(4)
    open_ = latent_mask(batch.mask, 8).bool()
    known = known_latents(bundle, batch)
    noise = x = draw_noise([3], (4, 8, 12))
    words = bundle.text.encode(["", "a red cat"]).tokens
    for i, t in enumerate(times.timesteps):
        seen = torch.cat([x, known.masked_fill(open_, 0)], dim=1).repeat(2, 1, 1, 1)
        without, with_ = bundle.unet(seen, t, encoder_hidden_states=words).sample.chunk(2)
        x = times.step(without + 5.0 * (with_ - without), t, x).prev_sample
        later = times.timesteps[i + 1 : i + 2]
        there = times.add_noise(known, noise, later) if len(later) else known
        x = torch.where(open_, x, there)
    wanted = bundle.decode(x)
    torch.testing.assert_close(generate_batch(ours, batch, asked), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", ["rows", "outward", "joint"])
def test_eight_channels_grow_pictures_window_by_window(glid_base, order):
    image, _ = picture(40, 56)
    ours = load(str(glid_base), device="cpu")
    asked = {"right": 90, "bottom": 30, "num_inference_steps": 1, "window_size": 64}
    made = ours.outpaint(image, "a cat", window_order=order, **asked).image
    assert made.shape == (70, 146, 3)
    assert (made[:40, :56] == image).all()
    assert made[:, 56:].std() > 0
    again = ours.outpaint(image, "a cat", window_order=order, **asked).image
    assert (made == again).all()


def test_another_unet_by_command(glid_base, narrow, tmp_path):
    """The file alone on a plain base: it fills holes without a ControlNet, also in a batch."""
    from controlfill.cli import run
    from controlfill.images import open_image, save_image

    image, mask = picture(45, 70)
    (tmp_path / "in").mkdir()
    (tmp_path / "masks").mkdir()
    save_image(tmp_path / "in" / "a.png", image)
    save_image(tmp_path / "masks" / "a.png", mask)
    file, joined = tmp_path / "unet.safetensors", tmp_path / "joined"
    assert run(["glid", "split", str(glid_base), str(file)]) == 0
    words = ["--num_inference_steps", "1", "--device", "cpu", "--base"]
    folder = ["batch", str(tmp_path / "in"), "--mask_dir", str(tmp_path / "masks"), *words]
    plain = str(narrow("sd15"))
    here = ["--output_dir", str(tmp_path / "o")]
    assert run([*folder, plain, *here]) == 2  # a plain base alone fills nothing
    assert run([*folder, plain, "--unet", str(file), *here]) == 0
    made = open_image(tmp_path / "o" / "a.png").rgb
    assert (made[mask == 0] == image[mask == 0]).all()
    assert (made[mask > 0] != image[mask > 0]).any()
    assert run(["glid", "join", plain, str(file), str(joined)]) == 0
    assert run([*folder, str(joined), "--output_dir", str(tmp_path / "p")]) == 0
    assert (open_image(tmp_path / "p" / "a.png").rgb == made).all()


def test_another_unet_needs_a_base_of_its_family(glid_base, narrow):
    with pytest.raises(UserError, match="needs a --base, whose autoencoder and text encoder"):
        load(unet=glid_base)
    with pytest.raises(UserError, match="of another family"):
        load(str(narrow("sdxl")), unet=glid_base)
    with pytest.raises(
        UserError, match=r"--unet .* needs a --control .* which take 9 channels, or"
    ):
        load(str(glid_base), unet=narrow("sd15"))


def test_eight_channels_hear_a_controlnet_too(glid_base, control):
    image, mask = picture(64, 64)
    about = {"conditioning": "masked-image", "device": "cpu"}
    ours = load(str(glid_base), str(control), **about)
    alone, heard = (
        ours.inpaint(image, mask, num_inference_steps=1, controlnet_conditioning_scale=scale).image
        for scale in (0.0, 1.0)
    )
    assert (alone != heard).any()
    assert (heard[mask == 0] == image[mask == 0]).all()


def test_the_commands_take_it_without_a_controlnet(inpaint_base, tmp_path):
    from controlfill.cli import run
    from controlfill.images import open_image, save_image

    image, mask = picture(45, 70)
    save_image(tmp_path / "i.png", image)
    save_image(tmp_path / "m.png", mask)
    words = ["--base", str(inpaint_base), "--num_inference_steps", "1", "--device", "cpu"]
    words += ["--output_dir", str(tmp_path / "o")]
    assert run(["inpaint", str(tmp_path / "i.png"), str(tmp_path / "m.png"), *words]) == 0
    made = open_image(tmp_path / "o" / "inpainted.png").rgb
    assert (made[mask == 0] == image[mask == 0]).all()
    assert (made[mask > 0] != image[mask > 0]).any()
    assert run(["outpaint", str(tmp_path / "i.png"), "--left", "90", *words]) == 0
    assert open_image(tmp_path / "o" / "outpainted.png").size == (45, 160)


def test_windows_see_their_own_part_of_the_mask(inpaint_base):
    image, mask = picture(64, 128)
    ours = load(str(inpaint_base), device="cpu")
    batch = collate([Sample(image=image, mask=mask), Sample(image=image, mask=mask)], ours.spec)
    whole = encode_condition(ours.bundle, ours.spec, batch)
    assert whole.masked.shape == (2, 5, 8, 16)
    part = whole.part(make_windows((8, 16), 8, 0), [(0, 0), (0, 8)])
    assert torch.equal(part.masked, torch.cat([whole.masked[..., :8], whole.masked[..., 8:]]))
    twice = part.doubled(part.text)
    assert torch.equal(twice.masked, torch.cat([part.masked] * 2))
    assert torch.equal(twice.last(4).masked, part.masked)


def test_it_is_no_base_to_train_on(inpaint_base):
    with pytest.raises(UserError, match="whose UNet takes 4"):
        load_bundle(str(inpaint_base))


def test_openvino_runs_it_too(inpaint_base):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    image, mask = picture(64, 64)
    ours, theirs = (
        load(str(inpaint_base), engine=engine).inpaint(image, mask, num_inference_steps=2).image
        for engine in ("torch", "openvino")
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1

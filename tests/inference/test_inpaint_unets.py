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
from controlfill.diffusion.condition import encode_condition
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

"""SDXL: its words, framing, formula and pictures are diffusers' own; every command knows it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, final_weights, finish, same_weights
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from controlfill.data.cache import open_cache
from controlfill.data.hints import open_spec
from controlfill.data.sample import Sample, collate
from controlfill.diffusion.condition import encode_condition
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.objective import Objective, step_rng
from controlfill.diffusion.sampler import Denoise, Guidance, make_scheduler, sample
from controlfill.diffusion.tiles import draw_noise, make_windows
from controlfill.inference.generate import generate_batch
from controlfill.inference.pipeline import load
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import make_controlnet, make_header, save_controlnet
from controlfill.options import CacheOptions, LightningOptions, SampleOptions, TrainOptions
from controlfill.training.caching import build_cache
from controlfill.training.lightning import train_lightning

CPU = torch.device("cpu")
SPEC = open_spec("masked-image")
SKINS = sorted((ROOT / "configs").glob("skins_*.yaml"))


@pytest.fixture(scope="module")
def bundle(narrow):
    return load_bundle(str(narrow("sdxl")))


@pytest.fixture(scope="module")
def network(bundle):
    """A ControlNet whose zero layers have learned something."""
    torch.manual_seed(2)
    made = make_controlnet(bundle, 3)
    for layer in [*made.controlnet_down_blocks, made.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.2)
    return made


@pytest.fixture(scope="module")
def control(bundle, network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    save_controlnet(network, folder, make_header(bundle, "masked-image"))
    return folder


def stock(bundle, cls, **more):
    """diffusers' pipeline of the same parts."""
    text = bundle.text
    pipeline = cls(
        vae=bundle.vae, text_encoder=text.encoders[0], text_encoder_2=text.encoders[1],
        tokenizer=text.pairs[0][0], tokenizer_2=text.pairs[1][0], unet=bundle.unet,
        scheduler=DDIMScheduler.from_config(bundle.scheduler_config), add_watermarker=False, **more,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_batch(count=2, height=64, width=64, **more):
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[13:50, 21:47] = 255
        prompt = ("a red cat", "mat")[number % 2]
        samples.append(Sample(image=image, mask=mask, prompt=prompt, **more))
    return collate(samples, SPEC)


def test_what_it_is(bundle):
    assert (bundle.family, bundle.asks_framing, bundle.guidance_scale) == ("sdxl-64", True, 5.0)
    assert (bundle.factor, bundle.size_multiple) == (8, 32)
    assert bundle.fingerprints()["text_encoder"].count("+") == 1


@pytest.mark.filterwarnings("ignore")
def test_words_equal_the_pipelines(bundle):
    tokens, empty, pooled, empty_pooled = stock(
        bundle, StableDiffusionXLInpaintPipeline
    ).encode_prompt("a red cat", device=CPU, do_classifier_free_guidance=True)
    ours = bundle.text.encode(["a red cat", ""])
    torch.testing.assert_close(ours.tokens, torch.cat([tokens, empty]))
    torch.testing.assert_close(ours.pooled, torch.cat([pooled, empty_pooled]))
    assert not ours[1:].tokens.any()
    bundle.text.empty_is_zero = False
    assert bundle.text.encode([""]).pooled.any()
    bundle.text.empty_is_zero = True


def test_loss_and_gradient_equal_the_script_of_diffusers(bundle, network):
    """As train_controlnet_sdxl.py writes it, with sizes and crops of each picture."""
    batch = make_batch(framing=(100, 80, 5, 7, 64, 64))
    ours = Objective(bundle, SPEC)(network, batch, step_rng(3, 0, 5)).mean()
    ours.backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    rng = step_rng(3, 0, 5)
    timesteps = torch.randint(0, 1000, (2,), generator=rng)
    posterior = bundle.vae.encode(batch.image * 2 - 1).latent_dist
    drawn = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
    latents = drawn * bundle.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=rng)
    noisy = DDPMScheduler.from_config(bundle.scheduler_config).add_noise(latents, noise, timesteps)
    outputs = [
        encoder(tokenizer(batch.prompts, padding="max_length", max_length=32,
                          return_tensors="pt").input_ids, output_hidden_states=True)
        for tokenizer, encoder in bundle.text.pairs
    ]  # fmt: skip
    words = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    added = {
        "text_embeds": outputs[-1][0],
        "time_ids": torch.tensor([[100.0, 80, 5, 7, 64, 64]] * 2),
    }
    down, middle = network(noisy, timesteps, encoder_hidden_states=words, added_cond_kwargs=added,
                           controlnet_cond=batch.hint, return_dict=False)  # fmt: skip
    prediction = bundle.unet(
        noisy, timesteps, encoder_hidden_states=words, added_cond_kwargs=added,
        down_block_additional_residuals=down, mid_block_additional_residual=middle,
    ).sample  # fmt: skip
    theirs = F.mse_loss(prediction, noise)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_framing_reaches_the_networks(bundle, network):
    whole, cut = make_batch(), make_batch(framing=(1000, 800, 300, 0, 64, 64))
    assert whole.framing().tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    losses = [Objective(bundle, SPEC)(network, b, step_rng(0, 0, 0)) for b in (whole, cut)]
    assert not torch.allclose(*losses)


def test_windows_are_pictures_of_their_own(bundle):
    condition = encode_condition(bundle, SPEC, make_batch(1, 64, 128))
    part = condition.part(make_windows((8, 16), 8, 4), [(0, 0), (0, 8)])
    assert part.framing.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert len(part.text) == len(part.text.pooled) == 2
    whole = condition.part(make_windows((8, 16), 16, 8), [(0, 0)])
    assert whole.framing.tolist() == [[64, 128, 0, 0, 64, 128]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["ddim", "unipc"])
def test_sampling_equals_the_controlnet_pipeline(bundle, network, scale, name):
    batch = make_batch(1)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    pipeline = stock(bundle, StableDiffusionXLControlNetPipeline, controlnet=network)
    if name == "unipc":
        pipeline.scheduler = UniPCMultistepScheduler.from_config(
            bundle.scheduler_config, use_karras_sigmas=True
        )
    theirs = pipeline(
        "a red cat", image=batch.hint, latents=noise.clone(), num_inference_steps=6,
        output_type="latent", guidance_scale=scale, controlnet_conditioning_scale=1.0,
    ).images  # fmt: skip
    guidance = Guidance(scale=scale, without=bundle.text.encode([""])) if scale != 1 else None
    condition = encode_condition(bundle, SPEC, batch)
    denoise = Denoise(ControlDenoiser(bundle.unet), network, condition, guidance)
    scheduler = make_scheduler(name, bundle.scheduler_config, 6, CPU)
    with torch.no_grad():
        *_, ours = sample(denoise, scheduler, noise, torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_inpaint_unets_paint_what_diffusers_paints(narrow):
    ours = load(str(narrow("sdxl", in_channels=9)), device="cpu")
    vae = ours.bundle.vae
    vae.quant_conv.bias.data[4:] = -60.0  # but one opinion of a picture
    vae.quant_conv.weight.data[4:] = 0.0
    batch = make_batch(1, 64, 96)
    asked = SampleOptions(
        prompt="a red cat", num_inference_steps=5, seed=3, scheduler="ddim", guidance_end=1.0
    )
    made = generate_batch(ours, batch, asked)
    theirs = stock(ours.bundle, StableDiffusionXLInpaintPipeline)(
        "a red cat", image=batch.image, mask_image=batch.mask, height=64, width=96, strength=1.0,
        num_inference_steps=5, guidance_scale=5.0, latents=draw_noise([3], (4, 8, 12), (0, 0)),
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-4)


def test_its_autoencoder_keeps_out_of_half_precision(narrow):
    bundle = load_bundle(str(narrow("sdxl"))).to(CPU, torch.float16)
    assert (bundle.vae.dtype, bundle.unet.dtype) == (torch.float32, torch.float16)
    assert load_bundle(str(narrow("sdxl"))).to(CPU, torch.bfloat16).vae.dtype == torch.bfloat16
    assert load_bundle(str(narrow("sd15"))).to(CPU, torch.float16).vae.dtype == torch.float16
    image = torch.zeros(1, 3, 64, 64)
    exact = bundle.decode(bundle.encode_image(image))
    with torch.autocast("cpu", torch.bfloat16):  # as training in half precision has it
        moments = bundle.encode_moments(image)
        assert moments.dtype == torch.float32
        assert torch.equal(bundle.decode(bundle.draw_latents(moments)), exact)


@pytest.fixture
def pictures(tmp_path):
    """Pictures of several shapes, with prompts."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate([(90, 70), (64, 128), (128, 64), (80, 80), (70, 120)]):
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(("a red cat", "mat", "on a mat")[number % 3])
    return folder


@pytest.fixture
def options(small_run, narrow, pictures):
    return replace(
        small_run, image_dir=str(pictures), pretrained_model_name_or_path=str(narrow("sdxl")),
        max_steps=3, save_steps=1, aspect_ratio_buckets=True, proportion_empty_prompts=0.3,
        ema_decay=0.5, val_split=0.2, validation_steps=3, log_images_steps=3,
    )  # fmt: skip


def for_lightning(options, folder):
    from controlfill.options import ControlOptions
    from controlfill.options.base import shared_values

    shared = shared_values(options, ControlOptions)
    return LightningOptions(
        **{**shared, "output_dir": folder, "val_split": 0.2, "image_dir": options.image_dir},
        accelerator="cpu", log_every_n_steps=2, log_images_every_n_steps=0,
    )  # fmt: skip


def test_it_is_trained_cached_resumed_and_used(options, tmp_path, photo, hole):
    """Both engines, buckets, a cache that holds pooled words, resuming, inpainting, outpainting."""
    cached = CacheOptions(
        data=options.image_dir, pretrained_model_name_or_path=options.pretrained_model_name_or_path,
        cache_dir=tmp_path / "cache", image_size=64, aspect_ratio_buckets=True, num_workers=0,
        device="cpu",
    )  # fmt: skip
    build_cache(cached, lambda *_: None)
    options = replace(options, cache_dir=cached.cache_dir)
    losses = finish(options)
    lightning = []
    told = for_lightning(options, tmp_path / "lightning")
    train_lightning(told, on_step=lambda step: lightning.append(float(step.loss)))
    assert lightning == losses
    assert same_weights(final_weights(options.output_dir), final_weights(told.output_dir))
    (run,) = options.output_dir.iterdir()
    again = replace(options, output_dir=tmp_path / "again",
                    resume_from_checkpoint=str(run / "checkpoint-1"))  # fmt: skip
    assert finish(again) == losses[1:]
    assert same_weights(final_weights(options.output_dir), final_weights(again.output_dir))
    pipe = load(None, str(run), device="cpu")
    result = pipe.inpaint(photo, hole, "a red cat", num_inference_steps=2)
    assert np.array_equal(result.image[hole == 0], photo[hole == 0])
    grown = pipe.outpaint(photo, "mat", right=100, num_inference_steps=2, window_size=64)
    assert np.array_equal(grown.image[:, :70], photo)


def test_cached_words_are_the_encoders(options, bundle, tmp_path):
    asked = CacheOptions(
        data=options.image_dir, pretrained_model_name_or_path=bundle.name, image_size=64,
        cache_dir=tmp_path / "cache", num_workers=0, device="cpu",
    )  # fmt: skip
    build_cache(asked, lambda *_: None)
    texts = open_cache(asked.cache_dir, {}).texts
    words = bundle.text.encode_anew(["mat", "", "a red cat"])
    tokens, pooled = texts.get(["mat", "", "a red cat"])
    torch.testing.assert_close(tokens, words.tokens)
    torch.testing.assert_close(pooled, words.pooled)


def test_a_controlnet_file_is_diffusers_own(control, network):
    again = ControlNetModel.from_pretrained(control)
    assert again.config.addition_embed_type == "text_time"
    assert torch.equal(again.add_embedding.linear_1.weight, network.add_embedding.linear_1.weight)


@pytest.mark.parametrize("config", SKINS, ids=lambda file: file.stem)
def test_the_configs_of_skins_train_it(config, tmp_path, narrow, network):
    """With the flags that each file's head names, on small cuts."""
    network.save_pretrained(tmp_path / "canny")
    flags = next(line for line in config.read_text().splitlines() if line.startswith("# SDXL: add"))
    assert "--pretrained_model_name_or_path" in flags
    changed = {
        "pretrained_model_name_or_path": str(narrow("sdxl")), "image_dir": "world:skins-mixed",
        "image_size": 64, "crop": "patch", "aspect_ratio_buckets": False, "batch_size": 1,
        "gradient_accumulation_steps": 1, "mixed_precision": "no", "max_steps": 1,
        "num_workers": 0, "log_images_steps": 0, "output_dir": tmp_path, "max_train_samples": 2,
    }  # fmt: skip
    told = yaml.safe_load(config.read_text())
    if "controlnet_model_name_or_path" in told:
        changed["controlnet_model_name_or_path"] = str(tmp_path / "canny")
    (loss,) = finish(TrainOptions(**{**told, **changed}))
    assert loss > 0

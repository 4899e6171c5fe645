"""Seven lines of sampling equal diffusers' pipelines, and known latents stay known."""

from contextlib import ExitStack, contextmanager
from copy import deepcopy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from controlfill.diffusion.condition import Condition
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.reuse import share_halves, textless
from controlfill.diffusion.sampler import (
    FIRST_SIGMA,
    Control,
    Denoise,
    Guidance,
    Known,
    make_scheduler,
    sample,
    times_between,
)
from controlfill.errors import UserError
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import make_controlnet

CPU = torch.device("cpu")
THEIRS = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
}


@pytest.fixture(scope="module")
def narrow(narrow_base):
    """A narrow SD 1.5 and a ControlNet for it whose zero convolutions speak."""
    bundle = load_bundle(str(narrow_base))
    torch.manual_seed(2)
    network = make_controlnet(bundle, 3)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return bundle, network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def precise(narrow):
    """The same in double precision, where guidance cannot make much of rounding."""
    bundle, network = deepcopy(narrow)
    return bundle.to(CPU, torch.float64), network.double()


@pytest.mark.filterwarnings("ignore")  # the pipeline warns about its own past
@pytest.mark.parametrize("name", sorted(THEIRS))
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("span", [(0.0, 1.0), (0.2, 0.7)])
def test_sampling_equals_the_controlnet_pipeline(name, scale, span, precise):
    bundle, network = precise
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 4, 8, 8), generator=rng).double()
    hint = torch.rand((1, 3, 64, 64), generator=rng).double()
    cls, extra = THEIRS[name]
    pipeline = StableDiffusionControlNetPipeline(
        vae=bundle.vae, text_encoder=bundle.text.encoder, tokenizer=bundle.text.tokenizer,
        unet=bundle.unet, controlnet=network, safety_checker=None, feature_extractor=None,
        scheduler=cls.from_config(bundle.scheduler_config, **extra), requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red cat", image=hint, latents=noise.clone(), num_inference_steps=6, output_type="latent",
        guidance_scale=scale, generator=torch.Generator().manual_seed(7), negative_prompt="mat",
        control_guidance_start=span[0], control_guidance_end=span[1],
    ).images  # fmt: skip
    condition = Condition(text=bundle.text.encode(["a red cat"]), hint=hint)
    guidance = Guidance(scale=scale, without=bundle.text.encode(["mat"])) if scale != 1 else None
    scheduler = make_scheduler(name, bundle.scheduler_config, 6, CPU)
    control = Control(times=times_between(scheduler.timesteps, *span))
    denoise = Denoise(ControlDenoiser(bundle.unet), network, condition, guidance, control)
    with torch.no_grad():
        *_, ours = sample(denoise, scheduler, noise, torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_the_opened_folder_is_the_same_controlnet(narrow, tmp_path):
    _, network = narrow
    network.save_pretrained(tmp_path)
    again = ControlNetModel.from_pretrained(tmp_path)
    assert torch.equal(again.conv_in.weight, network.conv_in.weight)


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_known_latents_stay_on_every_scheduler(name, pipe):
    rng = torch.Generator().manual_seed(0)
    known, noise = torch.randn((2, 1, 4, 16, 16), generator=rng)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 5:12] = 1
    text = pipe.bundle.text.encode(["red circle"])
    condition = Condition(text=text, hint=torch.zeros(1, 3, 64, 64))
    denoise = Denoise(ControlDenoiser(pipe.bundle.unet), pipe.network, condition)
    scheduler = make_scheduler(name, pipe.bundle.scheduler_config, 5, CPU)
    with torch.no_grad():
        stages = list(sample(denoise, scheduler, noise, rng, Known(latents=known, mask=mask)))
    assert len(stages) == 5
    outside = (mask == 0).expand_as(known)
    assert torch.equal(stages[-1][outside], known[outside])
    assert not torch.equal(stages[-1][~outside], known[~outside])
    assert torch.isfinite(stages[-1]).all()


def test_guidance_and_control_scale_change_the_prediction(pipe):
    bundle = pipe.bundle
    condition = Condition(text=bundle.text.encode(["red star"]), hint=torch.zeros(1, 3, 64, 64))
    latents, t = torch.ones(1, 4, 16, 16), torch.tensor(500)
    denoiser = ControlDenoiser(bundle.unet)
    empty = bundle.text.encode([""])
    with torch.no_grad():
        plain = Denoise(denoiser, pipe.network, condition)(latents, t)
        guided = Denoise(denoiser, pipe.network, condition, Guidance(scale=3.0, without=empty))
        without = Denoise(denoiser, pipe.network, Condition(text=empty, hint=condition.hint))
        expected = without(latents, t) + 3 * (plain - without(latents, t))
        torch.testing.assert_close(guided(latents, t), expected, rtol=1e-3, atol=1e-3)
        off = Denoise(denoiser, pipe.network, condition, control=Control(scale=0.0))(latents, t)
        alone = Denoise(denoiser, None, condition)(latents, t)
    assert torch.equal(off, alone)


@contextmanager
def counted(module):
    """The numbers of samples that go through `module`."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


def test_the_hint_is_embedded_once_and_the_network_left_alone(narrow):
    bundle, network = narrow
    condition = Condition(text=bundle.text.encode(["a"]), hint=torch.rand(1, 3, 64, 64))
    guidance = Guidance(scale=3.0, without=bundle.text.encode([""]))
    embedding = network.controlnet_cond_embedding
    with counted(embedding) as seen:
        denoise = Denoise(ControlDenoiser(bundle.unet), network, condition, guidance)
        for t in (900, 500, 100):
            denoise(torch.zeros(1, 4, 8, 8), torch.tensor(t))
    assert seen == [1]
    assert network.controlnet_cond_embedding is embedding


def test_what_does_not_change_is_computed_once(narrow):
    bundle, network = narrow
    condition = Condition(text=bundle.text.encode(["a"]), hint=torch.rand(1, 3, 64, 64))
    guidance = Guidance(scale=3.0, without=bundle.text.encode([""]))
    for part in (bundle.unet, network):
        with ExitStack() as stack:
            first = part.down_blocks[0].attentions[0].transformer_blocks[0]
            last = part.mid_block.attentions[0].transformer_blocks[0]
            modules = (first.attn1, last.attn1, last.attn2.to_k)
            seen = [stack.enter_context(counted(module)) for module in modules]
            denoise = Denoise(ControlDenoiser(bundle.unet), network, condition, guidance)
            for t in (900, 500, 100):
                denoise(torch.zeros(1, 4, 8, 8), torch.tensor(t))
        # Both halves of guidance are equal until they see the text, which is always the same.
        assert seen == [[1] * 3, [2] * 3, [2]]


def test_halves_are_shared_in_every_shape_of_network(narrow):
    """A block without attention first, and SDXL, whose time embedding knows the text already."""
    plain = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    config = {
        "block_out_channels": (8, 16), "down_block_types": plain[0], "up_block_types": plain[1],
        "cross_attention_dim": 8, "norm_num_groups": 4, "attention_head_dim": 2,
    }  # fmt: skip
    unet = UNet2DConditionModel(**config).eval()
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(4, 5, 8)
    twice, t = torch.cat([latents] * 2), torch.tensor(300)
    with torch.no_grad(), counted(unet.down_blocks[1].resnets[0]) as seen:
        expected = unet(twice, t, text).sample
        torch.testing.assert_close(share_halves(unet)(twice, t, text).sample, expected)
    assert seen == [4, 2]
    richer = UNet2DConditionModel(
        **config, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ).eval()  # fmt: skip
    assert list(textless(richer)) == []


def test_steps_outside_of_an_interval_cost_less(narrow):
    bundle, network = narrow
    condition = Condition(text=bundle.text.encode(["a"]), hint=torch.rand(1, 3, 64, 64))
    empty = bundle.text.encode([""])

    def samples(control, **guidance):
        guided = Guidance(scale=2.0, without=empty, **guidance)
        denoise = Denoise(ControlDenoiser(bundle.unet), network, condition, guided, control)
        with counted(bundle.unet) as base, counted(network.mid_block) as controlled:
            denoise(torch.zeros(1, 4, 8, 8), torch.tensor(500))
        return sum(base), sum(controlled)

    late, now = frozenset({100.0}), frozenset({500.0})
    assert samples(Control()) == (2, 2)
    assert samples(Control(times=now), times=now) == (2, 2)
    assert samples(Control(times=late)) == (2, 0)
    assert samples(Control(), times=late) == (1, 1)
    assert samples(Control(prompted_only=True)) == (2, 1)


def test_control_of_the_prompted_half_only(pipe):
    bundle, network = pipe.bundle, pipe.network
    condition = Condition(text=bundle.text.encode(["red star"]), hint=torch.rand(1, 3, 64, 64))
    empty = bundle.text.encode([""])
    latents, t = torch.ones(1, 4, 16, 16), torch.tensor(500)
    denoiser = ControlDenoiser(bundle.unet)
    with torch.no_grad():
        found = Denoise(
            denoiser, network, condition, Guidance(scale=3.0, without=empty),
            Control(prompted_only=True),
        )(latents, t)  # fmt: skip
        prompted = Denoise(denoiser, network, condition)(latents, t)
        bare = Denoise(denoiser, None, Condition(text=empty, hint=condition.hint))(latents, t)
    torch.testing.assert_close(found, bare + 3 * (prompted - bare), rtol=1e-3, atol=1e-3)


def test_each_call_gets_a_fresh_scheduler(pipe):
    config = pipe.bundle.scheduler_config
    first, second = (make_scheduler("unipc", config, 4, CPU) for _ in range(2))
    assert first is not second
    plain = {k: v for k, v in config.items() if k != "rescale_betas_zero_snr"}
    assert make_scheduler("unipc", plain, 4, CPU).config.use_karras_sigmas


def test_impossible_schedules_are_refused(pipe):
    with pytest.raises(UserError, match="no scheduler is called 'magic'; there are: ddim"):
        make_scheduler("magic", pipe.bundle.scheduler_config, 4, CPU)
    for steps in (0, 1001):
        with pytest.raises(UserError, match=f"num_inference_steps is {steps}; it lies between"):
            make_scheduler("ddim", pipe.bundle.scheduler_config, steps, CPU)


@pytest.mark.parametrize("name", ["unipc", "dpm++2m"])
def test_karras_sigmas_follow_a_step_from_pure_noise(pipe, name):
    """The embedded base has zero terminal SNR: sigma 20 is already far from its pure noise."""
    sigmas = make_scheduler(name, pipe.bundle.scheduler_config, 10, CPU).sigmas
    assert len(sigmas) == 11
    assert float(sigmas[0]) > 1000
    assert float(sigmas[1]) == pytest.approx(FIRST_SIGMA, rel=1e-4)
    roots = sigmas[1:-1].double() ** (1 / 7)
    steps = roots.diff()
    torch.testing.assert_close(steps, steps.mean().expand(8), atol=1e-5, rtol=1e-4)
    assert len(make_scheduler(name, pipe.bundle.scheduler_config, 1, CPU).timesteps) == 1
    plain = {**pipe.bundle.scheduler_config, "rescale_betas_zero_snr": False}
    assert float(make_scheduler(name, plain, 10, CPU).sigmas[0]) < 20


def test_guidance_spares_only_steps_that_begin_late():
    times = torch.arange(10).flip(0)
    assert times_between(times, 0, 1, wholly=False) is None
    assert times_between(times, 0, 0.9, wholly=False) == set(map(float, range(1, 10)))
    assert times_between(times, 0.2, 0.5, wholly=False) == {7.0, 6.0, 5.0}
    assert times_between(times[:1], 0, 0.9, wholly=False) == {9.0}
    assert times_between(times, 0, 0, wholly=False) == frozenset()

"""LoRAs: diffusers reads ours, we read others', and what does not fit a base is refused."""

import json

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from controlfill.data.sample import Sample, collate
from controlfill.diffusion.condition import encode_condition
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.objective import TuneObjective, step_rng
from controlfill.errors import UserError
from controlfill.files import read_header
from controlfill.inference.pipeline import HOLE_SPEC, load
from controlfill.models.bundle import load_bundle
from controlfill.models.inpainter import TunedHeader, make_inpainter
from controlfill.models.lora import (
    LORA,
    LoraShape,
    add_lora,
    find_lora,
    fuse_lora,
    own_names,
    read_pairs,
    save_kohya,
    save_lora,
)
from controlfill.models.lora_alphas import ADAPTER_KEY

SHAPE = LoraShape(rank=4, alpha=2.0, targets=("to_q", "to_v", "to_out.0"))


def header_of(bundle):
    return TunedHeader(
        base=bundle.name, base_family=bundle.family, prediction_type=bundle.prediction_type, rank=4
    )


def learned_lora(bundle, learns_text=True):
    """Adapters in `bundle` that have learned something."""
    network = make_inpainter(bundle, learns_text)
    add_lora(network, SHAPE, seed=0)
    torch.manual_seed(3)
    for parameter in network.learned().values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network


def make_batch(prompts=("a red cat", "a mat")):
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 8:40] = 255
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    return collate([Sample(image=image, mask=mask, prompt=p) for p in prompts], HOLE_SPEC)


@torch.no_grad()
def predict(bundle):
    """What the base predicts of the same noise every time."""
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    condition = encode_condition(bundle, HOLE_SPEC, make_batch())
    return ControlDenoiser(bundle.unet)(None, noisy, torch.tensor([500, 20]), condition)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def trained(request, narrow, tmp_path_factory):
    """A base, the file of a LoRA that was trained on it, and what both predict together."""
    base = str(narrow(request.param, in_channels=9))
    bundle = load_bundle(base, inpainting=True)
    network = learned_lora(bundle)
    file = tmp_path_factory.mktemp("lora") / LORA
    save_lora(file, network.learned(), SHAPE, header_of(bundle))
    return base, file, predict(bundle)


def test_adapters_alone_learn_and_say_nothing_at_first(narrow):
    bundle = load_bundle(str(narrow("sd15", in_channels=9)), inpainting=True)
    before = predict(bundle)
    network = make_inpainter(bundle, learns_text=True)
    add_lora(network, SHAPE, seed=0)
    assert torch.equal(predict(bundle), before)
    assert all(".lora_" in name for name in network.learned())
    assert any(name.startswith("encoders.0.") for name in network.learned())
    assert all(p.dtype == torch.float32 for p in network.learned().values())
    other = make_inpainter(load_bundle(bundle.name, inpainting=True), learns_text=True)
    add_lora(other, SHAPE, seed=1)
    pairs = zip(network.learned().values(), other.learned().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_a_lora_put_into_a_base_predicts_as_when_it_was_trained(trained):
    base, file, wanted = trained
    bundle = load_bundle(base, inpainting=True)
    plain = predict(bundle)
    fuse_lora(bundle, file, 1.0)
    torch.testing.assert_close(predict(bundle), wanted, rtol=0, atol=1e-4)
    assert (wanted - plain).abs().max() > 0.01
    fuse_lora(bundle, file, -1.0)
    torch.testing.assert_close(predict(bundle), plain, rtol=0, atol=1e-4)


def test_rank_stabilised_loras_count_over_the_root_of_their_rank(tmp_path):
    tensors = {f"unet.mid_block.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    for stable, scale in [(False, 0.5), (True, 1.0)]:
        about = {"unet.r": 4, "unet.lora_alpha": 2.0, "unet.use_rslora": stable}
        save_file(tensors, tmp_path / LORA, metadata={ADAPTER_KEY: json.dumps(about)})
        ((*_, found),) = read_pairs(tmp_path / LORA)
        assert found == scale


def test_diffusers_loads_a_lora_and_predicts_the_same(trained):
    base, file, wanted = trained
    pipe = diffusers.AutoPipelineForInpainting.from_pretrained(base)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    bundle = load_bundle(base, inpainting=True)
    bundle.unet.conv_in = bundle.unet.conv_in  # the same networks, loaded by diffusers
    theirs = load_bundle(base, inpainting=True)
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    theirs.text.pairs = [
        (tokenizer, encoder)
        for (tokenizer, _), encoder in zip(theirs.text.pairs, encoders, strict=False)
    ]
    object.__setattr__(theirs, "unet", pipe.unet)
    torch.testing.assert_close(predict(theirs), wanted, rtol=0, atol=1e-4)


def test_the_same_lora_under_kohyas_names(trained, tmp_path):
    base, file, wanted = trained
    save_kohya(tmp_path / "kohya.safetensors", file)
    names = load_file(tmp_path / "kohya.safetensors")
    assert all(name.startswith(("lora_unet_", "lora_te")) for name in names)
    assert float(names[next(n for n in names if n.endswith(".alpha"))]) == SHAPE.alpha
    bundle = load_bundle(base, inpainting=True)
    fuse_lora(bundle, tmp_path / "kohya.safetensors", 1.0)
    torch.testing.assert_close(predict(bundle), wanted, rtol=0, atol=1e-4)


def test_files_and_networks_name_the_same_weights(narrow, tmp_path):
    bundle = load_bundle(str(narrow("sdxl", in_channels=9)), inpainting=True)
    network = learned_lora(bundle)
    save_lora(tmp_path / LORA, network.learned(), SHAPE, header_of(bundle))
    back = own_names(network, load_file(tmp_path / LORA))
    assert back.keys() == network.learned().keys()
    assert all(torch.equal(back[name], p) for name, p in network.learned().items())
    about = json.loads(read_header(tmp_path / LORA)["controlfill"])
    assert (about["base_family"], about["rank"]) == (bundle.family, 4)


def test_scales_and_folders_are_understood(trained):
    base, file, wanted = trained
    assert find_lora(str(file.parent)) == (file, 1.0)
    assert find_lora(f"{file}:0.25") == (file, 0.25)
    pipe = load(base, loras=[f"{file}:0.25", f"{file.parent}:0.75"], device="cpu")
    torch.testing.assert_close(predict(pipe.bundle), wanted, rtol=0, atol=1e-4)
    alone = load(loras=[str(file)], device="cpu")  # the base that the file names
    assert alone.bundle.name == base


def test_what_does_not_fit_is_one_line(trained, narrow, tmp_path):
    base, file, _ = trained
    wrong = "sd2" if "sd15" in base else "sd15"
    other = load_bundle(str(narrow(wrong, in_channels=9)), inpainting=True)
    with pytest.raises(UserError, match="was trained on a .* base .* give a base of that kind"):
        fuse_lora(other, file, 1.0)
    bundle = load_bundle(base, inpainting=True)
    foreign = {"unet.mid_block.resnets.0.conv1.lora_A.weight": torch.zeros(2, 7, 3, 3),
               "unet.mid_block.resnets.0.conv1.lora_B.weight": torch.zeros(9, 2, 1, 1)}  # fmt: skip
    save_file(foreign, tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    for scale in ("nan", "-inf"):
        with pytest.raises(UserError, match=f"the scale {scale} is no finite number"):
            find_lora(f"{file}:{scale}")
    about = {"base": "x", "base_family": "sd-32"}
    for text in ("{", '"x"', json.dumps(about), json.dumps(about | {"prediction_type": 1})):
        save_file(foreign, tmp_path / "odd.safetensors", metadata={"controlfill": text})
        with pytest.raises(UserError, match="odd.safetensors is damaged: "):
            fuse_lora(bundle, tmp_path / "odd.safetensors", 1.0)
    with pytest.raises(UserError, match="does not say what base it was trained on"):
        load(loras=[str(tmp_path / "foreign.safetensors")])
    for name, words in {
        "foreign": "was trained on another base: its layer is",
        "broken": "is not a safetensors file",
        "none": "no LoRA is found",
        "absent": "there is no such file",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            fuse_lora(bundle, *find_lora(str(tmp_path / f"{name}.safetensors")))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no layer of the UNet ends so"):
        add_lora(make_inpainter(bundle, False), LoraShape(rank=1, alpha=1, targets=("to_x",)), 0)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("adapters", [False, True])
def test_all_that_learns_gets_a_gradient_through_the_network_alone(family, adapters, narrow):
    # Where one got none, the averaging of gradients between processes would wait for it for ever.
    bundle = load_bundle(str(narrow(family, in_channels=9)), inpainting=True)
    network = make_inpainter(bundle, learns_text=True)
    if adapters:
        add_lora(network, SHAPE, seed=0)
    objective = TuneObjective(bundle, HOLE_SPEC, learns_text=True)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = objective.predict(network, noisy, torch.tensor([500, 20]), make_batch())
    torch.testing.assert_close(own, predict(bundle), rtol=0, atol=1e-5)
    objective(network, make_batch(), step_rng(0, 0, 0)).mean().backward()
    assert all(p.grad is not None for p in network.learned().values())
    frozen = [p for p in network.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in [*frozen, *bundle.vae.parameters()])

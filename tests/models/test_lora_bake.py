"""LoRAs baked in are what PEFT and diffusers merge; LoRAs that don't fit are refused."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from controlfill.errors import UserError
from controlfill.files import read_header
from controlfill.models.bundle import load_bundle
from controlfill.models.convert import convert
from controlfill.models.inpainter import TunedHeader
from controlfill.models.layout_text import full_name
from controlfill.models.lora import find_lora, fuse_lora
from controlfill.models.lora_names import to_kohya
from controlfill.models.merge import merge
from controlfill.models.merge_sources import RECIPE_KEY
from controlfill.models.weights import open_weights, write_weights
from controlfill.options import ConvertOptions, MergeOptions

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
# Linear layers, a convolution of 1 x 1 and of 3 x 3 with and without stride, the time embedding.
LAYERS = ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv",
          "time_emb_proj", "linear_1"]  # fmt: skip


def bake(base, *loras, out, **options):
    options.setdefault("lora_scales", (1.0,) * len(loras))
    merge(MergeOptions(models=(str(base),), method="lora", loras=loras, out=out, **options))
    return out


def add_adapter(network, config, seed):
    """An adapter whose matrices are both random: fresh ones do nothing."""
    torch.manual_seed(seed)
    network.add_adapter(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def fused(network):
    """The weights of a network after its adapter is merged into them by PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return plain_state(network)


def plain_state(network):
    """The weights of a network under their names without an adapter."""
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in network.state_dict().items()
        if "lora_" not in name
    }


def close(found, wanted):
    assert found.keys() <= wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def trained(narrow, tmp_path_factory):
    """A LoRA for UNet and text encoder written by diffusers, and the weights that PEFT merges."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("lora")
    pipe = StableDiffusionPipeline.from_pretrained(narrow("sd15"))
    unet = LoraConfig(
        r=3, lora_alpha=5, target_modules=LAYERS, rank_pattern={"conv1": 2},
        alpha_pattern={"conv1": 7},
    )  # fmt: skip
    text = LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "fc1"])
    add_adapter(pipe.unet, unet, 1)
    add_adapter(pipe.text_encoder, text, 2)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=unet.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    return folder, fused(pipe.unet), fused(pipe.text_encoder)


def test_diffusers_loras_are_merged_as_peft_does(narrow, trained, tmp_path):
    folder, unet, text = trained
    out = bake(narrow("sd15"), folder, out=tmp_path / "out")
    close(load_file(out / UNET_FILE), unet)
    close(load_file(out / "text_encoder" / "model.safetensors"), text)
    vae = "vae/diffusion_pytorch_model.safetensors"
    own = load_file(narrow("sd15") / vae)
    assert all(torch.equal(own[name], t) for name, t in load_file(out / vae).items())


def test_kohya_loras_are_merged_the_same(narrow, trained, tmp_path):
    folder, unet, text = trained
    with open_weights(folder) as weights:
        state = {name: weights[name] for name in weights.names}
        kohya = to_kohya(state, weights.metadata)
    assert "lora_unet_conv_in.alpha" not in kohya
    assert any(name.startswith("lora_te_") for name in kohya)
    save_file(kohya, tmp_path / "kohya.safetensors")
    out = bake(narrow("sd15"), tmp_path / "kohya.safetensors", out=tmp_path / "out")
    close(load_file(out / UNET_FILE), unet)
    close(load_file(out / "text_encoder" / "model.safetensors"), text)


def test_a_peft_folder_is_read_with_its_config(narrow, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(narrow("sd15") / "unet")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_k"], use_rslora=True)
    add_adapter(unet, config, 3)
    state = get_peft_model_state_dict(unet)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {f"base_model.model.{k}": v for k, v in state.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config.to_dict(), default=list))
    out = bake(narrow("sd15") / "unet", folder, out=tmp_path / "out")
    close(load_file(out / "diffusion_pytorch_model.safetensors"), fused(unet))


def test_old_loras_of_diffusers_are_read_wherever_a_lora_is(narrow, tmp_path):
    """Names of attention processors in a pickle: baked in, put into a base, and converted."""
    base, file = narrow("sd15"), tmp_path / "pytorch_lora_weights.bin"
    bundle = load_bundle(str(base))
    state = {
        f"unet.{name.removesuffix('.0.weight').removesuffix('.weight')}_lora.{way}.weight".replace(
            ".to_", ".processor.to_"
        ): 0.1 * torch.randn((2, w.shape[1]) if way == "down" else (w.shape[0], 2))
        for name, w in bundle.unet.state_dict().items()
        if name.endswith((".to_q.weight", ".to_out.0.weight")) for way in ("down", "up")
    }  # fmt: skip
    assert (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"
        in state
    )
    torch.save(state, file)
    theirs = UNet2DConditionModel.from_pretrained(base / "unet")
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(dict(state), None, theirs)
    wanted = fused(theirs)
    close(load_file(bake(base, file, out=tmp_path / "out") / UNET_FILE), wanted)
    fuse_lora(bundle, *find_lora(str(tmp_path)))
    close(bundle.unet.state_dict(), wanted)
    kohya = tmp_path / "kohya.safetensors"
    convert(ConvertOptions(source=file, out=kohya))
    assert len(load_file(kohya)) == 3 * len(state) // 2


def test_several_loras_add_up_with_their_scales(narrow, trained, tmp_path):
    folder, unet, _ = trained
    file = folder / "pytorch_lora_weights.safetensors"
    base = load_file(narrow("sd15") / UNET_FILE)
    out = bake(narrow("sd15"), file, file, lora_scales=(1.0, -0.5), out=tmp_path / "out")
    wanted = {name: base[name] + 0.5 * (unet[name] - base[name]) for name in base}
    close(load_file(out / UNET_FILE), wanted)
    none = bake(narrow("sd15"), file, lora_scales=(0.0,), out=tmp_path / "none", dtype="fp16")
    for name, tensor in load_file(none / UNET_FILE).items():
        assert torch.equal(tensor, base[name].half())


def test_the_header_names_the_loras(narrow, trained, tmp_path):
    file = trained[0] / "pytorch_lora_weights.safetensors"
    out = bake(narrow("sd15"), file, lora_scales=(0.7,), out=tmp_path / "out")
    told = json.loads(read_header(out / UNET_FILE)[RECIPE_KEY])
    assert told["method"] == "lora"
    assert (told["loras"][0]["name"], told["loras"][0]["scale"]) == (file.name, 0.7)
    assert len(told["loras"][0]["sha256"]) == 64
    assert set(told["models"][0]["sha256"]) == {"unet", "vae", "text_encoder"}


def test_diffusers_fuses_the_same_into_sdxl(narrow, tmp_path):
    from diffusers import StableDiffusionXLInpaintPipeline

    base = narrow("sdxl", in_channels=9)
    state = {}
    for network, ends in (("unet", ("to_v", "conv2", "conv_in")), ("text_encoder_2", ("v_proj",))):
        (file,) = (base / network).glob("*.safetensors")
        for name, tensor in load_file(file).items():
            if name.removesuffix(".weight").endswith(ends):
                stem = name if network == "unet" else full_name(name)
                stem, (out, into, *kernel) = stem.removesuffix(".weight"), tensor.shape
                down = torch.randn(2, into, *kernel), torch.randn(out, 2, *[1 for _ in kernel])
                state |= {
                    f"{network}.{stem}.lora_{side}.weight": 0.1 * matrix
                    for side, matrix in zip("AB", down, strict=True)
                }
    write(tmp_path / "peft.safetensors", state)
    write(tmp_path / "kohya.safetensors", to_kohya(state))
    assert "lora_unet_input_blocks_0_0.alpha" in to_kohya(state)
    pipe = StableDiffusionXLInpaintPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "peft.safetensors")
    pipe.fuse_lora()
    for kind in ("peft", "kohya"):
        out = bake(base, tmp_path / f"{kind}.safetensors", out=tmp_path / kind)
        close(load_file(out / UNET_FILE), plain_state(pipe.unet))
        words = load_file(out / "text_encoder_2" / "model.safetensors")
        close(words, plain_state(pipe.text_encoder_2))


def write(file, state):
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_weights(file, shapes, state.items(), {})
    return file


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.zeros(2, 32), f"{Q}.lora_B.weight": torch.zeros(32, 2)}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({f"{Q}.lora_A.weight": torch.zeros(2, 32)}, "has no other matrix of its rank 2 beside it"),
        ({Q.replace("to_q", "to_x") + k[len(Q) :]: v for k, v in PAIR.items()},
         "was made for another base: .*sd15.* has no unet.mid_block.*to_x"),
        ({k: torch.zeros(2, 24) if "_A" in k else v for k, v in PAIR.items()},
         "was made for another base: its unet.mid_block.*to_q is 32x24, that of .* 32x32"),
        ({k: torch.zeros(64, 2) if "_B" in k else v for k, v in PAIR.items()}, "is 64x32, that of"),
        (PAIR | {"text_encoder_2.text_projection.lora_A.weight": torch.zeros(2, 32),
                 "text_encoder_2.text_projection.lora_B.weight": torch.zeros(32, 2)},
         "changes the text_encoder_2 too, which .* has not"),
        (PAIR | {f"{Q}.lora_B.bias": torch.zeros(32)}, "lora_B.bias is no part of a plain LoRA"),
        (PAIR | {f"{Q}.lora_magnitude_vector": torch.zeros(32)}, "magnitude_vector belongs to no"),
        ({"conv_in.weight": torch.zeros(1)}, "no LoRA is found"),
        ({k: v * float("nan") for k, v in PAIR.items()}, "lora_[AB].weight holds NaN"),
    ],
)  # fmt: skip
def test_loras_that_do_not_fit_are_refused(narrow, tmp_path, state, words):
    file = write(tmp_path / "l.safetensors", state)
    with pytest.raises(UserError, match=words) as caught:
        bake(narrow("sd15"), file, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["l.safetensors"]


def test_what_a_lora_says_of_its_base_is_heeded(narrow, tmp_path):
    about = {"base": "x", "base_family": "sd-32", "prediction_type": "epsilon"}
    file, unet = tmp_path / "l.safetensors", narrow("sd15") / "unet"
    for change in ({"base_family": "sdxl-32"}, {"prediction_type": "v_prediction"}, {}):
        save_file(PAIR, file, TunedHeader(**about | change).as_metadata())
        if change:
            with pytest.raises(UserError, match=r"was trained on a .* base, but .* is sd-32 epsil"):
                bake(narrow("sd15"), file, out=tmp_path / "out")
    bake(unet, file, out=tmp_path / "out")


def test_no_lora_goes_into_a_controlnet(tmp_path):
    names = ("zero_convs.0.0.weight", "time_embed.0.weight")
    control = write(tmp_path / "c.safetensors", {name: torch.zeros(2, 2, 1, 1) for name in names})
    lora = write(tmp_path / "l.safetensors", PAIR)
    with pytest.raises(UserError, match="is a ControlNet, into which no LoRA goes"):
        bake(control, lora, out=tmp_path / "out.safetensors")


def test_scales_and_loras_are_as_many(narrow, tmp_path):
    file = write(tmp_path / "l.safetensors", PAIR)
    for loras, scales in (((), ()), ((file,), (1.0, 2.0))):
        with pytest.raises(UserError, match="give at least one file, and a number for each"):
            bake(narrow("sd15"), *loras, lora_scales=scales, out=tmp_path / "out")

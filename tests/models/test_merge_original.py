"""Files in the original layout are merged as the folders that hold the same are."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlfill.models.convert import convert
from controlfill.models.formats import open_model
from controlfill.models.layout_text import full_name
from controlfill.models.merge import merge
from controlfill.options import ConvertOptions, MergeOptions


@pytest.fixture(scope="module")
def single(narrow, tmp_path_factory):
    """Narrow bases as single files: `single("sd2")`."""
    folder, made = tmp_path_factory.mktemp("single"), {}

    def make(family, channels=4):
        if (family, channels) not in made:
            out = folder / f"{family}-{channels}.safetensors"
            convert(ConvertOptions(source=narrow(family, in_channels=channels), out=out))
            made[family, channels] = out
        return str(made[family, channels])

    return make


def same_models(file, folder, parts):
    """Whether a file and a folder hold the same networks."""
    one, other = open_model(file), open_model(folder)
    for part in parts:
        mine, wanted = one.state(part), other.state(part)
        assert mine.keys() == wanted.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)
    assert one.configs["unet"]["in_channels"] == other.configs["unet"]["in_channels"]


def test_a_plain_file_becomes_an_inpaint_file(narrow, single, tmp_path):
    folders = [str(narrow("sd15", in_channels=n)) for n in (4, 9, 4)]
    files = [single("sd15", n) for n in (4, 9, 4)]
    options = {"alpha": 0.8, "block_alphas": ",".join(f"0.{n:02}" for n in range(26))}
    for models, out in ((folders, "folder"), (files, "file.safetensors")):
        merge(MergeOptions(models=tuple(models), out=tmp_path / out, **options))
    same_models(tmp_path / "file.safetensors", tmp_path / "folder", ("unet", "vae", "text_encoder"))
    assert open_model(tmp_path / "file.safetensors").configs["unet"]["in_channels"] == 9


def random_lora(folder, ends):
    """A LoRA for the layers of a base whose names end so, under PEFT's names."""
    torch.manual_seed(0)
    state = {}
    for network, tails in ends.items():
        (file,) = (folder / network).glob("*.safetensors")
        for name, tensor in load_file(file).items():
            stem = (name if network == "unet" else full_name(name)).removesuffix(".weight")
            if stem != name and stem.endswith(tails) and tensor.ndim > 1:
                out, into, *kernel = tensor.shape
                down, up = torch.randn(2, into, *kernel), torch.randn(out, 2, *[1] * len(kernel))
                state[f"{network}.{stem}.lora_A.weight"] = 0.1 * down
                state[f"{network}.{stem}.lora_B.weight"] = 0.1 * up
    return state


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_loras_go_into_files(narrow, single, tmp_path, family):
    texts = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    ends = {"unet": ("to_q", "conv2", "proj_in", "conv_in", "downsamplers.0.conv")}
    ends |= dict.fromkeys(texts, ("k_proj", "v_proj", "fc1"))
    lora = tmp_path / "lora.safetensors"
    state = random_lora(narrow(family), ends)
    assert {name.partition(".")[0] for name in state} == {"unet", *texts}
    save_file(state, lora)
    for model, out in ((str(narrow(family)), "folder"), (single(family), "file.safetensors")):
        merge(MergeOptions(models=(model,), method="lora", loras=(lora,), out=tmp_path / out))
    same_models(tmp_path / "file.safetensors", tmp_path / "folder", ("unet", "vae", *texts))


def test_loras_come_out_of_files(single, tmp_path, narrow):
    from narrow import make_base

    tuned = make_base("sd2", tmp_path / "tuned", seed=3)
    file = tmp_path / "tuned.safetensors"
    convert(ConvertOptions(source=tuned, out=file))
    options = {"method": "extract_lora", "rank": 4, "parts": ("unet", "text_encoder")}
    for models, out in (
        ((str(tuned), str(narrow("sd2"))), "a.safetensors"),
        ((str(file), single("sd2")), "b.safetensors"),
    ):
        merge(MergeOptions(models=models, out=tmp_path / out, **options))
    one, other = (load_file(tmp_path / f"{letter}.safetensors") for letter in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

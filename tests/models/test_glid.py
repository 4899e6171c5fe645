"""UNets alone: split from checkpoints, joined again, put on a base; else refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlfill.errors import UserError
from controlfill.models import glid
from controlfill.models.bundle import load_bundle
from controlfill.models.configs import SPEC_KEY
from controlfill.models.convert import convert
from controlfill.models.formats import open_model
from controlfill.models.headers import CONFIGS_KEY, ZEROS
from controlfill.models.layout import InMemory
from controlfill.models.recognise import UNET
from controlfill.models.weights import open_weights
from controlfill.options import ConvertOptions


@pytest.fixture(scope="module")
def alone(narrow, tmp_path_factory):
    """The 8-channel UNet of the narrow SD 1.5 as glid-3-xl-stable would have it."""
    file = tmp_path_factory.mktemp("glid") / "inpaint.safetensors"
    assert glid.split(narrow("sd15", in_channels=8), file) == len(load_file(file))
    return file


@pytest.fixture(scope="module")
def whole(alone, tmp_path_factory):
    """A whole checkpoint around it: other parts, and an average of the UNet."""
    unet = load_file(alone)
    parts = {f"{UNET}{name}": tensor for name, tensor in unet.items()}
    parts |= {f"first_stage_model.x{i}.weight": torch.randn(3, 2) for i in range(3)}
    parts |= {"cond_stage_model.y": torch.arange(4), "model_ema.diffusion_modelout": torch.ones(1)}
    file = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file(parts, file, metadata={"format": "pt", "modelspec.title": "mine"})
    return file


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_split_has_the_names_of_stable_diffusion_without_a_prefix(narrow, tmp_path, family):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    base = narrow(family, in_channels=8)
    glid.split(base, tmp_path / "unet.safetensors")
    found = load_file(tmp_path / "unet.safetensors")
    assert found["input_blocks.0.0.weight"].shape[1] == 8
    assert not any(name.startswith("model.") for name in found)
    own = load_bundle(str(base), inpainting=True).unet
    # diffusers' own reader of the original layout takes the prefix off itself.
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}
    theirs = convert_ldm_unet_checkpoint(prefixed, config=dict(own.config))
    assert same(theirs, own.state_dict())
    said = open_weights(tmp_path / "unet.safetensors").metadata[SPEC_KEY]
    assert said == ("v" if family == "sd2" else "epsilon")  # as the folder's scheduler


def test_split_and_join_give_the_checkpoint_back_bit_by_bit(whole, alone, tmp_path):
    assert glid.split(whole, tmp_path / "unet.safetensors") == len(load_file(alone))
    assert same(load_file(tmp_path / "unet.safetensors"), load_file(alone))
    other = {name: tensor + 1 for name, tensor in load_file(alone).items()}
    save_file(other, tmp_path / "other.safetensors")
    glid.join(whole, tmp_path / "other.safetensors", tmp_path / "other-whole.safetensors")
    assert not same(load_file(tmp_path / "other-whole.safetensors"), load_file(whole))
    back = tmp_path / "back.safetensors"
    glid.join(tmp_path / "other-whole.safetensors", tmp_path / "unet.safetensors", back)
    before = load_file(whole)
    del before["model_ema.diffusion_modelout"]  # it is the average of another UNet now
    assert same(load_file(back), before)
    with open_weights(back) as weights:
        about = dict(weights.metadata)
    assert json.loads(about.pop("controlfill_configs")).keys() == {"pipeline"}
    assert about == {"format": "pt", "modelspec.title": "mine"}


def test_predictions_are_told_and_compared(narrow, whole, alone, tmp_path):
    marked, unet, out = (tmp_path / f"{name}.safetensors" for name in ("marked", "unet", "out"))
    save_file(load_file(whole) | {"v_pred": torch.zeros(0)}, marked)
    glid.split(marked, unet)
    assert open_weights(unet).metadata[SPEC_KEY] == "v"
    assert "v_pred" not in open_weights(unet)
    for base, where in ((whole, out), (narrow("sd15"), tmp_path / "out")):
        for new in (unet, marked):
            with pytest.raises(UserError, match=r"predicts epsilon, .* v_prediction; .* noise"):
                glid.join(base, new, where)
        assert not where.exists()
    with pytest.raises(UserError, match=r"predicts v_prediction, .* epsilon; "):
        glid.join(marked, alone, out)
    glid.join(marked, unet, out)
    assert "v_pred" in open_weights(out)
    # What says nothing is made to say nothing, and fits everywhere.
    glid.split(whole, tmp_path / "untold.safetensors")
    assert SPEC_KEY not in open_weights(tmp_path / "untold.safetensors").metadata
    glid.join(marked, tmp_path / "untold.safetensors", tmp_path / "joined.safetensors")


def test_halves_stay_halves_and_pickles_are_read(alone, tmp_path):
    half = {name: tensor.half() for name, tensor in load_file(alone).items()}
    torch.save({f"{UNET}{n}": t for n, t in half.items()}, tmp_path / "model.ckpt")
    glid.split(tmp_path / "model.ckpt", tmp_path / "unet.safetensors")
    assert same(load_file(tmp_path / "unet.safetensors"), half)


def test_a_folder_takes_another_unet(narrow, alone, tmp_path):
    plain, inpainting = narrow("sd15"), narrow("sd15", in_channels=8)
    glid.join(plain, alone, tmp_path / "joined")
    joined = load_bundle(str(tmp_path / "joined"), inpainting=True)
    assert joined.is_glid
    assert joined.sees_masks
    assert same(
        joined.unet.state_dict(),
        load_bundle(str(inpainting), inpainting=True).unet.state_dict(),
    )
    assert same(joined.vae.state_dict(), load_bundle(str(plain)).vae.state_dict())
    # What a folder gave comes out of it again, and goes back from its own files too.
    glid.split(tmp_path / "joined", tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), load_file(alone))
    glid.join(plain, tmp_path / "joined", tmp_path / "twice")
    twice = load_bundle(str(tmp_path / "twice"), inpainting=True)
    assert same(twice.unet.state_dict(), joined.unet.state_dict())
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        glid.join(plain, alone, tmp_path / "twice")


@pytest.mark.parametrize("form", ["alone", "whole", "folder"])
def test_a_base_takes_another_unet(narrow, alone, whole, form):
    inpainting = narrow("sd15", in_channels=8)
    file = {"alone": alone, "whole": whole, "folder": inpainting}[form]
    bundle = load_bundle(str(narrow("sd15")), inpainting=True, unet=file)
    own = load_bundle(str(inpainting), inpainting=True)
    assert same(bundle.unet.state_dict(), own.unet.state_dict())
    assert bundle.unet.config["in_channels"] == 8
    parameters = list(bundle.unet.parameters())
    assert not any(p.requires_grad or p.is_meta for p in parameters)
    assert not bundle.unet.training


def test_what_does_not_fit_is_refused_in_one_line(narrow, alone, whole, tmp_path):
    with pytest.raises(UserError, match=r"another family than .*sdxl: it listens to text 32 wide"):
        load_bundle(str(narrow("sdxl")), inpainting=True, unet=alone)
    state = load_file(alone)
    for name, change, words in [
        ("cut", lambda s: s.pop("out.2.bias"), r"lacks 1 of \d+ tensors, such as .*out"),
        ("more", lambda s: s.update(extra=torch.ones(1)), "has extra, which its architecture"),
        ("wide", lambda s: s.update({"out.0.bias": torch.ones(3)}), r"has the shape \(3,\)"),
    ]:
        broken = dict(state)
        change(broken)
        save_file(broken, tmp_path / f"{name}.safetensors")
        for use in (
            lambda file: load_bundle(str(narrow("sd15")), inpainting=True, unet=file),
            lambda file: glid.join(whole, file, tmp_path / "never.safetensors"),
        ):
            with pytest.raises(UserError, match=words) as caught:
                use(tmp_path / f"{name}.safetensors")
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "never.safetensors").exists()


def test_what_holds_no_unet_is_refused(narrow, alone, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds no UNet of Stable Diffusion"):
        glid.split(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="is no whole checkpoint: it lacks model.diffusion_model"):
        glid.join(alone, alone, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"is no \.safetensors file"):
        glid.split(alone, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="takes 8 channels; a ControlNet is trained on a plain"):
        load_bundle(str(narrow("sd15")), unet=alone)
    with pytest.raises(UserError, match="does not exist"):
        load_bundle(str(narrow("sd15")), unet=tmp_path / "nowhere.safetensors")


def test_counts_that_nobody_trained_are_refused(narrow, alone, tmp_path):
    state = load_file(alone)
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:, :5].clone()
    save_file(state, tmp_path / "five.safetensors")
    with pytest.raises(UserError, match="takes 5 channels; 4, 8 or 9 are known here"):
        load_bundle(str(narrow("sd15")), inpainting=True, unet=tmp_path / "five.safetensors")


def test_other_networks_of_eight_channels_are_refused(narrow, alone, tmp_path):
    folder = tmp_path / "instruct"
    shutil.copytree(narrow("sd15", in_channels=8), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionInstructPix2PixPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "unet.safetensors"
    about = {CONFIGS_KEY: json.dumps({"pipeline": {"_class_name": index["_class_name"]}})}
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(state, file, metadata=about)
    plain = str(narrow("sd15"))
    for base, unet in ((folder, None), *((plain, u) for u in (folder, folder / "unet", file))):
        with pytest.raises(UserError, match="InstructPix2PixPipeline, whose UNet of 8"):
            load_bundle(str(base), inpainting=True, unet=unet)
    # One of glid-3-xl-stable that is joined into it makes it another pipeline.
    glid.join(folder, alone, tmp_path / "joined")
    index = json.loads((tmp_path / "joined" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    turbo = InMemory({"conditioner.embedders.0.model.x": torch.ones(1)})
    told = json.loads(glid.with_pipeline({}, turbo, 8)[CONFIGS_KEY])
    assert told["pipeline"]["_class_name"] == "StableDiffusionPipeline"
    joined = {CONFIGS_KEY: json.dumps({"pipeline": {"_class_name": "x", ZEROS: False}})}
    assert json.loads(glid.with_channels(joined, 4)[CONFIGS_KEY]) == {"pipeline": {ZEROS: False}}


def test_what_is_there_is_not_lost(whole, alone, tmp_path):
    for source in (whole, alone):
        shutil.copyfile(source, tmp_path / source.name)
    mine, unet = tmp_path / whole.name, tmp_path / alone.name
    before = mine.read_bytes(), unet.read_bytes()
    for act in (
        lambda: glid.split(mine, mine), lambda: glid.split(mine, unet),
        lambda: glid.join(mine, unet, mine), lambda: glid.join(mine, unet, unet),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"exists already; name a new file") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert (mine.read_bytes(), unet.read_bytes()) == before


def test_configs_tell_the_channels_of_the_joined_unet(narrow, alone, tmp_path):
    base, out = tmp_path / "base.safetensors", tmp_path / "joined.safetensors"
    convert(ConvertOptions(source=narrow("sd15"), out=base))
    glid.join(base, alone, out)
    joined = open_model(out)
    assert joined.configs["unet"]["in_channels"] == 8
    assert same(joined.state("vae"), open_model(base).state("vae"))
    plain = tmp_path / "plain"
    glid.join(narrow("sd15"), narrow("sd15", in_channels=9), plain)
    index = json.loads((plain / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"

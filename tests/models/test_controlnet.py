"""ControlNets are saved with a header, load from anywhere, and refuse what does not fit."""

import pickle
from pathlib import Path
from shutil import copytree

import pytest
import torch

from controlfill.data.hints import HINTS
from controlfill.errors import UserError
from controlfill.models import controlnet as module
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import Header

HEADER = Header(
    conditioning="masked-image/1", base="embedded", base_family="embedded",
    prediction_type="v_prediction", step=7,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "final_model"
    folder.mkdir()
    network = module.make_controlnet(pipe.bundle, 3)
    module.save_controlnet(network, folder, HEADER, names=(module.WEIGHTS, module.SINGLE))
    return folder, network


def test_a_new_controlnet_copies_the_encoder_and_says_nothing_yet(pipe):
    network = module.make_controlnet(pipe.bundle, 3)
    assert torch.equal(network.conv_in.weight, pipe.bundle.unet.conv_in.weight)
    assert all((block.weight == 0).all() for block in network.controlnet_down_blocks)
    assert (network.controlnet_mid_block.weight == 0).all()


@pytest.mark.parametrize("name", sorted(HINTS))
def test_hints_meet_latents_at_their_size(name, pipe, narrow_base):
    spec = HINTS[name]
    for bundle in (pipe.bundle, load_bundle(str(narrow_base))):
        network = module.make_controlnet(bundle, spec.channels, at_latent_size=spec.at_latent_size)
        side = 64 // (bundle.factor if spec.at_latent_size else 1)
        cells = network.controlnet_cond_embedding(torch.zeros(1, spec.channels, side, side))
        assert cells.shape[-1] == 64 // bundle.factor


def test_diffusers_opens_what_we_save(saved):
    from diffusers import ControlNetModel

    folder, network = saved
    theirs = ControlNetModel.from_pretrained(folder)
    for name, tensor in network.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)


def test_headers_come_back(saved):
    folder, _ = saved
    for file in (folder / "controlnet.safetensors", module.find_controlnet(str(folder))):
        assert module.read_control_header(file) == HEADER


@pytest.mark.parametrize("how", ["folder", "single", "run", "half", "bin", "foreign", "pth"])
def test_weights_load_from_everywhere(how, saved, pipe, tmp_path):
    folder, network = saved
    where = {"folder": folder, "single": folder / "controlnet.safetensors", "run": folder.parent}
    if how in ("foreign", "pth"):
        from safetensors.torch import save_file

        where[how] = tmp_path / f"x.{'pth' if how == 'pth' else 'safetensors'}"
        save = torch.save if how == "pth" else save_file
        save(network.state_dict(), where[how])
        assert module.read_control_header(where[how]) is None
    if how in ("half", "bin"):
        where[how] = copytree(folder, tmp_path / "controlnet")
        (tmp_path / "controlnet" / module.SINGLE).unlink()
        file = tmp_path / "controlnet" / module.WEIGHTS
        if how == "half":
            file.rename(file.with_suffix(".fp16.safetensors"))
        else:
            torch.save(network.state_dict(), file.with_suffix(".bin"))
            file.unlink()
    loaded = module.load_controlnet(module.find_controlnet(str(where[how])), pipe.bundle, 3)
    assert torch.equal(loaded.conv_in.weight, network.conv_in.weight)
    assert loaded.controlnet_cond_embedding.conv_in.weight.shape[1] == 3


def test_a_run_gives_its_newest_checkpoint(saved, tmp_path):
    for step in (5, 40, 300):
        copytree(saved[0], tmp_path / f"checkpoint-{step}")
    copytree(saved[0], tmp_path / "checkpoint-301-old")
    assert module.find_controlnet(str(tmp_path)).parent.name == "checkpoint-300"


def test_headers_of_other_versions_are_read_and_damaged_ones_named(saved, tmp_path):
    import json

    from safetensors.torch import save_file

    about = {**json.loads(json.dumps(HEADER.__dict__)), "new_field": 1}
    for text, good in (
        (json.dumps(about), True),
        ("[1]", False),
        ("{", False),
        ('{"a": 1}', False),
    ):
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"controlfill": text})
        if good:
            assert module.read_control_header(tmp_path / "x.safetensors") == HEADER
        else:
            with pytest.raises(UserError, match="damaged header"):
                module.read_control_header(tmp_path / "x.safetensors")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_that_are_no_state_dict_run_nothing(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bomb.pth").write_bytes(pickle.dumps({"x": Bomb()}))
    torch.save({"epoch": 3}, "other.pth")
    Path("text.pth").write_text("no pickle")
    for name in ("bomb.pth", "other.pth", "text.pth"):
        with pytest.raises(UserError, match="is no state dict of plain tensors") as caught:
            module.load_controlnet(Path(name), pipe.bundle, 3)
        assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


def test_what_does_not_fit_is_refused(saved, pipe, narrow_base, tmp_path):
    folder, _ = saved
    file = module.find_controlnet(str(folder))
    with pytest.raises(UserError, match="takes hints of 3 channels, but its conditioning makes 4"):
        module.load_controlnet(file, pipe.bundle, 4)
    with pytest.raises(UserError, match="text width 128"):
        module.load_controlnet(file, load_bundle(str(narrow_base)), 3)
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="are no ControlNet for this base"):
        module.load_controlnet(tmp_path / "x.pth", pipe.bundle, 3)
    whole = (folder / "controlnet.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="broken safetensors"):
        module.load_controlnet(tmp_path / "cut.safetensors", pipe.bundle, 3)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        module.find_controlnet(str(tmp_path / "none"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        UserError, match=r"holds no ControlNet: .* it holds notes\.txt; name the"
    ) as e:
        module.find_controlnet(str(tmp_path))
    assert "\n" not in str(e.value)

"""Loading asks the weights what they are, and never guesses."""

import pytest
import torch

import controlfill
from controlfill.errors import UserError
from controlfill.inference.pipeline import load, pick_device
from controlfill.models.controlnet import Header, make_controlnet, save_controlnet


def save(bundle, folder, **changes):
    about = {
        "conditioning": "masked-image/1", "base": bundle.name, "base_family": bundle.family,
        "prediction_type": bundle.prediction_type,
    }  # fmt: skip
    folder.mkdir()
    save_controlnet(make_controlnet(bundle, 3), folder, Header(**{**about, **changes}))
    return str(folder)


def test_the_base_comes_from_the_header(pipe, tmp_path):
    loaded = load(control=save(pipe.bundle, tmp_path / "c"))
    assert loaded.bundle.name == "embedded"
    assert loaded.spec.name == "masked-image"
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_the_public_door_is_the_same():
    assert controlfill.load is load
    with pytest.raises(AttributeError, match="controlfill has no 'lod'"):
        _ = controlfill.lod


def test_the_python_way_in_is_the_command(pipe, photo, hole):
    from controlfill.inference.complete import inpaint
    from controlfill.options import HoleOptions

    ours = pipe.inpaint(photo, hole, "a red star", seed=3, num_inference_steps=2)
    options = HoleOptions(prompt="a red star", seed=3, num_inference_steps=2)
    assert (ours.image == inpaint(pipe, photo, hole, options).image).all()
    with pytest.raises(InterruptedError):
        pipe.inpaint(photo, hole, num_inference_steps=2, progress=lambda *_: False)
    with pytest.raises(TypeError, match="sed"):
        pipe.inpaint(photo, hole, sed=3)


def test_another_conditioning_is_an_error(pipe, tmp_path):
    where = save(pipe.bundle, tmp_path / "c")
    with pytest.raises(UserError, match="was trained with conditioning masked-image/1"):
        load(control=where, conditioning="masked-image+mask")
    assert load(control=where, conditioning="masked-image").spec.name == "masked-image"
    newer = save(pipe.bundle, tmp_path / "d", conditioning="masked-image/2")
    with pytest.raises(UserError, match="want conditioning masked-image/2"):
        load(control=newer)


def test_another_kind_of_base_is_an_error(pipe, narrow_base, tmp_path):
    where = save(pipe.bundle, tmp_path / "c")
    with pytest.raises(UserError, match="was trained on a embedded v_prediction base"):
        load(str(narrow_base), where)


def test_foreign_weights_must_be_explained(pipe, tmp_path):
    make_controlnet(pipe.bundle, 3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not say what conditioning"):
        load("embedded", str(tmp_path))
    with pytest.raises(UserError, match="does not say what base"):
        load(control=str(tmp_path), conditioning="masked-image")
    assert load("embedded", str(tmp_path), conditioning="masked-image").network is not None


def test_a_base_needs_a_control(narrow_base):
    with pytest.raises(UserError, match="needs a --control"):
        load(str(narrow_base))


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"

"""CLIP sees and reads what transformers' own does, and is refused in one line where it is none."""

import json
import shutil

import pytest
import torch
from tiny_clip import make_clip

from controlfill.errors import UserError
from controlfill.models.clip import load_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


def test_directions_are_those_of_transformers(folder):
    from transformers import CLIPModel, CLIPTokenizer

    clip, theirs = load_clip(folder, CPU), CLIPModel.from_pretrained(folder)
    prompts = ["a red star", "cat " * 40]
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    rng = torch.Generator().manual_seed(0)
    pictures = torch.rand((3, 3, 16, 16), generator=rng)
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1])
    )
    with torch.no_grad():
        wanted = theirs(**tokens, pixel_values=(pictures - mean) / deviation)
    torch.testing.assert_close(clip.read(prompts), wanted.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.look(pictures), wanted.image_embeds, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in clip.network.parameters())


def test_pictures_are_resized_as_pillow_would(folder):
    import numpy as np
    from PIL import Image

    clip = load_clip(folder, CPU)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    theirs = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC))
    ours = clip.fit(tensor)[0].permute(1, 2, 0) * 255
    assert np.abs(ours.numpy() - theirs).max() <= 1
    assert torch.equal(clip.fit(tensor[..., :16, :16]), tensor[..., :16, :16])


def test_colours_come_from_any_of_its_files_or_are_the_usual(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "preprocessor_config.json").rename(copy / "kept.json")
    usual = load_clip(str(copy), CPU)
    assert usual.mean.flatten()[0] == pytest.approx(0.48145466)
    about = {"image_processor": json.loads((copy / "kept.json").read_text())}
    (copy / "processor_config.json").write_text(json.dumps(about))
    load_clip.cache_clear()
    assert load_clip(str(copy), CPU).mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_what_is_no_clip_is_refused(folder, narrow, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="is no folder; give one, or a hub id such as"):
        load_clip("./nowhere", CPU)
    with pytest.raises(UserError, match="could not be loaded: "):
        load_clip(str(tmp_path), CPU)
    with pytest.raises(UserError, match="is a clip_text_model; a whole CLIP"):
        load_clip(str(narrow("sd15") / "text_encoder"), CPU)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    from safetensors.torch import load_file, save_file

    state = load_file(cut / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights, such as visual_projection"):
        load_clip(str(cut), CPU)

"""The embedded base is a whole diffusers folder, small enough to ship."""

import json
import re

import pytest
import torch

from controlfill.data.worlds import WORLDS
from controlfill.models import embedded


@pytest.mark.parametrize("name", embedded.FOLDERS)
def test_all_weights_together_are_at_most_40_mb(name):
    weights = list(embedded.FOLDERS[name].rglob("*.safetensors"))
    assert len(weights) == 3 + (name in embedded.CONTROLS)
    assert sum(f.stat().st_size for f in weights) <= 40_000_000


@pytest.mark.parametrize("folder", embedded.FOLDERS.values(), ids=str)
def test_weights_are_half_precision(folder):
    from safetensors import safe_open

    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_tensor(name).dtype for name in list(weights.keys())[:20]}
        assert kinds <= {torch.float16, torch.int64}, file


def test_diffusers_own_pipeline_opens_it():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(embedded.FOLDERS["embedded"])
    assert pipeline.safety_checker is None
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    image = pipeline("red circle on plain white background", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_every_word_of_the_worlds_is_one_token():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(embedded.FOLDERS["embedded"] / "tokenizer")
    for world in WORLDS.values():
        for word in world.words():
            assert len(tokenizer(word).input_ids) == 3, word
    assert len(tokenizer("a Käfer 字 xyzzy!").input_ids) > 6


def test_every_word_of_a_skin_is_one_token():
    from transformers import CLIPTokenizer

    from controlfill.skins.themes import draw_theme

    tokenizer = CLIPTokenizer.from_pretrained(embedded.FOLDERS["embedded-skins"] / "tokenizer")
    for seed in range(50):
        words = draw_theme(seed).caption.split()
        assert len(tokenizer(" ".join(words)).input_ids) == len(words) + 2, words


def test_configs_name_no_folder_of_whoever_made_them():
    for folder in embedded.FOLDERS.values():
        for file in folder.rglob("*.json"):
            assert "_name_or_path" not in json.loads(file.read_text("utf-8")), file


def test_the_recipe_builds_what_is_shipped(tmp_path):
    shipped = json.loads((embedded.FOLDERS["embedded"] / "unet" / "config.json").read_text())
    built = dict(embedded.make_unet().config)
    for key, value in shipped.items():
        if not key.startswith("_"):
            assert json.loads(json.dumps(built[key])) == value, key
    tokenizer = embedded.make_tokenizer(WORLDS["shapes-full"].words(), tmp_path)
    vocabulary = embedded.FOLDERS["embedded"] / "tokenizer" / "vocab.json"
    shipped_words = json.loads(vocabulary.read_text("utf-8"))
    # Equally frequent pairs may be merged in either order, so only the size must agree.
    assert len(tokenizer) == len(shipped_words)
    assert all(len(tokenizer(w).input_ids) == 3 for w in WORLDS["shapes-full"].words())
    assert embedded.make_text_encoder(tokenizer).config.vocab_size == len(shipped_words)
    config = embedded.make_scheduler().config
    assert config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_no_part_names_the_machine_that_made_it(part):
    for file in (embedded.FOLDERS["embedded"] / part).glob("*.json"):
        if file.name not in ("vocab.json", "tokenizer.json"):
            assert not re.search(r'"(/\w+){2,}', file.read_text("utf-8")), file


def test_the_inpaint_sibling_fills_holes_alone_and_keeps_what_is_known():
    from benchmarks.merging import OLD, draw_holes, fill
    from controlfill.inference.pipeline import load

    pipeline = load("embedded-inpaint", device="cpu")
    assert pipeline.network is None
    assert pipeline.bundle.sees_masks
    holes = draw_holes(OLD.colours, 8)
    assert fill(pipeline, holes, 0)["colour"] >= 0.75
    picture, hole = holes[0]
    made = pipeline.inpaint(picture.image, hole, picture.truth.caption).image
    assert (made[hole == 0] == picture.image[hole == 0]).all()

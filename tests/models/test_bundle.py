"""Bases load from names, folders and ids, and refuse what they are not."""

import json
import logging
import shutil

import pytest
import torch

from controlfill.errors import UserError
from controlfill.models.bundle import current_name, find_base, is_half, load_bundle
from controlfill.models.convert import convert
from controlfill.models.text import Recent
from controlfill.options import ConvertOptions


def test_the_embedded_base(pipe):
    bundle = pipe.bundle
    assert bundle.family == "embedded"
    assert (bundle.factor, bundle.size_multiple) == (4, 16)
    assert bundle.prediction_type == "v_prediction"


def test_a_narrow_sd15_folder(narrow_base):
    bundle = load_bundle(str(narrow_base))
    assert (bundle.factor, bundle.size_multiple) == (8, 64)
    assert bundle.prediction_type == "epsilon"
    assert bundle.guidance_scale == 7.5
    for network in (bundle.vae, bundle.unet, bundle.text.encoder):
        assert not any(p.requires_grad for p in network.parameters())
        assert not network.training
        assert next(network.parameters()).dtype == torch.float32


def test_folders_with_only_half_precision_files_load(narrow_base, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(narrow_base, folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    whole, half = load_bundle(str(narrow_base)), load_bundle(str(folder))
    assert torch.equal(whole.unet.conv_in.weight, half.unet.conv_in.weight)


@pytest.mark.parametrize(
    ("names", "half"),
    [("w.safetensors w.fp16.safetensors", False), ("w.fp16.safetensors w.bin", True), ("", False),
     ("w.bin w.fp16.bin", False), ("w.fp16.bin", True), ("w.non_ema.safetensors w.fp16.bin", True),
     ("w.fp16-00001-of-00002.safetensors w.safetensors.index.fp16.json", True),
     ("w-00001-of-00002.safetensors w.fp16.safetensors", False)],
)  # fmt: skip
def test_half_precision_is_read_where_there_is_no_other(names, half, tmp_path):
    for name in names.split():
        (tmp_path / name).touch()
    assert is_half(tmp_path) == half


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-inpainting"])
def test_ids_that_left_the_hub_are_mapped_with_one_line(name, caplog):
    with caplog.at_level(logging.WARNING):
        assert current_name(f"runwayml/{name}") == f"stable-diffusion-v1-5/{name}"
    assert len(caplog.records) == 1
    assert current_name("org/other") == "org/other"
    assert find_base("org/other") == "org/other"


def test_hub_ids_go_to_the_loaders_by_their_new_name(monkeypatch):
    from diffusers import UNet2DConditionModel

    asked = []

    def refuse(where, **_):
        asked.append(where)
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr(UNet2DConditionModel, "load_config", refuse)
    with pytest.raises(UserError, match=r"could not be loaded: no connection$"):
        load_bundle("runwayml/stable-diffusion-v1-5")
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]


def test_what_is_no_base_is_refused(narrow_base, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        load_bundle("./nowhere")
    with pytest.raises(UserError, match="model_index.json is missing"):
        load_bundle(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="could not be loaded"):
        load_bundle(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"in_channels": 9}, "takes 9 channels"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 1280}, "refiner"),
    ],
)
def test_other_families_are_refused_before_their_weights_are_read(
    narrow_base, tmp_path, changed, words
):
    folder = tmp_path / "other"
    shutil.copytree(narrow_base, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=words):
        load_bundle(str(folder))


def test_encoding_and_decoding_agree_with_the_autoencoder(pipe):
    bundle = pipe.bundle
    image = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = bundle.vae.config.scaling_factor
    posterior = bundle.vae.encode(image).latent_dist
    torch.testing.assert_close(bundle.encode_image(image), posterior.mode() * scale)
    rng = torch.Generator().manual_seed(5)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    drawn = bundle.encode_image(image, rng)
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise) * scale)
    decoded = bundle.decode(posterior.mode() * scale)
    expected = (bundle.vae.decode(posterior.mode()).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected)


def test_long_prompts_are_cut_and_differ_from_empty_ones(pipe):
    text = pipe.bundle.text
    vectors = text.encode(["", "red circle", "red circle " * 200]).tokens
    assert vectors.shape == (3, 32, 128)
    assert not torch.allclose(vectors[0], vectors[1])


def test_encoders_that_want_padding_masked_get_it(pipe, monkeypatch):
    text = pipe.bundle.text
    plain = text.encode(["red circle"])
    monkeypatch.setattr(text.encoder.config, "use_attention_mask", True, raising=False)
    assert not torch.allclose(plain.tokens, text.encode_anew(["red circle"]).tokens)


def test_prompts_are_encoded_once(pipe, monkeypatch):
    text = load_bundle("embedded").text
    text.cache, calls = Recent(text, most=2), []
    whole = text.encoder.forward
    monkeypatch.setattr(text.encoder, "forward", lambda *a, **k: calls.append(1) or whole(*a, **k))
    first = text.encode(["a red star", ""])
    assert torch.equal(text.encode(["a red star", ""]).tokens, first.tokens)
    assert len(calls) == 1
    anew = pipe.bundle.text.encode_anew(["a red star", ""])
    assert torch.equal(first.tokens, anew.tokens)
    text.encode(["a"])
    text.encode(["b"])
    text.encode(["a red star", ""])  # forgotten by now
    assert len(calls) == 4


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_a_whole_checkpoint_in_one_file_is_a_base(family, narrow, tmp_path):
    folder = narrow(family)
    file = tmp_path / "whole.safetensors"
    convert(ConvertOptions(source=folder, out=file), lambda *_: None)
    for part in folder.glob("tokenizer*"):
        shutil.copytree(part, tmp_path / part.name)
    bundle, expected = load_bundle(str(file)), load_bundle(str(folder))
    assert (bundle.family, bundle.prediction_type) == (expected.family, expected.prediction_type)
    assert bundle.fingerprints() == expected.fingerprints()
    words, others = (b.text.encode(["a red cat", ""]) for b in (bundle, expected))
    assert torch.equal(words.tokens, others.tokens)
    for name, weight in expected.unet.state_dict().items():
        assert torch.equal(bundle.unet.state_dict()[name], weight)


def test_a_file_that_is_no_whole_checkpoint_is_refused(narrow):
    unet = narrow("sd15") / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_bundle(str(unet))


def test_a_base_without_its_tokenizer_is_refused(narrow, tmp_path):
    shutil.copytree(narrow("sd15"), tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        load_bundle(str(tmp_path / "base"))

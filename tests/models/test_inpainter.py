"""A base that learns itself: widened without a change, moved without a loss, a pipeline after."""

import diffusers
import pytest
import torch

from controlfill.errors import UserError
from controlfill.inference.pipeline import load
from controlfill.models.bundle import load_bundle
from controlfill.models.inpainter import (
    make_inpainter,
    save_pipeline,
    tuned_base,
    whole_weights,
    widen,
)


def predict(unet, channels=4):
    torch.manual_seed(0)
    noisy = torch.randn(1, 9, 8, 8)[:, :channels]
    words = torch.randn(1, 5, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return unet(noisy, 300, words, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_widened_unet_predicts_as_before_and_learns_to_see(family, narrow):
    unet = load_bundle(str(narrow(family))).unet
    before = predict(unet)
    widen(unet)
    assert unet.config.in_channels == 9
    torch.testing.assert_close(predict(unet, 9), before, rtol=0, atol=1e-6)
    unet.requires_grad_(True)
    words = torch.randn(1, 5, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
    unet(torch.randn(1, 9, 8, 8), 300, words, added_cond_kwargs=added).sample.sum().backward()
    assert unet.conv_in.weight.grad[:, 4:].abs().min() > 0


def test_weights_that_learn_keep_single_precision_when_the_base_is_moved(narrow):
    bundle = load_bundle(str(narrow("sd15", in_channels=9)), inpainting=True)
    network = make_inpainter(bundle, learns_text=False)
    before = bundle.unet.conv_in.weight.detach().clone()
    with whole_weights(bundle):
        bundle.to(torch.device("cpu"), torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in network.learned().values())
    assert torch.equal(bundle.unet.conv_in.weight, before)
    assert bundle.vae.dtype == bundle.text.encoder.dtype == torch.bfloat16


def test_what_sdxl_does_not_read_does_not_learn(narrow):
    bundle = load_bundle(str(narrow("sdxl", in_channels=9)), inpainting=True)
    network = make_inpainter(bundle, learns_text=True)
    words = bundle.text.read(["a red cat"], network.encoders)
    (words.tokens.sum() + words.pooled.sum()).backward()
    learned = network.learned()
    assert all(p.grad is not None for n, p in learned.items() if n.startswith("encoders."))
    assert any(n.startswith("encoders.0.") for n in learned)


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_a_tuned_base_is_a_pipeline_of_its_family(family, narrow, tmp_path):
    base = str(narrow(family))
    weights = {"unet.conv_out.bias": torch.full((4,), 7.0),
               "unet.conv_in.weight": torch.ones(16, 9, 3, 3)}  # fmt: skip
    save_pipeline(tuned_base(base, weights), tmp_path / "final")
    pipe = diffusers.AutoPipelineForInpainting.from_pretrained(tmp_path / "final")
    xl = "XL" if family == "sdxl" else ""
    assert type(pipe).__name__ == f"StableDiffusion{xl}InpaintPipeline"
    assert pipe.unet.conv_out.bias.tolist() == [7.0] * 4
    ours = load(str(tmp_path / "final"), device="cpu").bundle
    assert ours.sees_masks
    old = load_bundle(base)
    assert (ours.family, ours.prediction_type) == (old.family, old.prediction_type)
    assert torch.equal(ours.unet.conv_in.weight, weights["unet.conv_in.weight"])
    for mine, theirs in zip(ours.text.encoders, old.text.encoders, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
        )


def test_weights_of_another_base_are_refused(narrow):
    first, second = (
        make_inpainter(load_bundle(str(narrow(f, in_channels=9)), inpainting=True), False)
        for f in ("sd15", "sdxl")
    )
    with pytest.raises(UserError, match="was trained on another base"):
        first.take(second.learned())

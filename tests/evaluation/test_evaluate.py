"""What is claimed of the shipped pair is measured here again, on other pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from controlfill.evaluation.evaluate import OURS, evaluate
from controlfill.evaluation.report import write_report
from controlfill.options import EvaluateOptions

FAST = EvaluateOptions(num_samples=3, num_inference_steps=2, eval_batch_size=2)


def silent(*_):
    """Hear of progress and say nothing."""


@pytest.fixture(scope="module")
def measured(pipe):
    """The shipped pair on 96 held-out pictures, another seed than the figures in the docs."""
    return evaluate(pipe, EvaluateOptions(num_samples=96, seed=7), silent).summary()


def best_classical(methods, figure="hole_psnr"):
    return max(figures[figure] for name, figures in methods.items() if name != OURS)


def test_the_shipped_pair_beats_every_classical_fill(measured):
    figures = measured["figures"]
    assert figures["all"][OURS]["hole_psnr"] >= best_classical(figures["all"])
    patterned = figures["patterned"]
    assert patterned[OURS]["hole_psnr"] >= best_classical(patterned) + 4


def test_the_shipped_pair_never_changes_a_known_byte(measured):
    for methods in measured["figures"].values():
        assert methods[OURS]["known_max_error"] == 0


def test_wholly_masked_objects_come_back_in_the_right_colour(measured):
    assert measured["objects"]["pictures"] == 96
    assert measured["objects"]["colour"] >= 0.95


def test_wholly_masked_objects_come_back_in_the_right_shape_too(measured):
    assert measured["objects"]["colour_and_shape"] >= 0.85


def test_groups_progress_and_report(pipe, tmp_path):
    told = []
    result = evaluate(pipe, FAST, lambda *words: told.append(words))
    assert ("sampling", 3, 3) in told
    assert ("classical fills and scores", 3, 3) in told
    assert ("wholly masked objects", 3, 3) in told
    page = write_report(result, pipe.spec, tmp_path, "<p>extra words</p>")
    summary = json.loads((tmp_path / "report.json").read_text())
    assert set(summary["figures"]["all"]) == {OURS, "telea", "navier-stokes", "biharmonic"}
    assert summary["figures"]["all"][OURS]["pictures"] == 3
    assert summary["settings"]["guidance_scale"] == pipe.bundle.guidance_scale
    text = page.read_text("utf-8")
    assert "extra words" in text
    assert text.count("<img") == 3 * 8 + 3 * 5
    assert "known pixels, largest error" in text


def test_the_same_seed_measures_the_same(pipe):
    first, again, other = (
        evaluate(pipe, replace(FAST, seed=seed, objects=False), silent).summary()["figures"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_options_are_heard(pipe):
    plain = replace(FAST, objects=False, classical=())
    base = evaluate(pipe, plain, silent).summary()
    assert set(base["figures"]["all"]) == {OURS}
    assert base["objects"] == {}
    for change in (
        {"guidance_scale": 5.0}, {"num_inference_steps": 3}, {"scheduler": "ddpm"},
        {"mask_kinds": ("full",)}, {"mask_area": (0.4, 0.5)}, {"image_size": 80},
    ):  # fmt: skip
        changed = evaluate(pipe, replace(plain, **change), silent).summary()
        assert changed["figures"]["all"] != base["figures"]["all"], change


def test_own_pictures_are_measured_and_broken_ones_named(pipe, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        noise = rng.integers(0, 256, (70, 90, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_text("text")
    result = evaluate(pipe, replace(FAST, data=str(tmp_path)), silent)
    summary = result.summary()
    assert set(summary["figures"]) == {"all"}
    assert summary["objects"] == {}
    assert len(summary["skipped"]) == 1
    assert "c.png is not a picture" in summary["skipped"][0]
    assert "c.png" in write_report(result, pipe.spec, tmp_path / "r").read_text("utf-8")

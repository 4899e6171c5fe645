"""The benchmarks' own promises: exact counters, honest ratios, the peer's formula."""

import argparse
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, flops, infer, outpaint, stand_in, tiny
from benchmarks.gpu import infer_shapes
from benchmarks.guard import compare


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_base(folder / "base", width=32)
    return tiny.make_pairs(folder, count=2)


def test_pairs_are_the_same_pictures_in_both_layouts(inputs):
    ours = json.loads((inputs / "pairs/train.jsonl").read_text().splitlines()[1])
    theirs = json.loads((inputs / "imagefolder/metadata.jsonl").read_text().splitlines()[1])
    assert list(ours.values()) == list(theirs.values())
    first, second = (
        (inputs / layout / row[column]).read_bytes()
        for layout, row, column in (
            ("pairs", ours, "conditioning_image"),
            ("imagefolder", theirs, "conditioning_image_file_name"),
        )
    )
    assert first == second
    with Image.open(inputs / "pairs" / ours["image"]) as picture:
        assert picture.size == (640, 480)


def test_our_loss_and_gradient_are_those_of_the_stock_formula(inputs):
    found = compare(inputs / "base", inputs / "pairs", size=64, count=2)
    assert found["equal"]
    assert 0.5 < found["loss"] < 2


def test_nothing_frozen_learns_and_freezing_saves_memory():
    memory = flops.compare_bytes()
    assert flops.check({}, memory) == []
    assert flops.check({}, {**memory, "ratio": 1.0}) == [
        "freezing the UNet saves too little: 1.00x"
    ]


def test_a_step_that_does_more_work_is_noticed():
    fine = {"frozen": 1, "ratio": 1.4, "learners": {"unet": 0, "vae": 0, "control": 1}}
    assert flops.check({"step": flops.SD15_512["step"] * 1.005}, fine) == []
    (wrong,) = flops.check({"step": flops.SD15_512["step"] * 1.02}, fine)
    assert wrong.startswith("step: 3.463 TFLOP")


def test_the_stand_in_crops_and_scales_as_torchvision_does():
    pixels = np.zeros((480, 640, 3), np.uint8)
    pixels[:, 320:] = 255
    tensor = stand_in.stock_transform(256, normalize=True)(Image.fromarray(pixels))
    assert tensor.shape == (3, 256, 256)
    assert torch.equal(tensor[:, :, :126], -torch.ones(3, 256, 126))
    assert torch.equal(tensor[:, :, 130:], torch.ones(3, 256, 126))


def test_ratios_are_taken_within_a_round():
    assert common.ratio([2.0, 6.0, 3.0], [1.0, 2.0, 2.0]) == {
        "median": 2.0, "min": 1.5, "max": 3.0, "runs": 3,
    }  # fmt: skip


def test_results_name_machine_and_versions(tmp_path):
    common.report("name", {"speed": 2.0}, ["twice as fast"], tmp_path)
    page, result = sorted(tmp_path.iterdir(), key=lambda file: file.suffix, reverse=True)
    written = json.loads(result.read_text())
    assert written["figures"] == {"speed": 2.0}
    assert {"python", "torch"} <= set(written["versions"])
    assert written["machine"]["cores"] >= 1
    assert "twice as fast" in page.read_text()


@pytest.mark.filterwarnings("ignore")  # diffusers' pipeline warns about its own past
@pytest.mark.parametrize("pair", ["proportions", "diffusers", "embedded"])
def test_sampling_is_that_of_diffusers_inpaint_pipeline(inputs, pair, monkeypatch):
    monkeypatch.setattr(infer, "STEPS", 3)
    embedded = pair == "embedded"
    graphs = ["no"] if embedded and find_spec("openvino") else []
    options = argparse.Namespace(rounds=1, graphs=graphs)
    pipeline = infer.load_embedded() if embedded else infer.load_pair(inputs, pair)
    found, lines = infer.compare_exact(pipeline, 64, options)
    assert ("OpenVINO, f32" in found) == bool(graphs)
    assert found["difference"] < infer.TOLERANCE
    assert lines[-1].endswith("equal")
    # A ControlNet that says nothing would prove nothing.
    batch = infer.make_batch(pipeline, 64)
    few = {"scheduler": "ddim", "num_inference_steps": 3}
    loud, mute = (
        infer.our_picture(pipeline, batch, **few, controlnet_conditioning_scale=scale)()
        for scale in (1.0, 0.0)
    )
    assert float((loud - mute).abs().max()) > 10 * infer.TOLERANCE


def test_ways_of_sampling_are_timed(inputs):
    options = argparse.Namespace(rounds=1, size=64, window=64)
    pipeline = infer.load_pair(inputs)
    for compare_more in (infer.compare_crop, infer.compare_windows):
        figures, _ = compare_more(pipeline, options)
        assert all(f["seconds"]["median"] > 0 for f in figures.values())


def test_outpainting_is_measured_beside_classical_fills(tmp_path):
    options = argparse.Namespace(
        pixels=24, pictures=1, steps=1, seed=1, orders=["outward", "joint"], device="cpu",
        pictures_dir=tmp_path,
    )  # fmt: skip
    figures, lines = outpaint.compare(options)
    for kind in ("patterned", "smooth"):
        assert set(figures[kind]) == {"outward", "joint", *outpaint.CLASSICAL}
        assert all(found["known_max_error"] == 0 for found in figures[kind].values())
        assert (tmp_path / f"outpaint_{kind}.png").is_file()
    assert len([line for line in lines if "PSNR" in line]) == 10


def test_borders_of_windows_are_told_from_other_lines():
    lines = outpaint.border_lines(64, 0.5)
    assert lines == [32, 96, 160]
    hole = np.ones((192, 192), bool)
    hole[64:128, 64:128] = False
    image = np.zeros((192, 192, 3), np.uint8)
    image[:, 32:] += 50
    at, elsewhere = outpaint.line_steps(image, lines, hole)
    assert at > 5
    assert elsewhere == 0


@pytest.mark.parametrize("side", ["stock", "ours"])
def test_denoising_steps_at_full_size_are_the_same_on_both_sides(side):
    networks = infer_shapes.make_networks("sd15-tiny", "cpu", torch.float32)
    found, predicted = infer_shapes.measure(networks, 2, side, 1)
    _, wanted = infer_shapes.measure(networks, 2, "stock", 1)
    assert found["steps_per_second"] > 0
    torch.testing.assert_close(predicted, wanted, atol=1e-4, rtol=1e-4)

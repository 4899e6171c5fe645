"""OpenVINO gives torch's numbers, in any size and for every way of guiding."""

import sys

import numpy as np
import pytest

from controlfill.errors import UserError
from controlfill.inference import openvino
from controlfill.inference.pipeline import load

WAYS = {
    "all": {"prompt": "a red circle"},
    "unguided": {"guidance_scale": 1.0},
    "silent at last": {"control_guidance_end": 0.5},
    "prompted only": {"control_prompted_only": True},
    "quieter": {"controlnet_conditioning_scale": 0.5},
}


@pytest.fixture(scope="module")
def pair():
    pytest.importorskip("openvino", reason="needs the extra openvino")
    return load(device="cpu"), load(engine="openvino")


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("size", [(64, 64), (56, 88)])
def test_pictures_equal_those_of_torch(pair, way, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[10:50, 20:50] = 255
    options = {"num_inference_steps": 3, **WAYS[way]}
    torchs, theirs = (pipe.inpaint(image, mask, **options).image for pipe in pair)
    assert np.abs(torchs.astype(int) - theirs).max() <= 1
    assert (torchs != image).any()


def test_mixed_precision_is_that_of_the_graphs():
    pytest.importorskip("openvino", reason="needs the extra openvino")
    rough = load(engine="openvino", mixed_precision="bf16")
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.full((64, 64), 255, np.uint8)
    rough.inpaint(image, mask, num_inference_steps=2, guidance_scale=1.0)
    (graph,) = rough.denoiser.graphs.values()
    able = rough.denoiser.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    found = graph.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    assert found == ("bf16" if "BF16" in able else "f32")


def test_mistakes_are_told_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="computes on the CPU, not on --device cuda"):
        load(engine="openvino", device="cuda")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'controlfill\[openvino\]'"):
        openvino.open_core.__wrapped__()

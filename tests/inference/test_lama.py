"""LaMa from a file: a graph with its inputs and outputs that paints the hole in one colour."""

import numpy as np
import pytest

from controlfill.errors import UserError
from controlfill.inference.lama import lama

COLOUR = (200, 40, 90)


def make_graph(file, size, scale=1.0, channels=(3, 1)):
    """An ONNX file: image * (1 - mask) + COLOUR * mask, times `scale`."""
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    h = onnx.helper
    ends = [
        h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, count, *size])
        for name, count in zip(("image", "mask", "out"), (*channels, 3), strict=True)
    ]
    constants = {
        "colour": np.array(COLOUR, np.float32).reshape(1, 3, 1, 1) * scale,
        "white": np.array(255 * scale, np.float32), "one": np.array(1, np.float32),
    }  # fmt: skip
    nodes = [
        h.make_node("Mul", ["image", "white"], ["bright"]),
        h.make_node("Sub", ["one", "mask"], ["keep"]),
        h.make_node("Mul", ["bright", "keep"], ["kept"]),
        h.make_node("Mul", ["colour", "mask"], ["painted"]),
        h.make_node("Add", ["kept", "painted"], ["out"]),
    ]
    initial = [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = h.make_graph(nodes, "lama", ends[:2], ends[2:], initial)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, file)
    return file


@pytest.mark.parametrize("size", [(64, 64), ("h", "w")])
@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_the_hole_is_what_the_graph_paints(tmp_path, pipe, size, scale):
    file = make_graph(tmp_path / "lama.onnx", size, scale)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    mask = np.zeros((70, 90), np.uint8)
    mask[20:50, 30:60] = 255
    made = pipe.inpaint(image, mask, fill="lama", lama=file, strength=0.0).image
    np.testing.assert_array_equal(made[mask == 0], image[mask == 0])
    assert np.abs(made[22:48, 33:57].astype(int) - COLOUR).max() <= 12


def test_what_is_no_lama_is_told(tmp_path, pipe):
    image, mask = np.zeros((16, 16, 3), np.uint8), np.full((16, 16), 255, np.uint8)
    with pytest.raises(UserError, match="needs --lama FILE.onnx"):
        pipe.inpaint(image, mask, fill="lama", strength=0.0)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(UserError, match="can't be opened as ONNX"):
        lama(broken, image, mask)
    other = make_graph(tmp_path / "other.onnx", (16, 16), channels=(3, 3))
    with pytest.raises(UserError, match="takes a picture of 3 and a mask of 1"):
        lama(other, image, mask)

"""Readers equal ONNX Runtime, their gradients equal differences, and they read what is drawn."""

import copy
import socket
import string

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from controlfill.errors import UserError
from controlfill.images import to_tensor
from controlfill.models import ocr
from controlfill.models.ocr import READERS, decode, fit_crops, load_reader, read_boxes
from controlfill.models.onnx_graph import OnnxGraph
from controlfill.skins.draw import draw_labels, label_boxes, open_font
from controlfill.skins.layout import Box, open_layout
from controlfill.skins.themes import draw_skin, draw_theme

CAPITALS = string.ascii_uppercase + string.digits
# Which share of clean capitals on their own each reader gets right at least.
LETTERS = {"v4": 0.9, "v6": 0.95}


@pytest.fixture(params=list(READERS))
def reader(request):
    return open_reader(request.param)


def open_reader(name):
    """A reader; where it isn't installed the test is skipped, saying what would be."""
    try:
        return load_reader(name)
    except UserError as error:
        pytest.skip(str(error))


def onnx_session(model):
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(model, providers=["CPUExecutionProvider"])


def font_of(name, size):
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        pytest.skip(f"the font {name} is not on this machine")


def write(text, font):
    """A picture with dark text on light ground, and the box of the text."""
    left, top, right, bottom = font.getbbox(text, anchor="lt")
    image = Image.new("RGB", (int(right) + 40, int(bottom) + 40), (235, 238, 240))
    ImageDraw.Draw(image).text((20, 20), text, fill=(20, 20, 30), font=font, anchor="lt")
    return np.array(image), Box(20 + int(left), 20 + int(top), 20 + int(right), 20 + int(bottom))


def read_all(reader, texts, font, signs=None):
    """What the reader makes of each text, drawn in a picture of its own."""
    drawn = [write(text, font) for text in texts]
    return [read_boxes(reader, image, [box], signs)[0] for image, box in drawn]


def test_equal_to_onnx_runtime(reader):
    session = onnx_session(str(ocr.find_model(reader.name)))
    rng = np.random.default_rng(0)
    for count, width in ((1, 640), (2, 224), (3, 96)):
        crops = rng.random((count, 3, 48, width)).astype(np.float32)
        (expected,) = session.run(None, {"x": np.ascontiguousarray(crops[:, ::-1]) * 2 - 1})
        with torch.no_grad():
            reading = reader(torch.from_numpy(crops))
        assert reading.features.shape == (count, width // 8, 120)
        assert reading.logits.shape == (count, width // 8, len(reader.alphabet))
        assert np.abs(reading.logits.softmax(2).numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_those_of_finite_differences(reader, count):
    exact = copy.deepcopy(reader).double()
    torch.manual_seed(count)
    crops = torch.rand(count, 3, 48, 64, dtype=torch.float64, requires_grad=True)
    mixed = torch.randn(exact(crops).features.shape, dtype=torch.float64)

    def total(crops):
        reading = exact(crops)
        return (reading.features * mixed).sum() + reading.logits.log_softmax(2)[..., 1:9].mean()

    (gradient,) = torch.autograd.grad(total(crops), crops)
    way = gradient / gradient.norm() * 1e-6
    with torch.no_grad():
        difference = (total(crops + way) - total(crops - way)) / 2e-6
    assert float(difference) == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_frozen_shared_and_absent_from_checkpoints(reader):
    assert load_reader(reader.name) is reader
    assert not reader.training
    assert not list(reader.parameters())
    assert not reader.state_dict()
    assert not any(value.requires_grad for value in reader.buffers())


def test_all_weights_move_with_the_module(reader):
    moved = copy.deepcopy(reader.graph).to("meta")
    features, logits = moved(torch.zeros(2, 3, 48, 160, device="meta"))
    assert features.device.type == logits.device.type == "meta"
    assert logits.shape == (2, 20, len(reader.alphabet))


def test_mixed_precision_around_a_reader_does_not_reach_it(reader):
    crops = torch.rand(1, 3, 48, 96)
    with torch.no_grad():
        expected = reader(crops).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = reader(crops).logits
    assert torch.equal(found, expected)


def test_clean_texts_are_read(reader):
    font = font_of("DejaVuSans.ttf", 40)
    words = ["HELLO", "Shift", "space", "KEYBOARD", "123", "PQRS", "2026"]
    assert read_all(reader, words, font) == words
    assert read_all(reader, list(string.digits), font, CAPITALS) == list(string.digits)
    letters = read_all(reader, list(string.ascii_uppercase), font, CAPITALS)
    right = sum(a == b for a, b in zip(letters, string.ascii_uppercase, strict=True))
    assert right / 26 >= LETTERS[reader.name]


def test_chinese_is_read(reader):
    font = open_font(None, True, 40)
    if font.getmask("键").getbbox() == font.getmask("\U0010fffe").getbbox():
        pytest.skip("no font with Chinese signs is on this machine")
    words = ["空格", "键盘", "换行"]
    assert read_all(reader, words, font) == words


def test_boxes_of_a_keyboard_are_read_in_their_order():
    reader = open_reader("v6")
    layout = open_layout("qwerty-26").at((320, 512))
    image = draw_labels(draw_skin(draw_theme(1), layout).image, layout)
    labels, boxes = zip(*[item for item in label_boxes(layout) if item[0].isalnum()], strict=True)
    found = read_boxes(reader, image, boxes, CAPITALS)
    assert sum(a == b for a, b in zip(found, labels, strict=True)) >= 0.95 * len(labels)
    assert read_boxes(reader, image, []) == []


def test_readings_keep_to_the_signs(reader):
    ids = [reader.index[sign] for sign in "AAOAB0"]
    logits = torch.zeros(1, 6, len(reader.alphabet))
    logits[0, range(6), ids] = 2.0
    logits[0, 2, 0] = 3.0  # a blank between two As
    logits[0, 5, reader.index["O"]] = 1.0
    assert decode(reader, logits) == ["AAB0"]
    assert decode(reader, logits, "ABO") == ["AABO"]
    allowed = ocr.restrict(reader, "AB")
    assert allowed.nonzero()[:, 0].tolist() == sorted([0, *ocr.class_ids(reader, "AB")])


def test_the_blank_is_first_and_the_space_is_last(reader):
    assert reader.alphabet[0] == ""
    assert reader.alphabet[-1] == " "
    assert "".join(reader.alphabet[i] for i in ocr.class_ids(reader, "ab 键")) == "ab 键"


def test_crops_keep_their_proportions():
    crops = fit_crops([torch.zeros(3, 24, 90), torch.ones(3, 96, 40)])
    assert crops.shape == (2, 3, 48, 184)
    assert torch.equal(crops[0, :, :, :180], torch.zeros(3, 48, 180))
    assert torch.equal(crops[1, :, :, :20], torch.ones(3, 48, 20))
    assert (crops[0, :, :, 180:] == 0.5).all()
    assert (crops[1, :, :, 20:] == 0.5).all()
    assert fit_crops([torch.zeros(3, 48, 20)]).shape == (1, 3, 48, 160)


def test_fine_patterns_do_not_alias():
    stripes = torch.zeros(3, 480, 480)
    stripes[:, ::3] = 1
    assert (fit_crops([stripes])[..., :48] - 1 / 3).abs().max() < 0.1


def test_crops_of_low_precision_are_read_in_full():
    crop = torch.rand(3, 30, 30).bfloat16().requires_grad_()
    fitted = fit_crops([crop])
    assert fitted.dtype == torch.float32
    fitted.sum().backward()
    assert crop.grad is not None


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 0, 20), (20, 20)])
def test_crops_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match="is read"):
        fit_crops([torch.zeros(shape)])


@pytest.mark.parametrize("shape", [(1, 3, 32, 160), (3, 48, 160), (1, 1, 48, 160)])
def test_batches_that_were_not_fitted_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(N, 3, 48, W\) is read"):
        open_reader("v6")(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("v4", "rapidocr_onnxruntime", "--no-deps rapidocr-onnxruntime"),
        ("v6", "rapidocr", r"pip install 'controlfill\[ocr\]'"),
        ("v6", "onnx", r"package onnx; pip install 'controlfill\[ocr\]'"),
    ],
)
def test_says_what_to_install(monkeypatch, name, missing, said):
    found = ocr.find_spec
    monkeypatch.setattr(ocr, "find_spec", lambda n: None if n == missing else found(n))
    with pytest.raises(UserError, match=said):
        load_reader.__wrapped__(name)


def test_says_what_to_install_for_finding(monkeypatch):
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnxruntime; pip install"):
        ocr.open_finder.__wrapped__()


def test_other_releases_of_a_package_are_named(monkeypatch):
    monkeypatch.setitem(READERS, "v4", ("PIL", "models/none.onnx", "pip install it"))
    with pytest.raises(UserError, match="PIL has no models/none.onnx"):
        ocr.find_model("v4")


def test_unknown_names_and_signs_are_refused():
    with pytest.raises(UserError, match="there are v4 and v6"):
        load_reader("v9")
    with pytest.raises(UserError, match="does not know \ue000 in"):
        ocr.class_ids(open_reader("v6"), "A\ue000")


def test_texts_are_found_without_network(monkeypatch, capfd):
    pytest.importorskip("onnxruntime")
    open_reader("v6")

    def refuse(*args):
        raise AssertionError("a model would be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    picture = np.full((210, 210, 3), 240, np.uint8)
    assert ocr.find_texts(picture) == []
    image, box = write("HELLO", open_font(None, False, 40))
    picture[100 : 100 + image.shape[0], : image.shape[1]] = image
    ((text, corners, score),) = ocr.find_texts(picture)
    assert text == "HELLO"
    assert 0.5 < score <= 1
    expected = np.array(box.corners()) + np.array([0, 100])
    assert np.abs(np.array(corners) - expected).max() < 20
    assert capfd.readouterr() == ("", "")


def small_graph(*nodes, opset=12):
    """An ONNX model of one input x (1, 2, 5, 6) and one output y."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    rng = np.random.default_rng(3)
    shapes = {"w": (4, 2, 2, 2), "s": (4,), "v": (4,), "c": (1, 4, 1, 1), "n": ()}
    values = {name: rng.random(shape).astype(np.float32) + 0.5 for name, shape in shapes.items()}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **node[3]) for node in nodes],
        "small",
        [value("x", 1, (1, 2, 5, 6))],
        [value("y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


CONV = {"kernel_shape": [2, 2], "strides": [2, 1], "dilations": [1, 1], "group": 1}
SAME = {**CONV, "auto_pad": "SAME_UPPER"}
NORM = ["s", "s", "v", "v"]


@pytest.mark.parametrize(
    "nodes",
    [
        [("Conv", ["x", "w"], ["a"], SAME), ("BatchNormalization", ["a", *NORM], ["y"], {})],
        [("Conv", ["x", "w", "s"], ["a"], SAME), ("Mul", ["c", "a"], ["b"], {}),
         ("Identity", ["b"], ["d"], {}), ("Add", ["d", "n"], ["y"], {})],
        [("Conv", ["x", "w"], ["a"], SAME), ("Mul", ["a", "c"], ["b"], {}),
         ("Sub", ["a", "b"], ["y"], {})],
        [("Conv", ["x", "w"], ["a"], CONV), ("Relu", ["a"], ["b"], {}),
         ("BatchNormalization", ["b", *NORM], ["y"], {})],
        [("Conv", ["x", "w"], ["a"], {**CONV, "pads": [0, 1, 1, 0]}),
         ("Div", ["a", "n"], ["y"], {})],
        [("MaxPool", ["x"], ["y"],
          {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"})],
        [("Softmax", ["x"], ["a"], {"axis": 2}), ("HardSigmoid", ["a"], ["y"], {})],
        [("Conv", ["x", "w"], ["y"], {})],
    ],
)  # fmt: skip
def test_small_graphs_are_equal_to_onnx_runtime(nodes):
    model = small_graph(*nodes)
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 6)).astype(np.float32)
    (expected,) = onnx_session(model.SerializeToString()).run(None, {"x": x})
    (found,) = OnnxGraph(model, ["y"])(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_ops_that_are_not_known_are_named():
    with pytest.raises(NotImplementedError, match="ONNX op Tan"):
        OnnxGraph(small_graph(("Tan", ["x"], ["y"], {})), ["y"])
    with pytest.raises(NotImplementedError, match="opset 17"):
        OnnxGraph(small_graph(("Relu", ["x"], ["y"], {}), opset=17), ["y"])


def test_pictures_become_crops_of_their_boxes():
    image = np.zeros((40, 60, 3), np.uint8)
    box = ocr.around(Box(2, 10, 30, 34), (40, 60))
    assert box == Box(0, 7, 33, 37)
    assert to_tensor(box.of(image)).shape == (3, 30, 33)

"""Text readers (PP-OCR) that pass gradients on, from model files that pip packages bring along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlfill.errors import UserError
from controlfill.images import to_tensor
from controlfill.models.onnx_graph import OnnxGraph
from controlfill.skins.layout import Box, Size

if TYPE_CHECKING:
    from onnx import ModelProto

# Height of the crops that readers take, and how many of its pixels one frame of the reading spans.
HEIGHT = 48
FRAME = 8
# Single letters are read far better on a wide crop: v4 reads 69 % at 48 pixels, 88 % at 160. They
# stand on its left: in the middle, or on their own ground instead of grey, both readers read less.
NARROWEST = 160
GREY = 0.5
# What is seen around a box on each side, as a share of its height. Clean letters are read worse
# with none (v4 85 %, v6 92 %) and with 0.4 (88 %, 92 %) than with this (92 %, 100 %).
MARGIN = 0.125
CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read: `features` (N, T, C) before the last layer, `logits` (N, T, classes) after."""

    features: Tensor
    logits: Tensor


class Reader(nn.Module):
    """A frozen recogniser of lines of text; class 0 of its `alphabet` is the blank of CTC."""

    anchor: Tensor

    def __init__(self, name: str, graph: OnnxGraph, alphabet: tuple[str, ...]) -> None:
        super().__init__()
        self.name, self.graph, self.alphabet = name, graph, alphabet
        self.index = {sign: number for number, sign in enumerate(alphabet) if sign}
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.anchor.device

    def forward(self, crops: Tensor) -> Reading:
        """Read crops (N, 3, 48, W), RGB in [0, 1], in the precision of the weights."""
        if crops.ndim != 4 or crops.shape[1:3] != (3, HEIGHT):
            raise ValueError(f"crops are {tuple(crops.shape)}; (N, 3, {HEIGHT}, W) is read")
        with torch.autocast(crops.device.type, enabled=False):
            bgr = crops.to(self.anchor.dtype).flip(1) * 2 - 1
            features, logits = self.graph(bgr)
        return Reading(features=features, logits=logits)


@lru_cache
def load_reader(name: str) -> Reader:
    """The reader "v4" or "v6", one per process: who moves it moves it for all. Raises UserError."""
    path = find_model(name)
    import onnx

    model = onnx.load(path)
    return Reader(name, OnnxGraph(model, ends(model)), alphabet_of(model)).eval()


def find_model(name: str) -> Path:
    """The model file of a reader. Raises UserError that says what to install."""
    if name not in READERS:
        raise UserError(f"no text reader is called {name!r}; there are {' and '.join(READERS)}")
    package, file, install = READERS[name]
    need("onnx", INSTALL)
    return need(package, install, file)


def need(package: str, install: str, file: str = "__init__.py") -> Path:
    """A file of a package, which isn't imported. Raises UserError that says how to get it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"reading text needs the package {package}; {install}")
    path = Path(found.origin).parent / file
    if not path.is_file():
        raise UserError(f"the installed {package} has no {file}; get another release: {install}")
    return path


def has_reader(name: str) -> bool:
    """Whether a reader can be loaded here."""
    try:
        find_model(name)
    except UserError:
        return False
    return True


def ends(model: ModelProto) -> tuple[str, str]:
    """The names of what the last layer takes, and of what goes into the last softmax."""
    makers = {node.output[0]: node for node in model.graph.node}
    name = logits = makers[model.graph.output[0].name].input[0]
    while makers[name].op_type != "MatMul":
        name = makers[name].input[0]
    return makers[name].input[0], logits


def alphabet_of(model: ModelProto) -> tuple[str, ...]:
    """The signs of the classes: the blank, those in the file, and the space, which PP-OCR adds."""
    (signs,) = (entry.value for entry in model.metadata_props if entry.key == "character")
    return ("", *signs.split("\n"), " ")


def fitted_width(size: Size) -> int:
    """How wide a crop of `size` (height, width) is for a reader, its padding included."""
    return max(NARROWEST, FRAME * ceil(_scaled(size) / FRAME))


def _scaled(size: Size) -> int:
    return max(1, round(size[1] * HEIGHT / size[0]))


def fit_crops(crops: Sequence[Tensor]) -> Tensor:
    """Crops (3, h, w) in [0, 1] as the batch (N, 3, 48, W) a reader takes; passes gradients on.

    Each keeps its proportions; grey fills it up on the right to the width of the widest.
    """
    check_crops(crops)
    width = max((fitted_width(size_of(crop)) for crop in crops), default=NARROWEST)
    fitted = [_fit(crop, width) for crop in crops]
    return torch.cat(fitted) if fitted else torch.zeros(0, 3, HEIGHT, width)


def check_crops(crops: Sequence[Tensor]) -> None:
    """Raise ValueError for crops that are no (3, h, w), or empty."""
    for crop in crops:
        if crop.ndim != 3 or len(crop) != 3 or not crop.numel():
            raise ValueError(f"a crop is {tuple(crop.shape)}; (3, height, width) is read")


def size_of(crop: Tensor) -> Size:
    """Height and width of (..., h, w)."""
    return crop.shape[-2], crop.shape[-1]


def _fit(crop: Tensor, width: int) -> Tensor:
    # Low precision is for the networks before; a reader's input keeps all it can have.
    exact = crop[None].to(torch.promote_types(crop.dtype, torch.float32))
    size = (HEIGHT, _scaled(size_of(crop)))
    sized = F.interpolate(exact, size, mode="bilinear", antialias=True)
    return F.pad(sized, (0, width - size[1]), value=GREY)


def class_ids(reader: Reader, text: str) -> list[int]:
    """The classes of the signs of `text`. Raises UserError for signs the reader does not know."""
    unknown = sorted(set(text) - reader.index.keys())
    if unknown:
        raise UserError(
            f"the text reader {reader.name} does not know {' '.join(unknown)} in {text!r}; "
            "leave such labels out"
        )
    return [reader.index[sign] for sign in text]


def restrict(reader: Reader, signs: str) -> Tensor:
    """Which classes are the blank or one of `signs`, bool (classes,). Raises UserError."""
    allowed = torch.zeros(len(reader.alphabet), dtype=torch.bool)
    allowed[[0, *class_ids(reader, signs)]] = True
    return allowed.to(reader.device)


def decode(reader: Reader, logits: Tensor, signs: str | None = None) -> list[str]:
    """The likeliest sign of each frame of (N, T, classes), repeats and blanks left out.

    With `signs` only those are considered.
    """
    if signs is not None:
        logits = logits.masked_fill(~restrict(reader, signs).to(logits.device), -torch.inf)
    texts = []
    for row in logits.argmax(2).tolist():
        changes = [now for before, now in zip([0, *row], row, strict=False) if now != before]
        texts.append("".join(reader.alphabet[number] for number in changes))
    return texts


def around(box: Box, size: Size) -> Box:
    """What a reader sees of a text in `box`: a quarter more, inside a picture of `size` (H, W)."""
    by = max(1, round(MARGIN * box.size[0]))
    return Box(
        max(0, box.left - by),
        max(0, box.top - by),
        min(size[1], box.right + by),
        min(size[0], box.bottom + by),
    )


@torch.no_grad()
def read_boxes(
    reader: Reader, image: np.ndarray, boxes: Sequence[Box], signs: str | None = None
) -> list[str]:
    """What stands in each of `boxes` of a uint8 picture (H, W, 3), without looking for text."""
    size = (image.shape[0], image.shape[1])
    crops = [to_tensor(around(box, size).of(image)).to(reader.device) for box in boxes]
    # Crops of like width share a batch, or the widest would make all the others wide.
    order = sorted(range(len(crops)), key=lambda i: fitted_width(size_of(crops[i])))
    texts = [""] * len(crops)
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        logits = reader(fit_crops([crops[i] for i in chunk])).logits
        for i, text in zip(chunk, decode(reader, logits, signs), strict=True):
            texts[i] = text
    return texts


def find_texts(image: np.ndarray) -> list[tuple[str, list[list[int]], float]]:
    """All texts in a uint8 picture (H, W, 3), each with its four corners (x, y) and its score.

    Raises UserError where what it needs isn't installed.
    """
    found = open_finder()(np.ascontiguousarray(image[..., ::-1]))  # it takes BGR
    if found.boxes is None:
        return []
    corners = np.rint(found.boxes).astype(int).tolist()
    return list(zip(found.txts, corners, map(float, found.scores), strict=True))


@lru_cache(maxsize=1)
def open_finder() -> Any:
    """RapidOCR with the models it brings along, silent. Raises UserError."""
    need("onnxruntime", INSTALL)
    detector, reader = (need("rapidocr", INSTALL, file) for file in (DETECTOR, READERS["v6"][1]))
    from rapidocr import RapidOCR

    words = {
        "Global.log_level": "critical",
        # Turning lines that seem upside down harms single letters such as M and W.
        "Global.use_cls": False,
        # Named files are never downloaded.
        "Det.model_path": str(detector),
        "Rec.model_path": str(reader),
    }
    return RapidOCR(params=words)


INSTALL = "pip install 'controlfill[ocr]'"
DETECTOR = "models/PP-OCRv6_det_small.onnx"
# Package, its model file, and how to get it.
READERS = {
    "v4": (
        "rapidocr_onnxruntime",
        "models/ch_PP-OCRv4_rec_infer.onnx",
        "pip install --no-deps rapidocr-onnxruntime (only its model file is read)",
    ),
    "v6": ("rapidocr", "models/PP-OCRv6_rec_small.onnx", INSTALL),
}

"""LaMa (Suvorov et al. 2022), a large-mask inpainter, from an ONNX file that the user has."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlfill.errors import UserError


def lama(file: Path, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill the white part of `mask` (H, W) in uint8 `image` (H, W, 3).

    Files of a fixed size see the picture at that size. Raises UserError for files that take
    something else than a picture and a mask.
    """
    session = open_session(file)
    inputs = {entry.shape[1]: entry for entry in session.get_inputs()}
    channels = sorted(map(str, inputs))
    if channels != ["1", "3"]:
        raise UserError(
            f"--lama {file} takes inputs of {channels} channels; LaMa takes a "
            "picture of 3 and a mask of 1"
        )
    size = fixed_size(inputs[3].shape) or tuple(-(-side // 8) * 8 for side in mask.shape)
    asked = {
        inputs[3].name: planes(image / np.float32(255), size, cv2.INTER_AREA),
        inputs[1].name: planes((mask[..., None] > 0) * np.float32(1), size, cv2.INTER_NEAREST),
    }
    made = session.run(None, asked)[0][0].transpose(1, 2, 0)
    made = made if made.max() > 2 else made * 255  # both ranges are about
    bytes_ = np.rint(made.clip(0, 255)).astype(np.uint8)
    return cv2.resize(bytes_, mask.shape[::-1], interpolation=cv2.INTER_CUBIC)


def planes(picture: np.ndarray, size: tuple[int, ...], how: int) -> np.ndarray:
    """(H, W, C) as (1, C, *size)."""
    sized = cv2.resize(picture, size[::-1], interpolation=how)
    return np.ascontiguousarray(sized.reshape(*size, -1).transpose(2, 0, 1)[None])


def fixed_size(shape: list[Any]) -> tuple[int, int] | None:
    """Height and width that a graph insists on."""
    height, width = shape[2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


@lru_cache(maxsize=1)
def open_session(file: Path) -> Any:
    """The graph in `file`, on the CPU. Raises UserError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "--fill lama needs ONNX Runtime; pip install 'controlfill[onnx]'"
        ) from error
    try:
        return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--lama {file} can't be opened as ONNX: {reason}") from error

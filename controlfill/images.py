"""Pictures: uint8 RGB (H, W, 3) outside the networks, float (3, H, W) inside; masks likewise.

A mask is uint8 (H, W), 255 = generate here, 0 = keep. Nothing else in the code has a polarity.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from controlfill.errors import UserError
from controlfill.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS_KEY = "controlfill"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
# Hundreds of megapixels are a decompression bomb more often than a photograph.
Image.MAX_IMAGE_PIXELS = 400_000_000
ORIENTATION = 0x0112
JPEG_END = b"\xff\xd9"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An opened picture: `rgb` uint8 (H, W, 3) and, if the file had one, `alpha` uint8 (H, W)."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.rgb.shape[0], self.rgb.shape[1]


def open_image(source: str | Path | bytes, at_least: int | None = None) -> Photo:
    """Open any picture as 8-bit RGB, upright, alpha kept apart.

    `at_least` lets a JPEG be decoded at a half, quarter or eighth of its size as long as its short
    side stays that long; it saves most of the time of large photographs. Raises UserError.
    """
    name = "the picture" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_bytes(source)
    try:
        with warnings.catch_warnings():
            # Odd metadata is no reason to refuse a picture whose pixels can be read.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as picture:
                drafted = at_least is not None and _draft(picture, at_least)
                rgb = None if drafted else _decode_jpeg(data, picture)
                return Photo(rgb=rgb) if rgb is not None else photo_of(upright(picture))
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture; PNG, JPEG or WebP would be") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large: {error}") from error
    except Exception as error:  # decoders raise anything for damaged bytes, MemoryError too
        raise UserError(f"{name} is a broken picture ({error}); export it again") from error


def _decode_jpeg(data: bytes, picture: Image.Image) -> np.ndarray | None:
    """A plain colour JPEG by OpenCV, three times as fast as Pillow and equal to the last bit.

    None for all else: pictures that must be turned, and files without an end, which OpenCV would
    fill up with grey where Pillow refuses.
    """
    whole = picture.format == "JPEG" and picture.mode == "RGB" and data[-2:] == JPEG_END
    if not whole or _turn(picture) is not None:
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    rgb = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return rgb if rgb is not None and rgb.shape[:2] == picture.size[::-1] else None


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation asks; an unreadable EXIF asks for nothing."""
    turn = _turn(picture)
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata raises anything, and is no reason to refuse good pixels
        return None


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file. Raises UserError where there is none."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder, not a picture" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {kind}; give the path of a picture")
    return path.read_bytes()


def _draft(picture: ImageFile.ImageFile, at_least: int) -> bool:
    """Decode a JPEG at a fraction of its size, never with a short side below `at_least`.

    Returns whether it will be smaller.
    """
    short = min(picture.size)
    if short < 2 * at_least:
        return False
    scale = at_least / short
    picture.draft("RGB", (int(picture.width * scale), int(picture.height * scale)))
    return min(picture.size) < short


def photo_of(picture: Image.Image) -> Photo:
    """8-bit RGB and alpha of a PIL picture of any mode (grey, palette, 16-bit, CMYK, float)."""
    if picture.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        picture = Image.fromarray(_to_8_bit(np.asarray(picture)))
    has_alpha = "A" in picture.getbands() or "transparency" in picture.info
    if not has_alpha:
        return Photo(rgb=np.array(picture.convert("RGB")))
    rgba = np.array(picture.convert("RGBA"))
    return Photo(rgb=np.ascontiguousarray(rgba[..., :3]), alpha=np.ascontiguousarray(rgba[..., 3]))


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values of 16, 32 or float bits at their own scale: 0..65535, 0..255 or 0..1."""
    values = values.astype(np.float64)
    top = values.max(initial=0)
    scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 1 / 257.0
    return np.rint(values * scale).clip(0, 255).astype(np.uint8)


def as_photo(picture: Any) -> Photo:
    """A Photo from a path, bytes, PIL picture, numpy array or tensor.

    Arrays are (H, W), (H, W, 3) or (H, W, 4), tensors (C, H, W) or (1, C, H, W); floats are in
    [0, 1], integers in 0..255.
    """
    if isinstance(picture, Photo):
        return picture
    if isinstance(picture, (str, Path, bytes)):
        return open_image(picture)
    if isinstance(picture, Image.Image):
        return photo_of(upright(picture))
    array = _bytes_of(_as_array(picture))
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise UserError(f"a picture has 1, 3 or 4 channels, but this one has shape {array.shape}")
    return photo_of(Image.fromarray(array))


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Any array of pixels as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool or array.dtype.kind == "f":
        return np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    return _to_8_bit(array)


def _as_array(picture: Any) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    if not hasattr(picture, "detach"):
        raise UserError(f"expected a path, PIL picture, array or tensor, got {type(picture)}")
    tensor = picture.detach().cpu().float() if picture.is_floating_point() else picture.cpu()
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.numpy() if tensor.ndim == 2 else tensor.permute(1, 2, 0).numpy()


def as_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask uint8 (H, W) of 0 and 255 for a picture of `size` (H, W); white means generate.

    Raises UserError when the sizes differ or nothing is white.
    """
    return some_white(white_where(as_grey(mask, size) > 127))


def white_where(condition: np.ndarray) -> np.ndarray:
    """A mask uint8 that is 255 where `condition` holds and 0 elsewhere."""
    return np.multiply(condition, 255, dtype=np.uint8)


def some_white(mask: np.ndarray) -> np.ndarray:
    """`mask` itself. Raises UserError when nothing is white."""
    if not mask.any():
        raise UserError("the mask is all black, so there is nothing to fill; paint the hole white")
    return mask


def as_grey(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask as greys uint8 (H, W) for a picture of `size`. Raises UserError for other sizes."""
    photo = as_photo(mask)
    if photo.size != size:
        (height, width), (rows, columns) = size, photo.size
        raise UserError(
            f"the mask is {columns}x{rows} but the picture is {width}x{height}; "
            "resize one of them so that they agree"
        )
    grey = photo.rgb.mean(axis=2)
    # Masks of 0 and 1 are common in segmentation data; no picture means its darkest greys by them.
    return np.rint(grey if grey.max() > 1 else grey * 255).astype(np.uint8)


def save_image(
    path: str | Path,
    rgb: np.ndarray,
    alpha: np.ndarray | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write uint8 (H, W, 3) or (H, W) as PNG, whole or not at all, with `settings` as metadata."""
    write_whole(path, png_bytes(rgb, alpha, settings))
    return Path(path)


def png_bytes(
    rgb: np.ndarray, alpha: np.ndarray | None = None, settings: dict[str, Any] | None = None
) -> bytes:
    """The PNG of uint8 (H, W, 3) or (H, W)."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(SETTINGS_KEY, json.dumps(settings, default=str))
    stacked = rgb if alpha is None else np.dstack([rgb, alpha])
    buffer = io.BytesIO()
    Image.fromarray(stacked).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_image` put into a PNG; empty if there are none."""
    with Image.open(path) as picture:
        return json.loads(picture.info.get(SETTINGS_KEY, "{}"))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 (H, W[, 3]) to (height, width): area average when shrinking, else cubic."""
    if image.shape[:2] == size:
        return image
    shrinking = size[0] * size[1] < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return cv2.resize(image, size[::-1], interpolation=method)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask so that whatever was touched stays touched: thin strokes survive."""
    if mask.shape == size:
        return mask
    shrunk = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    return white_where(shrunk > 0)


def pad_to_multiple(image: np.ndarray, multiple: int) -> np.ndarray:
    """Repeat the last row and column until both sides are multiples of `multiple`."""
    down, right = (-image.shape[0]) % multiple, (-image.shape[1]) % multiple
    return cv2.copyMakeBorder(image, 0, down, 0, right, cv2.BORDER_REPLICATE)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (..., H, W, C) as float (..., C, H, W) in [0, 1]."""
    import torch

    return from_bytes(torch.from_numpy(np.ascontiguousarray(images)))


def from_bytes(images: Tensor) -> Tensor:
    """A uint8 tensor (..., H, W, C) as float (..., C, H, W) in [0, 1], on its own device."""
    return images.movedim(-1, -3).float() / 255


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (..., C, H, W) in [0, 1] as uint8 (..., H, W, C)."""
    return (images.detach().cpu().float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def feather_weight(mask: np.ndarray, feather: int) -> np.ndarray:
    """How much of the generated picture each pixel takes, float32 (H, W) in [0, 1].

    1 in the hole; outside it falls linearly to 0 over `feather` pixels from the hole's rim.
    """
    hole = mask > 0
    if feather <= 0 or hole.all():
        return hole.astype(np.float32)
    # distanceTransform gives each pixel its distance to the nearest zero, here the nearest hole.
    distance = cv2.distanceTransform((~hole).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(1 - distance / (feather + 1), 0, 1).astype(np.float32) * (distance <= feather)


def paste(
    known: np.ndarray, generated: np.ndarray, mask: np.ndarray, feather: int = 0
) -> np.ndarray:
    """`generated` inside the hole, the very bytes of `known` outside the feather."""
    weight = feather_weight(mask, feather)[..., None]
    mixed = known + weight * (generated.astype(np.float32) - known)
    return np.where(weight > 0, np.rint(mixed).clip(0, 255), known).astype(np.uint8)


def grid(rows: list[list[np.ndarray]], gap: int = 4) -> np.ndarray:
    """One picture of rows of equally sized uint8 (H, W, 3) pictures with white gaps between."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            canvas[top : top + height, left : left + width] = as_rgb(tile)
    return canvas


def within(image: np.ndarray, side: int) -> np.ndarray:
    """`image` (H, W, ...) shrunk until neither side is longer than `side`."""
    scale = min(1.0, side / max(image.shape[:2]))
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    return resize(image, (height, width))


def find_pictures(folder: Path) -> list[Path]:
    """All files below `folder` that are pictures by their suffix, in order."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def find_masks(files: list[Path], folder: Path, mask_dir: Path) -> dict[Path, Path | None]:
    """The mask of each of `files` below `folder`: the same relative name, any picture suffix.

    Raises UserError when `mask_dir` is no folder.
    """
    if not mask_dir.is_dir():
        raise UserError(f"--mask_dir {mask_dir} is no folder; it holds a mask per picture")
    found = {p.relative_to(mask_dir).with_suffix(""): p for p in find_pictures(mask_dir)}
    return {f: found.get(f.relative_to(folder).with_suffix("")) for f in files}


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) as (H, W, 3)."""
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

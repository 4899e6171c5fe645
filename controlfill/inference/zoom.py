"""Infinite zoom: a picture that grows and grows, as a video without a visible frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlfill.errors import UserError
from controlfill.files import whole_file
from controlfill.images import Photo, as_photo, resize
from controlfill.inference.complete import Result, of_many
from controlfill.inference.outpaint import outpaint
from controlfill.inference.pipeline import Pipeline, Progress, Report
from controlfill.options import GrowOptions, SampleOptions, ZoomOptions, shared_values

# Frames are composed at so many times their size, so that nothing flickers when it shrinks.
FINER = 2
# Share of a picture over which it fades into the next, which shows the same there.
FADE = 0.15


def zoom(pipeline: Pipeline, image: Any, options: ZoomOptions, report: Report) -> list[Result]:
    """Write the video of `image` growing; returns its key pictures, the grown ones.

    Raises UserError when the picture is too small or the video can't be written.
    """
    open_writer()
    photo = even(as_photo(image))
    results: list[Result] = []
    keys = [photo.rgb]
    for number in range(options.num_zooms):
        told = of_many(partial(report, "pictures"), number, options.num_zooms)
        results.append(grow_once(pipeline, keys[-1], options, number, told))
        results[-1].save(options.output_dir, f"zoom_{number + 1:02}.png")
        keys.append(results[-1].image)
    count = round(options.seconds_per_zoom * options.fps) * options.num_zooms
    times = np.linspace(0, options.num_zooms, count + 1)
    times = times[::-1] if options.zoom_in else times
    frames = (frame_at(keys, float(at), options.zoom_factor) for at in times)
    write_video(
        options.out, frames, photo.size, options.fps, lambda n: report("frames", n, count + 1)
    )
    return results


def even(photo: Photo) -> Photo:
    """The picture without its last row or column where that is odd: video has even sides."""
    height, width = (side // 2 * 2 for side in photo.size)
    if not height or not width:
        raise UserError(f"a picture of {photo.size[1]}x{photo.size[0]} is too small for a video")
    return Photo(rgb=photo.rgb[:height, :width])


def grow_once(
    pipeline: Pipeline,
    image: np.ndarray,
    options: ZoomOptions,
    number: int,
    progress: Progress | None,
) -> Result:
    """`image` made smaller by the zoom factor, with new surroundings up to its own size."""
    height, width = image.shape[:2]
    small = resize(image, inner_size((height, width), options.zoom_factor))
    asked = GrowOptions(**shared_values(options, SampleOptions), to=f"{width}x{height}")
    # Each ring has noise of its own, or all would look the same.
    return outpaint(pipeline, small, replace(asked, seed=options.seed + number), progress)


def inner_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """The size of a picture after one zoom, with borders of whole pixels that are equally wide."""
    height, width = (side - 2 * max(1, round(side * (1 - 1 / factor) / 2)) for side in size)
    if height < 1 or width < 1:
        raise UserError(
            f"a picture of {size[1]}x{size[0]} is too small to be zoomed {factor} times"
        )
    return height, width


def frame_at(keys: Sequence[np.ndarray], at: float, factor: float) -> np.ndarray:
    """What is seen at zoom `at`: `keys[at]` for whole numbers, between them parts of both.

    Each key but the first holds the one before it, `factor` times smaller, in its middle.
    """
    number = min(int(at), len(keys) - 2)
    inner, outer = keys[number], keys[number + 1]
    size = np.array(outer.shape[:2])
    least = np.array(inner_size(tuple(size), factor)) / size
    # The shown share of the outer picture grows evenly to the eye.
    shown = least ** (1 - (at - number))
    share = least / shown
    weight = inner_weight(size, share)[..., None]
    mixed = (1 - weight) * scaled(outer, 1 / shown) + weight * scaled(inner, share)
    frame = cv2.resize(mixed, size[::-1].tolist(), interpolation=cv2.INTER_AREA)
    return np.rint(frame.clip(0, 255)).astype(np.uint8)


def scaled(image: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`image` (H, W, 3) scaled by (down, right) about its middle, in cells of a finer canvas."""
    height, width = image.shape[:2]
    steps = 1 / (FINER * scale)
    at_first = (0.5 / FINER - np.array([height, width]) / 2) / scale
    at_first += np.array([height, width]) / 2 - 0.5
    matrix = np.array([[steps[1], 0, at_first[1]], [0, steps[0], at_first[0]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    canvas = (width * FINER, height * FINER)
    return cv2.warpAffine(
        image.astype(np.float32), matrix, canvas, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


def inner_weight(size: np.ndarray, share: np.ndarray) -> np.ndarray:
    """How much each cell of the finer canvas takes of the inner picture, which fills `share`."""
    inwards = [
        part * side / 2 - np.abs((np.arange(side * FINER) + 0.5) / FINER - side / 2)
        for side, part in zip(size, share, strict=True)
    ]
    depth = np.minimum(inwards[0][:, None], inwards[1][None, :])
    # Where the inner picture fills the whole frame nothing fades.
    return np.clip(depth / max(FADE * min(size) * (1 - min(share)), 0.25), 0, 1)


def write_video(
    file: Path,
    frames: Iterable[np.ndarray],
    size: tuple[int, int],
    fps: int,
    report: Callable[[int], None],
) -> None:
    """Write uint8 frames of `size` (height, width) as H.264 in an MP4, whole or not at all."""
    with whole_file(file) as temporary:
        writer = open_writer()(
            str(temporary), size[::-1], fps=fps, quality=7, macro_block_size=2,
            output_params=["-f", "mp4", "-movflags", "+faststart"],
        )  # fmt: skip
        writer.send(None)
        try:
            for number, frame in enumerate(frames, 1):
                writer.send(np.ascontiguousarray(frame))
                report(number)
        finally:
            writer.close()


def open_writer() -> Callable[..., Any]:
    """imageio-ffmpeg's writer. Raises UserError that names the extra where it is missing."""
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise UserError("video needs imageio-ffmpeg: pip install 'controlfill[video]'") from error
    return write_frames

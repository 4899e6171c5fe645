"""Completing pictures: holes are generated, known pixels come back as the bytes they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlfill.data.sample import Sample, collate
from controlfill.errors import UserError
from controlfill.images import (
    Photo,
    as_photo,
    as_rgb,
    grid,
    pad_to_multiple,
    paste,
    save_image,
    to_uint8,
    white_where,
    within,
)
from controlfill.inference.fill import fill_with
from controlfill.inference.generate import (
    Canvas,
    choose_windows,
    generate_batch,
    guidance_scale,
)
from controlfill.inference.holes import Box, choose_boxes, finish, open_hole
from controlfill.inference.lama import lama
from controlfill.inference.order import ORDERS
from controlfill.inference.pipeline import Pipeline, Progress
from controlfill.options import HoleOptions, SampleOptions

PANEL = 512


@dataclass(frozen=True, kw_only=True)
class Result:
    """A completed picture: `image` uint8 (H, W, 3), its `alpha`, the `mask`, and all settings."""

    image: np.ndarray
    alpha: np.ndarray | None
    known: np.ndarray
    mask: np.ndarray
    settings: dict[str, Any]

    def save(self, folder: str | Path, name: str = "inpainted.png") -> Path:
        """Write the picture as `name`, settings inside, and comparison.png into `folder`."""
        folder = Path(folder)
        save_image(folder / "comparison.png", self.comparison())
        return save_image(folder / name, self.image, self.alpha, self.settings)

    def comparison(self) -> np.ndarray:
        """Input, mask and output side by side, at most 512 pixels high and wide each.

        Small pictures are enlarged by a whole factor, pixel by pixel, to be looked at.
        """
        panels = (self.known, as_rgb(self.mask), self.image)
        larger = PANEL // 2 // max(self.mask.shape)
        if larger > 1:
            return grid([[panel.repeat(larger, 0).repeat(larger, 1) for panel in panels]])
        return grid([[within(panel, PANEL) for panel in panels]])


def inpaint(
    pipeline: Pipeline,
    image: Any,
    mask: Any,
    options: HoleOptions,
    progress: Progress | None = None,
) -> Result:
    """Fill what `mask` says in `image`, of any size.

    Both are paths, PIL pictures, numpy arrays or tensors. Raises UserError when their sizes differ
    or nothing is to be filled, and InterruptedError when `progress` returns False.
    """
    check_fills(pipeline)
    photo = as_photo(image)
    hole = open_hole(mask, photo, options)
    boxes = choose_boxes(hole, pipeline.bundle.native_size, options)
    made = photo.rgb.copy()
    for number, box in enumerate(boxes):
        told = of_many(progress, number, len(boxes))
        box.of(made)[:] = complete(pipeline, box.of(made), box.of(hole), options, told)
    return make_result(pipeline, photo, hole, made, options)


def make_fill(image: np.ndarray, hole: np.ndarray, options: SampleOptions) -> np.ndarray:
    """`image` with its hole filled as `options` say, if they do. Raises UserError."""
    if options.fill is None:
        return image
    if options.fill != "lama":
        return fill_with(options.fill, image, hole)
    if options.lama is None:
        raise UserError("--fill lama needs --lama FILE.onnx, the network itself")
    return np.where(hole[..., None] > 0, lama(options.lama, image, hole), image)


def check_fills(pipeline: Pipeline) -> None:
    """Raise UserError for a ControlNet that fills no holes."""
    if pipeline.spec.given:
        raise UserError(
            f"this ControlNet was trained with {pipeline.spec.label}: it follows a conditioning "
            "picture and fills no holes"
        )


def of_many(progress: Progress | None, number: int, count: int) -> Progress | None:
    """`progress` of the part `number` of `count` equal ones."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def complete(
    pipeline: Pipeline,
    image: np.ndarray,
    hole: np.ndarray,
    options: SampleOptions,
    progress: Progress | None = None,
    old: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """`image` uint8 (H, W, 3) with its `hole` (H, W) filled, known pixels as they were.

    Greys of the hole say how much may change. `old` is the pixel at which an older canvas began:
    latent cells keep their places and their noise while a canvas grows around it.
    """
    start = make_fill(image, hole, options)
    if not options.strength:
        return paste(image, start, hole, options.feather)
    generated = _generate_around(pipeline, start, hole, options, progress, old)
    return finish(generated, image, hole, options, pipeline.bundle.factor)


def _generate_around(
    pipeline: Pipeline,
    start: np.ndarray,
    hole: np.ndarray,
    options: SampleOptions,
    progress: Progress | None,
    old: tuple[int, int],
) -> np.ndarray:
    """What the networks make of `start` (H, W, 3), with `old` at a corner of latent cells."""
    factor, (height, width) = pipeline.bundle.factor, hole.shape
    above, before = (-at % factor for at in old)
    image, greys = (
        cv2.copyMakeBorder(plane, above, 0, before, 0, cv2.BORDER_REPLICATE)
        for plane in (start, hole)
    )
    whole = white_where(greys > 0)
    soft = greys if (greys != whole).any() else None
    sample_ = Sample(image=image, mask=whole, prompt=options.prompt)
    origin = (-(old[0] + above) // factor, -(old[1] + before) // factor)
    made = _generate(pipeline, sample_, options, progress, Canvas(origin=origin, soft=soft))
    return made[above : above + height, before : before + width]


def follow(
    pipeline: Pipeline, hint: Any, options: SampleOptions, progress: Progress | None = None
) -> Result:
    """A whole new picture, as large as `hint`, that follows it; for ControlNets of given hints.

    Raises UserError for a ControlNet that fills holes, and InterruptedError when `progress` returns
    False.
    """
    if not pipeline.spec.given:
        raise UserError(
            f"this ControlNet was trained with {pipeline.spec.label}: it fills holes; give it a "
            "picture and a mask"
        )
    photo = as_photo(hint)
    everything = np.full(photo.size, 255, np.uint8)
    nothing = np.zeros_like(photo.rgb)
    sample_ = Sample(image=nothing, mask=everything, hint=photo.rgb, prompt=options.prompt)
    made = _generate(pipeline, sample_, options, progress, Canvas())
    height, width = photo.size
    return make_result(pipeline, photo, everything, made[:height, :width], options)


def _generate(
    pipeline: Pipeline,
    sample_: Sample,
    options: SampleOptions,
    progress: Progress | None,
    canvas: Canvas,
) -> np.ndarray:
    """What the networks make of one sample, uint8, padded to the size that they can take."""
    multiple = pipeline.bundle.size_multiple
    parts = {"image": sample_.image, "mask": sample_.mask, "hint": sample_.hint}
    padded = {n: pad_to_multiple(p, multiple) for n, p in parts.items() if p is not None}
    whole = replace(sample_, **padded)
    if canvas.soft is not None:
        canvas = replace(canvas, soft=pad_to_multiple(canvas.soft, multiple))
    boxes = _order_windows(pipeline, whole, options)
    with pipeline.lock:
        if not boxes:
            return _generate_whole(pipeline, whole, options, progress, canvas)
        return _generate_in_turn(pipeline, whole, options, progress, canvas, boxes)


def _order_windows(pipeline: Pipeline, sample_: Sample, options: SampleOptions) -> list[Box]:
    """The windows to be filled one after the other; none where all are painted together."""
    if options.window_order == "joint" or sample_.mask is None:
        return []
    factor, (height, width) = pipeline.bundle.factor, sample_.mask.shape
    cells = (height // factor, width // factor)
    windows = choose_windows(pipeline.bundle, cells, options)
    hole = sample_.mask.reshape(cells[0], factor, cells[1], factor).max(axis=(1, 3)) > 0
    # What is new everywhere has no rim to begin at.
    if windows.size == windows.canvas or hole.all():
        return []
    down, right = (side * factor for side in windows.size)
    return [
        Box(top=top * factor, left=left * factor, height=down, width=right)
        for top, left in ORDERS[options.window_order](hole, windows)
    ]


def _generate_in_turn(
    pipeline: Pipeline,
    sample_: Sample,
    options: SampleOptions,
    progress: Progress | None,
    canvas: Canvas,
    boxes: Sequence[Box],
) -> np.ndarray:
    """`sample_` filled window by window: what one paints is known to the next."""
    assert sample_.mask is not None
    image, hole, factor = sample_.image.copy(), sample_.mask.copy(), pipeline.bundle.factor
    soft = None if canvas.soft is None else canvas.soft.copy()
    alone = replace(options, window_size=0, feather=0)
    for number, box in enumerate(boxes):
        part = Sample(image=box.of(image), mask=box.of(hole), prompt=sample_.prompt)
        here = Canvas(
            origin=(canvas.origin[0] + box.top // factor, canvas.origin[1] + box.left // factor),
            soft=None if soft is None else box.of(soft),
        )
        told = of_many(progress, number, len(boxes))
        made = _generate_whole(pipeline, part, alone, told, here)
        box.of(image)[:] = finish(made, box.of(image), box.of(hole), alone, factor)
        for plane in (hole, soft):
            if plane is not None:
                box.of(plane)[:] = 0
    return image


def _generate_whole(
    pipeline: Pipeline,
    sample_: Sample,
    options: SampleOptions,
    progress: Progress | None,
    canvas: Canvas,
) -> np.ndarray:
    batch = collate([sample_], pipeline.spec)
    return to_uint8(generate_batch(pipeline, batch, options, progress, canvas))[0]


def make_result(
    pipeline: Pipeline,
    photo: Photo,
    hole: np.ndarray,
    made: np.ndarray,
    options: SampleOptions,
) -> Result:
    """`made` with all that is to be remembered of it."""
    settings = {
        **options.as_dict(),
        "base": pipeline.bundle.name,
        "control": pipeline.control,
        "conditioning": pipeline.spec.label,
        "guidance_scale": guidance_scale(pipeline, options),
        "dtype": str(pipeline.bundle.unet.dtype).removeprefix("torch."),
        "device": str(pipeline.bundle.device),
    }
    return Result(image=made, alpha=photo.alpha, known=photo.rgb, mask=hole, settings=settings)


def save_sheet(results: Sequence[Result], file: Path) -> Path:
    """Write the pictures of several results as one, in rows as long as they are many."""
    small = [within(result.image, PANEL) for result in results]
    across = int(np.ceil(np.sqrt(len(small))))
    return save_image(file, grid([small[i : i + across] for i in range(0, len(small), across)]))

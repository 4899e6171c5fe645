"""Completing pictures: holes are generated, known pixels come back as the bytes they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from controlfill.data.hints import check_range
from controlfill.data.sample import Batch, Sample, collate
from controlfill.diffusion.condition import encode_condition, known_latents, latent_mask
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.sampler import (
    Control,
    Denoise,
    Guidance,
    Known,
    make_scheduler,
    sample,
    times_between,
)
from controlfill.diffusion.tiles import (
    Place,
    Predict,
    TiledDenoise,
    Windows,
    decode_tiled,
    draw_noise,
    make_windows,
)
from controlfill.errors import UserError
from controlfill.images import (
    Photo,
    as_mask,
    as_photo,
    as_rgb,
    grid,
    pad_to_multiple,
    paste,
    resize,
    save_image,
    to_uint8,
)
from controlfill.inference.pipeline import Pipeline, Progress
from controlfill.models.bundle import Bundle
from controlfill.options import SampleOptions

PANEL = 512
# Pictures up to so many times the base's own side are seen whole, unless told otherwise.
WHOLE = 1.5


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
        scale = min(1.0, PANEL / max(self.mask.shape))
        height, width = (max(1, round(side * scale)) for side in self.mask.shape)
        return grid([[resize(panel, (height, width)) for panel in panels]])


def inpaint(
    pipeline: Pipeline,
    image: Any,
    mask: Any,
    options: SampleOptions,
    progress: Progress | None = None,
) -> Result:
    """Fill the white part of `mask` in `image`, of any size.

    Both are paths, PIL pictures, numpy arrays or tensors. Raises UserError when their sizes differ
    or the mask is black, and InterruptedError when `progress` returns False.
    """
    photo = as_photo(image)
    return complete(pipeline, photo, as_mask(mask, photo.size), options, progress)


def complete(
    pipeline: Pipeline,
    photo: Photo,
    hole: np.ndarray,
    options: SampleOptions,
    progress: Progress | None = None,
    old: tuple[int, int] = (0, 0),
) -> Result:
    """Fill the white part of `hole` in `photo`; `old` is the pixel at which an older canvas began.

    Latent cells keep their places and their noise while a canvas grows around that pixel.
    """
    if pipeline.spec.given:
        raise UserError(
            f"this ControlNet was trained with {pipeline.spec.label}: it follows a conditioning "
            "picture and fills no holes"
        )
    factor = pipeline.bundle.factor
    above, before = (-at % factor for at in old)
    shifted = Sample(
        image=_shift(photo.rgb, above, before),
        mask=_shift(hole, above, before),
        prompt=options.prompt,
    )
    origin = (-(old[0] + above) // factor, -(old[1] + before) // factor)
    generated = _generate(pipeline, shifted, options, progress, origin)[above:, before:]
    return _result(pipeline, photo, hole, generated, options)


def _shift(image: np.ndarray, above: int, before: int) -> np.ndarray:
    """Repeat the first row and column so many times."""
    return cv2.copyMakeBorder(image, above, 0, before, 0, cv2.BORDER_REPLICATE)


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
    generated = _generate(pipeline, sample_, options, progress)
    return _result(pipeline, photo, everything, generated, options)


def _generate(
    pipeline: Pipeline,
    sample_: Sample,
    options: SampleOptions,
    progress: Progress | None,
    origin: Place = (0, 0),
) -> np.ndarray:
    """What the networks make of one sample, uint8, padded to the size that they can take."""
    parts = {"image": sample_.image, "mask": sample_.mask, "hint": sample_.hint}
    multiple = pipeline.bundle.size_multiple
    padded = {n: pad_to_multiple(p, multiple) for n, p in parts.items() if p is not None}
    batch = collate([replace(sample_, **padded)], pipeline.spec)
    with pipeline.lock:
        return to_uint8(generate_batch(pipeline, batch, options, progress, origin))[0]


def _result(
    pipeline: Pipeline,
    photo: Photo,
    hole: np.ndarray,
    generated: np.ndarray,
    options: SampleOptions,
) -> Result:
    height, width = photo.size
    settings = {
        **options.as_dict(),
        "base": pipeline.bundle.name,
        "control": pipeline.control,
        "conditioning": pipeline.spec.label,
        "guidance_scale": guidance_scale(pipeline, options),
        "dtype": str(pipeline.bundle.unet.dtype).removeprefix("torch."),
        "device": str(pipeline.bundle.device),
    }
    return Result(
        image=paste(photo.rgb, generated[:height, :width], hole, options.feather),
        alpha=photo.alpha,
        known=photo.rgb,
        mask=hole,
        settings=settings,
    )


def guidance_scale(pipeline: Pipeline, options: SampleOptions) -> float:
    """The guidance scale asked for, or the base's usual one."""
    asked = options.guidance_scale
    return pipeline.bundle.guidance_scale if asked is None else asked


@torch.no_grad()
def generate_batch(
    pipeline: Pipeline,
    batch: Batch,
    options: SampleOptions,
    progress: Progress | None = None,
    origin: Place = (0, 0),
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] for a batch whose sides fit the base; nothing is pasted.

    `origin` is the latent cell at which the canvas begins, for noise that belongs to places.
    """
    bundle = pipeline.bundle
    batch = batch.to(bundle.device)
    check_range(batch.hint, batch.mask, pipeline.spec)
    rng = torch.Generator().manual_seed(options.seed)
    clean = known_latents(bundle, batch)
    noise = draw_noise(options.seed, clean.shape, origin).to(clean)
    known = Known(latents=clean, mask=latent_mask(batch.mask, bundle.factor))
    scheduler = make_scheduler(
        options.scheduler, bundle.scheduler_config, options.num_inference_steps, bundle.device
    )
    denoise = make_denoise(pipeline, batch, options, known.mask, scheduler.timesteps)
    latents, total = noise, len(scheduler.timesteps)
    for done, latents in enumerate(sample(denoise, scheduler, noise, rng, known), 1):  # noqa: B007
        if progress is not None and progress(done, total) is False:
            raise InterruptedError(f"cancelled after {done} of {total} steps")
    if not bool(torch.isfinite(latents).all()):
        raise UserError("sampling gave values that are no numbers; try --mixed_precision no")
    return decode_tiled(bundle, latents)


def make_denoise(
    pipeline: Pipeline, batch: Batch, options: SampleOptions, open_: Tensor, times: Tensor
) -> Predict:
    """The denoiser of one request: its prompts, hint, guidance and control, in windows.

    `open_` (B, 1, h, w) is above 0 where latents are to be generated; `times` are the run's.
    """
    bundle = pipeline.bundle
    condition = encode_condition(bundle, pipeline.spec, batch)
    guidance = make_guidance(pipeline, options, len(batch.prompts), times)
    control = Control(
        scale=options.controlnet_conditioning_scale,
        times=times_between(times, options.control_guidance_start, options.control_guidance_end),
        prompted_only=options.control_prompted_only,
    )
    windows = choose_windows(bundle, (open_.shape[2], open_.shape[3]), options)

    def part(places: Sequence[Place]) -> Denoise:
        return Denoise(
            ControlDenoiser(bundle.unet),
            pipeline.network,
            condition.part(windows, places),
            guidance.repeated(len(places)) if guidance else None,
            control,
        )

    if windows.size == windows.canvas:
        return part([(0, 0)])
    return TiledDenoise(part, windows, open_.amax(dim=(0, 1)), options.window_batch)


def make_guidance(
    pipeline: Pipeline, options: SampleOptions, count: int, times: Tensor
) -> Guidance | None:
    """Guidance of `count` pictures as `options` ask; None where it would change nothing."""
    scale = guidance_scale(pipeline, options)
    during = times_between(times, options.guidance_start, options.guidance_end)
    if scale == 1 or during == frozenset():
        return None
    negative = pipeline.bundle.text.encode([options.negative_prompt] * count)
    return Guidance(scale=scale, without=negative, times=during)


def choose_windows(bundle: Bundle, canvas: tuple[int, int], options: SampleOptions) -> Windows:
    """The windows, in cells, through which a `canvas` of cells is seen. Raises UserError."""
    native, side = bundle.native_size, options.window_size
    if side is None:
        whole = max(canvas) * bundle.factor <= WHOLE * native
        side = 0 if whole else native
    if side % bundle.size_multiple:
        raise UserError(
            f"--window_size is {side}, but {bundle.name} needs a multiple of {bundle.size_multiple}"
        )
    cells = side // bundle.factor or max(canvas)
    return make_windows(canvas, cells, round(cells * options.window_overlap))

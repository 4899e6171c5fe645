"""From a batch to pictures: what is known, where sampling starts, what the networks are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from controlfill.data.hints import check_range
from controlfill.data.sample import Batch
from controlfill.diffusion.clip_guidance import ClipGuide, ClipGuided
from controlfill.diffusion.condition import encode_condition, known_latents, latent_mask
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.sampler import (
    Control,
    Denoise,
    Guidance,
    Known,
    Start,
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
    encode_tiled,
    make_windows,
    place_seed,
)
from controlfill.errors import UserError
from controlfill.images import from_bytes
from controlfill.inference.pipeline import Pipeline, Progress
from controlfill.models.bundle import Bundle
from controlfill.models.clip import load_clip
from controlfill.options import SampleOptions

# Pictures up to so many times the base's own side are seen whole, unless told otherwise.
WHOLE = 1.5


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Where and how softly a canvas is painted.

    `origin` is the latent cell at which it begins, for noise that belongs to places; `soft`, a
    mask of greys uint8 (H, W), how much may change where.
    """

    origin: Place = (0, 0)
    soft: np.ndarray | None = None


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
    canvas: Canvas = Canvas(),
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] for a batch whose sides fit the base; nothing is pasted.

    The first picture's seed is that of `options`, and each next one's is one more, whatever the
    size of the batch.
    """
    bundle = pipeline.bundle
    batch = batch.to(bundle.device)
    check_range(batch.hint, batch.mask, pipeline.spec)
    scheduler = make_scheduler(
        options.scheduler, bundle.scheduler_config, options.num_inference_steps, bundle.device
    )
    open_ = open_cells(batch, canvas, bundle.factor)
    known = make_known(bundle, batch, canvas, open_)
    seeds = range(options.seed, options.seed + len(batch.prompts))
    shape = (bundle.vae.config["latent_channels"], *open_.shape[2:])
    noise = draw_noise(seeds, shape, canvas.origin).to(bundle.device, bundle.unet.dtype)
    rngs = [torch.Generator().manual_seed(place_seed(seed, canvas.origin)) for seed in seeds]
    start = make_start(bundle, batch, options.strength, len(scheduler.timesteps))
    guide = make_clip_guide(pipeline, batch, options, scheduler.timesteps, canvas.origin)
    denoise = make_denoise(pipeline, batch, options, open_, scheduler.timesteps, guide)
    latents, total = noise, len(scheduler.timesteps) - (start.step if start else 0)
    steps = sample(denoise, scheduler, noise, rngs, known, start)
    for done, latents in enumerate(steps, 1):  # noqa: B007
        if progress is not None and progress(done, total) is False:
            raise InterruptedError(f"cancelled after {done} of {total} steps")
    if not bool(torch.isfinite(latents).all()):
        raise UserError("sampling gave values that are no numbers; try --mixed_precision no")
    return decode_tiled(bundle, latents)


def open_cells(batch: Batch, canvas: Canvas, factor: int) -> Tensor:
    """How much may change in each latent cell, (B, 1, h, w) in [0, 1]."""
    if canvas.soft is None:
        return latent_mask(batch.mask, factor)
    soft = from_bytes(torch.from_numpy(canvas.soft[None, ..., None])).to(batch.mask)
    return latent_mask(soft, factor)


def make_known(bundle: Bundle, batch: Batch, canvas: Canvas, open_: Tensor) -> Known | None:
    """What of `batch` is to be put back after each step; under a soft mask all, for a while.

    None where nothing is known, and for inpaint UNets, which see it themselves; that of
    glid-3-xl-stable sees no mask, and its colours drift where nothing is put back.
    """
    if canvas.soft is not None:
        return Known(latents=encode_tiled(bundle, batch.image * 2 - 1), mask=open_)
    if (bundle.sees_masks and not bundle.is_glid) or bool(open_.all()):
        return None
    return Known(latents=known_latents(bundle, batch), mask=open_)


def make_start(bundle: Bundle, batch: Batch, strength: float, steps: int) -> Start | None:
    """Where a run of `steps` begins that redraws only by `strength`; None for pure noise."""
    if strength >= 1:
        return None
    step = steps - max(1, round(steps * strength))
    return Start(latents=encode_tiled(bundle, batch.image * 2 - 1), step=step)


def make_denoise(
    pipeline: Pipeline,
    batch: Batch,
    options: SampleOptions,
    open_: Tensor,
    times: Tensor,
    guide: ClipGuide | None = None,
) -> Predict:
    """The denoiser of one request: its prompts, hint, guidance and control, in windows.

    `open_` (B, 1, h, w) is above 0 where latents are to be generated; `times` are the run's. Each
    window is led by `guide`, if there is one.
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

    def part(places: Sequence[Place]) -> Predict:
        denoise = Denoise(
            pipeline.denoiser or ControlDenoiser(bundle.unet),
            pipeline.network,
            condition.part(windows, places),
            guidance.repeated(len(places)) if guidance else None,
            control,
        )
        return ClipGuided(denoise, guide, places) if guide else denoise

    if windows.size == windows.canvas:
        return part([(0, 0)])
    return TiledDenoise(part, windows, open_.amax(dim=(0, 1)), options.window_batch)


def make_guidance(
    pipeline: Pipeline, options: SampleOptions, count: int, times: Tensor
) -> Guidance | None:
    """Guidance of `count` pictures as `options` ask; None where it would change nothing."""
    scale = guidance_scale(pipeline, options)
    during = times_between(times, options.guidance_start, options.guidance_end, wholly=False)
    if scale == 1 or during == frozenset():
        return None
    negative = pipeline.bundle.text.encode([options.negative_prompt] * count)
    return Guidance(scale=scale, without=negative, times=during)


def make_clip_guide(
    pipeline: Pipeline, batch: Batch, options: SampleOptions, times: Tensor, origin: Place
) -> ClipGuide | None:
    """CLIP guidance of a batch as `options` ask; None where they don't. Raises UserError."""
    if not options.clip_guidance_scale:
        return None
    check_clip_guidance(pipeline, options, batch.prompts)
    bundle = pipeline.bundle
    clip = load_clip(str(options.clip_guidance_model), bundle.device)
    return ClipGuide(
        clip=clip,
        bundle=bundle,
        wanted=clip.read(batch.prompts),
        seeds=range(options.seed, options.seed + len(batch.prompts)),
        scale=options.clip_guidance_scale,
        cuts=options.clip_guidance_cutouts,
        times=times_between(times, 0, options.clip_guidance_end, wholly=False),
        origin=origin,
    )


def check_clip_guidance(pipeline: Pipeline, options: SampleOptions, prompts: Sequence[str]) -> None:
    """Raise UserError when CLIP guidance lacks what it needs."""
    if options.clip_guidance_model is None:
        raise UserError(
            "--clip_guidance_scale needs --clip_guidance_model, a CLIP's folder or hub id such as "
            "openai/clip-vit-base-patch32"
        )
    if not all(prompts):
        raise UserError("--clip_guidance_scale needs a --prompt, which pictures are to come nearer")
    if pipeline.denoiser is not None:
        raise UserError(
            "--clip_guidance_scale needs gradients, which --engine openvino does not give; use "
            "--engine torch"
        )


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

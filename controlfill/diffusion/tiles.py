"""Tiles: canvases of any size through networks that know one size.

Predictions of overlapping windows are averaged with smooth weights; the scheduler then makes one
step on the whole canvas (MultiDiffusion, Bar-Tal et al. 2023), so any scheduler works. Pictures go
through the VAE in windows of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from controlfill.models.bundle import Bundle

Place = tuple[int, int]
Predict = Callable[[Tensor, Tensor], Tensor]
Size = tuple[int, int]
Cells = TypeVar("Cells", Tensor, np.ndarray)
# Side of the blocks of cells that share a seed: another number would be other noise.
BLOCK = 32
# Batches of windows whose denoisers, with their embedded hints, are kept from step to step.
KEPT = 16
# Side of a window of the VAE, and what neighbours share of it, in pixels.
VAE_WINDOW, VAE_OVERLAP = 512, 128


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows begin on one axis: neighbours share `overlap` or more, the last ends flush."""
    if length <= window:
        return [0]
    return [*range(0, length - window, window - overlap), length - window]


def ramp(length: int, overlap: int) -> Tensor:
    """Weights (length,) of a window along one axis: above 0, rising smoothly over `overlap`."""
    place = torch.arange(length, dtype=torch.float32) + 0.5
    inwards = torch.minimum(place, length - place) / max(overlap, 0.5)
    return torch.sin(inwards.clamp(max=1) * torch.pi / 2) ** 2


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of `size` (h, w) over a `canvas` (H, W), each sharing `overlap` with the next."""

    canvas: Size
    size: Size
    overlap: int

    def places(self) -> list[Place]:
        """The (top, left) of every window, row by row; together they cover the canvas."""
        down, right = (
            starts(length, window, self.overlap)
            for length, window in zip(self.canvas, self.size, strict=True)
        )
        return [(top, left) for top in down for left in right]

    def weight(self) -> Tensor:
        """The weights (h, w) of a window in the average, all above 0."""
        down, right = (ramp(side, self.overlap) for side in self.size)
        return down[:, None] * right

    def seeing(self, open_: Cells) -> list[Place]:
        """The places of those windows in which something of `open_` (H, W) is above 0."""
        return [place for place in self.places() if self.part(open_, place).any()]

    def part(self, canvas: Cells, place: Place, scale: int = 1) -> Cells:
        """The window at `place` of (..., H, W), a view; `scale` elements make one unit."""
        (top, left), (height, width) = (
            tuple(scale * n for n in pair) for pair in (place, self.size)
        )
        return canvas[..., top : top + height, left : left + width]

    def stack(self, canvas: Tensor, places: Sequence[Place], scale: int = 1) -> Tensor:
        """The windows at `places` of (B, C, H, W) as one batch: first all of the first place."""
        return torch.cat([self.part(canvas, place, scale) for place in places])


def make_windows(canvas: Size, side: int, overlap: int) -> Windows:
    """Windows of `side`, smaller where the canvas is."""
    height, width = (min(side, length) for length in canvas)
    return Windows(canvas=canvas, size=(height, width), overlap=overlap)


class Blend:
    """A canvas on which overlapping windows are averaged by their weights."""

    def __init__(self, windows: Windows, like: Tensor) -> None:
        self.windows = windows
        self.weight = windows.weight().to(like)
        self.total = like.new_zeros((*like.shape[:2], *windows.canvas))
        self.weights = like.new_zeros(windows.canvas)

    def add(self, place: Place, values: Tensor) -> None:
        """Add (B, C, h, w), the window at `place`."""
        self.windows.part(self.total, place).add_(values * self.weight)
        self.windows.part(self.weights, place).add_(self.weight)

    def mean(self) -> Tensor:
        """The average (B, C, H, W); 0 where no window was."""
        return self.total.div_(self.weights.clamp(min=1e-12))


class TiledDenoise:
    """A denoiser of a whole canvas that looks at it in windows, `batch` of them at a time.

    `part` makes the denoiser of the windows at some places. Windows of which nothing is `open_`
    (H, W) are left out: what is known is put back after every step anyway.
    """

    def __init__(
        self,
        part: Callable[[Sequence[Place]], Predict],
        windows: Windows,
        open_: Tensor,
        batch: int,
    ) -> None:
        self.part, self.windows = part, windows
        places = windows.seeing(open_)
        self.batches = [places[i : i + batch] for i in range(0, len(places), batch)]
        few = len(self.batches) <= KEPT
        self.kept = {i: part(places) for i, places in enumerate(self.batches) if few}

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        """The prediction for `latents` (B, C, H, W) at the single timestep `t`."""
        blend = Blend(self.windows, latents)
        for number, places in enumerate(self.batches):
            part = self.kept.get(number) or self.part(places)
            predicted = part(self.windows.stack(latents, places), t)
            for place, values in zip(places, predicted.chunk(len(places)), strict=True):
                blend.add(place, values)
        return blend.mean()


def encode_tiled(bundle: Bundle, image: Tensor) -> Tensor:
    """Latents of (B, 3, H, W) in [-1, 1], in windows where it is larger than one."""
    factor = bundle.factor
    windows = vae_windows((image.shape[2] // factor, image.shape[3] // factor), factor)
    return _in_windows(windows, lambda p: bundle.encode_image(windows.part(image, p, factor)))


def decode_tiled(bundle: Bundle, latents: Tensor) -> Tensor:
    """The picture (B, 3, H, W) in [0, 1] of `latents`, in windows where they are larger than one.

    A VAE's GroupNorm sees one window only, so colours of neighbours differ a little; the smooth
    weights turn that into a gradient that nobody sees.
    """
    factor = bundle.factor
    small = vae_windows((latents.shape[2], latents.shape[3]), factor)
    large = Windows(
        canvas=(small.canvas[0] * factor, small.canvas[1] * factor),
        size=(small.size[0] * factor, small.size[1] * factor),
        overlap=VAE_OVERLAP,
    )
    return _in_windows(
        large,
        lambda p: bundle.decode(small.part(latents, (p[0] // factor, p[1] // factor))),
    )


def vae_windows(canvas: Size, factor: int) -> Windows:
    """Windows of cells for the VAE; only one for pictures little larger than a window."""
    side, overlap = VAE_WINDOW // factor, VAE_OVERLAP // factor
    return make_windows(canvas, side if max(canvas) > side * 1.5 else max(canvas), overlap)


def _in_windows(windows: Windows, make: Callable[[Place], Tensor]) -> Tensor:
    places = windows.places()
    if len(places) == 1:
        return make(places[0])
    first = make(places[0])
    blend = Blend(windows, first)
    blend.add(places[0], first)
    for place in places[1:]:
        blend.add(place, make(place))
    return blend.mean()


def draw_noise(seeds: Sequence[int], shape: Sequence[int], origin: Place = (0, 0)) -> Tensor:
    """Unit noise (B, C, h, w) that belongs to places: the same cell always has the same noise.

    One picture for each of `seeds`, each (C, h, w) of `shape`. `origin` is the place of the first
    cell; a canvas that grew upwards or to the left has a negative one.
    """
    channels, height, width = shape
    (top, left), (bottom, right) = origin, (origin[0] + height, origin[1] + width)
    rows = range(top // BLOCK, -(-bottom // BLOCK))
    columns = range(left // BLOCK, -(-right // BLOCK))
    blocks = torch.cat(
        [
            torch.cat([_block(seeds, channels, (row, column)) for column in columns], dim=-1)
            for row in rows
        ],
        dim=-2,
    )
    down, along = top - rows.start * BLOCK, left - columns.start * BLOCK
    return blocks[..., down : down + height, along : along + width].contiguous()


def _block(seeds: Sequence[int], channels: int, place: Place) -> Tensor:
    """The noise (B, C, BLOCK, BLOCK) of one block."""
    drawn = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(place_seed(seed, place))
        drawn.append(torch.randn((channels, BLOCK, BLOCK), generator=rng))
    return torch.stack(drawn)


def place_seed(seed: int, place: Place) -> int:
    """A seed of its own for each place."""
    # Words of a seed are never negative, places may be.
    words = (seed, place[0] + 2**31, place[1] + 2**31)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])

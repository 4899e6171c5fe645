"""Samples, which a person can look at, and batches, which a network can eat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from controlfill.data.hints import Spec
from controlfill.data.masks import MaskRecipe, Objects, no_objects
from controlfill.errors import UserError
from controlfill.images import resize, resize_mask, to_tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture with its words.

    `image` is uint8 RGB (H, W, 3). `mask` is uint8 (H, W), 255 = generate, or None when one is to
    be drawn. `prompts` are other wordings, of which one is drawn each time instead of `prompt`.
    `objects` gives masks of things in the picture, of any size with the picture's aspect. `hint` is
    the conditioning picture of a general ControlNet, uint8 RGB (H, W, 3) like `image`.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    hint: np.ndarray | None = None
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    objects: Objects = no_objects
    name: str = ""


class Source(Protocol):
    """Anything with a length that gives a Sample for an index: the way to bring your own data.

    A UserError raised by `__getitem__` means that this picture can't be used: it is skipped,
    counted and named, and training goes on.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One cut, resize and flip, the same for a picture and all that lies on it.

    The square of the short side is cut at the share `place` (0 to 1) of what is left over, then
    resized to `side`: cutting first keeps long thin pictures from growing beyond all memory.
    """

    side: int
    place: float
    flip: bool

    def of_image(self, image: np.ndarray) -> np.ndarray:
        """The (side, side, 3) cut of a picture of any size."""
        return resize(self._cut(image), (self.side, self.side))

    def of_mask(self, mask: np.ndarray) -> np.ndarray:
        """The (side, side) cut of a mask of any size."""
        return resize_mask(self._cut(mask), (self.side, self.side))

    def _cut(self, array: np.ndarray) -> np.ndarray:
        short = min(array.shape[:2])
        top, left = (round(self.place * (length - short)) for length in array.shape[:2])
        part = array[top : top + short, left : left + short]
        return np.ascontiguousarray(part[:, ::-1] if self.flip else part)


def draw_geometry(
    side: int, rng: np.random.Generator, crop: str = "random", random_flip: bool = False
) -> Geometry:
    """A square cut at random or from the centre, mirrored half of the time if asked."""
    place = 0.5 if crop == "center" else float(rng.uniform())
    return Geometry(side=side, place=place, flip=random_flip and bool(rng.uniform() < 0.5))


def move_to_hole(geometry: Geometry, mask: np.ndarray, rng: np.random.Generator) -> Geometry:
    """`geometry`, moved so that its cut shows some of the mask's white."""
    if geometry.of_mask(mask).any():
        return geometry
    longer = int(mask.shape[1] > mask.shape[0])
    spots = np.nonzero(mask.any(axis=1 - longer))[0]
    short, long = sorted(mask.shape)
    start = spots[rng.integers(len(spots))] - short / 2
    return replace(geometry, place=float(np.clip(start / (long - short), 0, 1)))


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a source's samples become squares with masks."""

    side: int
    recipe: MaskRecipe
    crop: str = "random"
    random_flip: bool = False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """`sample` as a (side, side) square with a mask; all chance comes from `rng`."""
        check_sample(sample)
        geometry = draw_geometry(self.side, rng, self.crop, self.random_flip)

        def objects() -> Sequence[np.ndarray]:
            return [geometry.of_mask(mask) for mask in sample.objects()]

        if sample.mask is not None:
            given = np.where(sample.mask > 0, 255, 0).astype(np.uint8)
            geometry = move_to_hole(geometry, given, rng)
            mask = geometry.of_mask(given)
        elif sample.hint is not None:
            mask = np.full((self.side, self.side), 255, np.uint8)
        else:
            mask = self.recipe.draw((self.side, self.side), rng, objects)
        return replace(
            sample,
            image=geometry.of_image(sample.image),
            mask=mask,
            hint=None if sample.hint is None else geometry.of_image(sample.hint),
            prompt=str(rng.choice(sample.prompts)) if sample.prompts else sample.prompt,
            prompts=(),
            objects=no_objects,
        )


def check_sample(sample: Sample) -> None:
    """Raise TypeError when a source gives something else than the interface says."""
    image, mask, hint = sample.image, sample.mask, sample.hint
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        found = f"{getattr(image, 'dtype', type(image))} {getattr(image, 'shape', '')}"
        raise TypeError(f"Sample.image must be uint8 RGB (H, W, 3), not {found}")
    if mask is not None and (mask.shape != image.shape[:2] or not mask.any()):
        raise TypeError(
            f"Sample.mask must be (H, W) of the picture with some white, not {mask.shape}"
        )
    if hint is not None and (hint.shape != image.shape or hint.dtype != np.uint8):
        raise TypeError(
            f"Sample.hint must be uint8 RGB of the picture's size {image.shape}, not {hint.shape}"
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass eats.

    `image` (B, 3, H, W) in [0, 1], `mask` (B, 1, H, W) of 0 and 1, `hint` as its spec says, the
    prompts, and why pictures had to be skipped on the way.
    """

    image: Tensor
    mask: Tensor
    hint: Tensor
    prompts: list[str]
    skipped: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        image, mask, hint = (t.to(device) for t in (self.image, self.mask, self.hint))
        return replace(self, image=image, mask=mask, hint=hint)


def collate(samples: Sequence[Sample], spec: Spec, skipped: Sequence[str] = ()) -> Batch:
    """Stack prepared samples of one size and make their hints by `spec`."""
    masks = [s.mask for s in samples if s.mask is not None]
    hints = [s.hint for s in samples if s.hint is not None]
    image = to_tensor(np.stack([s.image for s in samples]))
    mask = (to_tensor(np.stack(masks)[..., None]) > 0.5).float()
    return Batch(
        image=image,
        mask=mask,
        hint=to_tensor(np.stack(hints)) if hints and spec.given else spec.make(image, mask),
        prompts=[s.prompt for s in samples],
        skipped=list(skipped),
    )


class PreparedSource(torch.utils.data.Dataset[tuple[Sample, list[str]]]):
    """A source seen through a Preparation: (epoch, index) gives a sample and what was skipped.

    The sample is a function of (seed, epoch, index) alone, so any number of worker processes reads
    the same data. A picture that can't be used is replaced by the next one that can.
    """

    def __init__(self, source: Source, preparation: Preparation, seed: int) -> None:
        self.source, self.preparation, self.seed = source, preparation, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Sample, list[str]]:
        epoch, first = place
        skipped: list[str] = []
        for step in range(len(self.source)):
            index = (first + step) % len(self.source)
            rng = np.random.default_rng((self.seed, epoch, index))
            try:
                return self.preparation(self.source[index], rng), skipped
            except UserError as error:
                skipped.append(str(error))
        raise UserError(f"none of the {len(self.source)} pictures can be used: {skipped[0]}")

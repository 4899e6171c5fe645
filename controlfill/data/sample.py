"""Samples, which a person can look at, and batches, which a network can eat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from controlfill.data.buckets import Buckets
from controlfill.data.geometry import Label, draw_geometry, move_to_hole
from controlfill.data.hints import Spec
from controlfill.data.masks import MaskRecipe, Objects, no_objects
from controlfill.errors import UserError
from controlfill.images import from_bytes, white_where


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture with its words.

    `image` is uint8 RGB (H, W, 3). `mask` is uint8 (H, W), 255 = generate, or None when one is to
    be drawn. `prompts` are other wordings, of which one is drawn each time instead of `prompt`.
    `objects` gives masks of things in the picture, of any size with the picture's aspect. `hint` is
    the conditioning picture of a general ControlNet, uint8 RGB (H, W, 3) like `image`. `labels` are
    texts in the picture. `moments` (2, C, h, w) come from a latent cache. `framing` is the size of
    the picture that this is a cut of, the cut's corner and its size, where it is a cut. `weight` is
    what it counts in the loss.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    hint: np.ndarray | None = None
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    objects: Objects = no_objects
    labels: tuple[Label, ...] = ()
    name: str = ""
    moments: np.ndarray | None = None
    framing: tuple[int, ...] = ()
    weight: float = 1.0


class Source(Protocol):
    """Anything with a length that gives a Sample for an index: the way to bring your own data.

    A UserError raised by `__getitem__` means that this picture can't be used: it is skipped,
    counted and named, and training goes on.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a source's samples become cuts of one size with masks."""

    side: int
    recipe: MaskRecipe
    crop: str = "random"
    random_flip: bool = False

    def __call__(
        self,
        sample: Sample,
        rng: np.random.Generator,
        size: tuple[int, int] | None = None,
        cut_rng: np.random.Generator | None = None,
    ) -> Sample:
        """`sample` cut to `size`, or to a (side, side) square, with a mask.

        All chance comes from `rng`, that of the cut from `cut_rng` where cuts must repeat.
        """
        check_sample(sample)
        size, cut_rng = size or (self.side, self.side), cut_rng or rng
        geometry = draw_geometry(size, cut_rng, self.crop, self.random_flip)

        def objects() -> Sequence[np.ndarray]:
            return [geometry.of_mask(mask) for mask in sample.objects()]

        if sample.mask is not None:
            given = white_where(sample.mask > 0)
            geometry = move_to_hole(geometry, given, cut_rng)
            mask = geometry.of_mask(given)
        elif sample.hint is not None:
            mask = np.full(size, 255, np.uint8)
        else:
            mask = self.recipe.draw(size, rng, objects)
        shape = sample.image.shape[:2]
        return replace(
            sample,
            image=geometry.of_image(sample.image),
            mask=mask,
            hint=None if sample.hint is None else geometry.of_image(sample.hint),
            labels=geometry.of_labels(sample.labels, shape),
            prompt=str(rng.choice(sample.prompts)) if sample.prompts else sample.prompt,
            prompts=(),
            objects=no_objects,
            framing=geometry.framing(shape),
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
    prompts, and why pictures had to be skipped on the way. `moments` (B, 2, C, h, w), from a latent
    cache, are mean and deviation of the VAE's posterior. `labels` are each picture's texts, and
    `framings` what each is a cut of; without them, each picture is a whole one. `weights` (B,) are
    what each counts in the loss, where they don't all count alike.
    """

    image: Tensor
    mask: Tensor
    hint: Tensor
    prompts: list[str]
    skipped: list[str] = field(default_factory=list)
    moments: Tensor | None = None
    labels: list[tuple[Label, ...]] = field(default_factory=list)
    framings: list[tuple[int, ...]] = field(default_factory=list)
    weights: Tensor | None = None

    def framing(self) -> Tensor:
        """What SDXL is told of each picture, (B, 6): see Geometry.framing."""
        size = tuple(self.image.shape[2:])
        told = [known or (*size, 0, 0, *size) for known in self.framings or [()] * len(self.image)]
        return torch.tensor(told, dtype=torch.float32, device=self.image.device)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        image, mask, hint = (t.to(device) for t in (self.image, self.mask, self.hint))
        moments, weights = (
            None if t is None else t.to(device) for t in (self.moments, self.weights)
        )
        return replace(self, image=image, mask=mask, hint=hint, moments=moments, weights=weights)

    def take(self, rows: Sequence[int]) -> Batch:
        """The pictures of `rows`, in that order; one may come twice."""
        places = torch.tensor(rows, device=self.image.device)
        image, mask, hint = (t[places] for t in (self.image, self.mask, self.hint))
        return replace(
            self,
            image=image,
            mask=mask,
            hint=hint,
            prompts=[self.prompts[row] for row in rows],
            moments=None if self.moments is None else self.moments[places],
            labels=[self.labels[row] for row in rows] if self.labels else [],
            framings=[self.framings[row] for row in rows] if self.framings else [],
            weights=None if self.weights is None else self.weights[places],
        )


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A batch as it leaves a worker process: bytes, a quarter of the size of a Batch's floats.

    `image` uint8 (B, H, W, 3), `mask` uint8 (B, H, W), `hint` like `image` where the data gave one.
    """

    image: Tensor
    mask: Tensor
    hint: Tensor | None
    prompts: list[str]
    skipped: list[str]
    moments: Tensor | None
    spec: Spec
    labels: list[tuple[Label, ...]] = field(default_factory=list)
    framings: list[tuple[int, ...]] = field(default_factory=list)
    weights: Tensor | None = None

    def pin_memory(self) -> Stack:
        """The same in page-locked memory, from which a GPU copies without waiting."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Stack:
        names = ("image", "mask", "hint", "moments", "weights")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{n: change(t) for n, t in parts.items() if t is not None})

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`, as floats and with its hint; made there."""
        here = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        image = from_bytes(here.image)
        mask = (from_bytes(here.mask[..., None]) > 0.5).float()
        given = here.hint if self.spec.given else None
        return Batch(
            image=image,
            mask=mask,
            hint=self.spec.make(image, mask) if given is None else from_bytes(given),
            prompts=self.prompts,
            skipped=self.skipped,
            moments=here.moments,
            labels=self.labels,
            framings=self.framings,
            weights=here.weights,
        )


def stack(samples: Sequence[Sample], spec: Spec, skipped: Sequence[str] = ()) -> Stack:
    """Stack prepared samples of one size."""
    masks = [s.mask for s in samples if s.mask is not None]
    hints = [s.hint for s in samples if s.hint is not None]
    moments = [s.moments for s in samples if s.moments is not None]
    weights = [s.weight for s in samples]
    return Stack(
        image=torch.from_numpy(np.stack([s.image for s in samples])),
        mask=torch.from_numpy(np.stack(masks)),
        hint=torch.from_numpy(np.stack(hints)) if hints else None,
        prompts=[s.prompt for s in samples],
        skipped=list(skipped),
        moments=torch.from_numpy(np.stack(moments)) if moments else None,
        spec=spec,
        labels=[s.labels for s in samples],
        framings=[s.framing for s in samples],
        weights=torch.tensor(weights) if set(weights) != {1.0} else None,
    )


def collate(samples: Sequence[Sample], spec: Spec, skipped: Sequence[str] = ()) -> Batch:
    """Stack prepared samples of one size and make their hints by `spec`."""
    return stack(samples, spec, skipped).to("cpu")


class Latents(Protocol):
    """A cache of posteriors: for each picture and each of `variants` cuts of it, its moments."""

    @property
    def variants(self) -> int: ...

    def read(self, index: int, variant: int) -> np.ndarray: ...


class PreparedSource(torch.utils.data.Dataset[tuple[Sample, list[str]]]):
    """A source seen through a Preparation: (epoch, place) gives a sample and what was skipped.

    Only pictures of `indices` are used, all without it; a place is a place among those. The sample
    is a function of (seed, epoch, index) alone, so any number of worker processes reads the same
    data. A picture that can't be used is replaced by the next one of its bucket that can. With a
    cache of latents, cuts repeat after `latents.variants` epochs, masks never do.
    """

    def __init__(
        self,
        source: Source,
        preparation: Preparation,
        seed: int,
        buckets: Buckets | None = None,
        latents: Latents | None = None,
        indices: np.ndarray | None = None,
    ) -> None:
        self.source, self.preparation, self.seed = source, preparation, seed
        self.buckets, self.latents = buckets, latents
        self.indices = np.arange(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def bucket_of(self) -> np.ndarray | None:
        """The bucket of each place, if there are buckets."""
        return self.buckets.of[self.indices] if self.buckets else None

    def __getitem__(self, place: tuple[int, int]) -> tuple[Sample, list[str]]:
        epoch, first = place
        skipped: list[str] = []
        for index in self._after(first):
            try:
                return self._prepare(epoch, index), skipped
            except UserError as error:
                skipped.append(str(error))
        raise UserError(f"none of the {len(self)} pictures can be used: {skipped[0]}")

    def _after(self, first: int) -> Iterator[int]:
        """The picture at place `first` and all after it, around; only those of its bucket."""
        start = self.indices[first]
        for step in range(len(self)):
            index = int(self.indices[(first + step) % len(self)])
            if self.buckets is None or self.buckets.of[index] == self.buckets.of[start]:
                yield index

    def _prepare(self, epoch: int, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, epoch, index))
        size = self.buckets.size_of(index) if self.buckets else None
        if self.latents is None:
            return self.preparation(self.source[index], rng, size)
        variant = epoch % self.latents.variants
        cut = self.preparation(self.source[index], rng, size, cut_rng(self.seed, variant, index))
        return replace(cut, moments=self.latents.read(index, variant))

    def cut(self, index: int, variant: int) -> tuple[np.ndarray, list[str]]:
        """The picture of `index` in its cut number `variant`, for a cache, and all its wordings."""
        rng = np.random.default_rng(0)
        size = self.buckets.size_of(index) if self.buckets else None
        sample = self.source[index]
        bare = replace(sample, hint=sample.image, objects=no_objects, labels=())
        cut = self.preparation(bare, rng, size, cut_rng(self.seed, variant, index)).image
        return cut, list(sample.prompts or [sample.prompt])


def cut_rng(seed: int, variant: int, index: int) -> np.random.Generator:
    """The chance of a cut that repeats: a function of its number, apart from that of masks."""
    return np.random.default_rng((seed, variant, index, 1))

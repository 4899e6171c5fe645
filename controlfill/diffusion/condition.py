"""The condition: all that the network is told, made from a batch the same way everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from controlfill.data.hints import Spec, blanked_image
from controlfill.data.sample import Batch
from controlfill.diffusion.tiles import Place, Windows, encode_tiled
from controlfill.models.bundle import Bundle
from controlfill.models.text import Words, join_words


@dataclass(frozen=True, kw_only=True)
class Condition:
    """`text`, the words of each prompt, and `hint` (B, channels, H, W) of one batch.

    `masked`, for inpaint UNets, is the mask and the latents of the masked picture (B, 5, h, w), or
    in glid-3-xl-stable's layout the known latents alone (B, 4, h, w);
    `framing` (B, 6), the size of each picture and its cut, for those that ask for it (SDXL).
    """

    text: Words
    hint: Tensor
    masked: Tensor | None = None
    framing: Tensor | None = None

    def added(self, rows: slice = slice(None)) -> dict[str, Tensor] | None:
        """What SDXL's networks are told beside the text of each word; None for others."""
        if self.text.pooled is None or self.framing is None:
            return None
        return {"text_embeds": self.text.pooled[rows], "time_ids": self.framing[rows]}

    def doubled(self, without: Words) -> Condition:
        """The condition of classifier-free guidance: `without` prompt first, then this one."""
        both = join_words([without, self.text])
        return self._each(both, lambda tensor: torch.cat([tensor] * 2))

    def last(self, count: int) -> Condition:
        """That of the last `count` samples."""
        return self._each(self.text[-count:], lambda tensor: tensor[-count:])

    def part(self, windows: Windows, places: Sequence[Place]) -> Condition:
        """The condition of the windows at `places`, which count in latent cells."""
        cells, count = windows.canvas[1], len(places)
        text = self.text.repeated(count)
        seen = replace(self, framing=None)
        part = seen._each(text, lambda t: windows.stack(t, places, t.shape[-1] // cells))
        if self.framing is None or windows.size == windows.canvas:
            return replace(part, framing=self.framing)
        # Each window is a picture of its own: none was trained on corners far away.
        side = self.framing[:, -2:] / self.framing.new_tensor(windows.canvas)
        side = (side * side.new_tensor(windows.size)).repeat(count, 1)
        return replace(part, framing=torch.cat([side, torch.zeros_like(side), side], dim=1))

    def _each(self, text: Words, change: Callable[[Tensor], Tensor]) -> Condition:
        """Another `text`, and `change` made to every picture of the condition."""
        return Condition(
            text=text,
            hint=change(self.hint),
            masked=None if self.masked is None else change(self.masked),
            framing=None if self.framing is None else change(self.framing),
        )


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """The mask (B, 1, H, W) at latent size: a cell is open if any of its pixels or neighbours is.

    Max-pooling keeps strokes of one pixel, which nearest sampling loses; the extra cell covers
    what the VAE smears over cell borders.
    """
    cells = F.max_pool2d(mask, factor)
    return F.max_pool2d(cells, kernel_size=3, stride=1, padding=1)


def smooth_fill(image: Tensor, mask: Tensor, sweeps: int = 0) -> Tensor:
    """The picture (B, 3, H, W) with its hole filled by averages of what is known around it.

    Push-pull: averages of known pixels over ever larger blocks, the finest that exist (Gortler et
    al. 1996). The VAE must see neither what the hole hid nor an edge at its rim, since both would
    reach the latents of known pixels; where nothing is known the fill is mid-grey. So many `sweeps`
    of each size of blocks bring it closer to the membrane of Laplace's equation.
    """
    weight = 1 - mask
    summed, weights = [image * weight], [weight]
    while max(summed[-1].shape[-2:]) > 1:
        summed.append(F.avg_pool2d(summed[-1], 2, ceil_mode=True, count_include_pad=False))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True, count_include_pad=False))
    filled = torch.full_like(summed[-1], 0.5)
    for total, known in zip(reversed(summed), reversed(weights), strict=True):
        coarse = F.interpolate(filled, total.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(known > 0, total / known.clamp(min=1e-6), coarse)
        for _ in range(sweeps):
            filled = torch.where(known > 0, filled, neighbours_mean(filled))
    return filled


def neighbours_mean(image: Tensor) -> Tensor:
    """The mean (B, C, H, W) of each pixel's four neighbours; at borders the pixel stands in."""
    wide = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across = wide[..., 1:-1, 2:] + wide[..., 1:-1, :-2]
    return (wide[..., 2:, 1:-1] + wide[..., :-2, 1:-1]).add_(across).div_(4)


def known_latents(bundle: Bundle, batch: Batch) -> Tensor:
    """Latents of `batch` for keeping what is known; they hold nothing of what the hole hid."""
    return encode_tiled(bundle, smooth_fill(batch.image, batch.mask) * 2 - 1)


def make_hint(bundle: Bundle, spec: Spec, batch: Batch) -> Tensor:
    """The hint that `spec` promises: the batch's own, through the VAE where the spec is latent."""
    if not spec.at_latent_size:
        return batch.hint
    latents = encode_tiled(bundle, blanked_image(batch.image, batch.mask)).float()
    return torch.cat([latents, latent_mask(batch.mask, bundle.factor)], dim=1)


def masked_latents(bundle: Bundle, batch: Batch) -> Tensor:
    """What an inpaint UNet sees beside the noise: mask and masked picture, (B, 5, h, w).

    As in diffusers' pipelines and in its training: the picture's hole is mid-grey, and a cell is
    open if its first pixel is. An 8-channel UNet sees `blanked_latents`.
    """
    if bundle.is_glid:
        return blanked_latents(bundle, batch)
    latents = encode_tiled(bundle, blanked_image(batch.image, batch.mask))
    mask = F.interpolate(batch.mask, latents.shape[-2:]).to(latents)
    return torch.cat([mask, latents], dim=1)


def blanked_latents(bundle: Bundle, batch: Batch) -> Tensor:
    """What glid-3-xl-stable's UNet sees beside the noise: the known latents (B, 4, h, w), else 0.

    It was trained on latents of whole pictures, set to 0 in open cells: neither a grey hole nor a
    mask, and nothing but zeros where no picture is given. The latents are ours, which hold nothing
    of what the hole hid, and so are the cells, the same that sampling leaves open.
    """
    closed = latent_mask(batch.mask, bundle.factor) == 0
    return known_latents(bundle, batch) * closed


def encode_condition(
    bundle: Bundle, spec: Spec, batch: Batch, words: Words | None = None
) -> Condition:
    """The condition of `batch`, on the device of the batch; `words` in place of its prompts'."""
    return Condition(
        text=bundle.text.encode(batch.prompts) if words is None else words,
        hint=make_hint(bundle, spec, batch),
        masked=masked_latents(bundle, batch) if bundle.sees_masks else None,
        framing=batch.framing() if bundle.asks_framing else None,
    )

"""The condition: all that the network is told, made from a batch the same way everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from controlfill.data.hints import Spec, blanked_image
from controlfill.data.sample import Batch
from controlfill.diffusion.tiles import Place, Windows, encode_tiled
from controlfill.models.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class Condition:
    """`text` (B, tokens, width) and `hint` (B, channels, H, W) of one batch."""

    text: Tensor
    hint: Tensor

    def doubled(self, without: Tensor) -> Condition:
        """The condition of classifier-free guidance: `without` prompt first, then this one."""
        return Condition(text=torch.cat([without, self.text]), hint=torch.cat([self.hint] * 2))

    def last(self, count: int) -> Condition:
        """That of the last `count` samples."""
        return Condition(text=self.text[-count:], hint=self.hint[-count:])

    def part(self, windows: Windows, places: Sequence[Place]) -> Condition:
        """The condition of the windows at `places`, which count in latent cells."""
        scale = self.hint.shape[-1] // windows.canvas[1]
        text = self.text.repeat(len(places), 1, 1)
        return Condition(text=text, hint=windows.stack(self.hint, places, scale))


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """The mask (B, 1, H, W) at latent size: a cell is open if any of its pixels or neighbours is.

    Max-pooling keeps strokes of one pixel, which nearest sampling loses; the extra cell covers
    what the VAE smears over cell borders.
    """
    cells = F.max_pool2d(mask, factor)
    return F.max_pool2d(cells, kernel_size=3, stride=1, padding=1)


def smooth_fill(image: Tensor, mask: Tensor) -> Tensor:
    """The picture (B, 3, H, W) with its hole filled by averages of what is known around it.

    Push-pull: averages of known pixels over ever larger blocks, the finest that exist (Gortler et
    al. 1996). The VAE must see neither what the hole hid nor an edge at its rim, since both would
    reach the latents of known pixels; where nothing is known the fill is mid-grey.
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
    return filled


def known_latents(bundle: Bundle, batch: Batch) -> Tensor:
    """Latents of `batch` for keeping what is known; they hold nothing of what the hole hid."""
    return encode_tiled(bundle, smooth_fill(batch.image, batch.mask) * 2 - 1)


def make_hint(bundle: Bundle, spec: Spec, batch: Batch) -> Tensor:
    """The hint that `spec` promises: the batch's own, through the VAE where the spec is latent."""
    if not spec.at_latent_size:
        return batch.hint
    latents = encode_tiled(bundle, blanked_image(batch.image, batch.mask)).float()
    return torch.cat([latents, latent_mask(batch.mask, bundle.factor)], dim=1)


def encode_condition(bundle: Bundle, spec: Spec, batch: Batch) -> Condition:
    """The condition of `batch`, on the device of the batch."""
    return Condition(text=bundle.text.encode(batch.prompts), hint=make_hint(bundle, spec, batch))

"""The condition: all that the network is told, made from a batch the same way everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from controlfill.data.hints import Spec, blanked_image
from controlfill.data.sample import Batch
from controlfill.models.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class Condition:
    """`text` (B, tokens, width) and `hint` (B, channels, H, W) of one batch."""

    text: Tensor
    hint: Tensor

    def doubled(self, without: Tensor) -> Condition:
        """The condition of classifier-free guidance: `without` prompt first, then this one."""
        return Condition(text=torch.cat([without, self.text]), hint=torch.cat([self.hint] * 2))


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """The mask (B, 1, H, W) at latent size: a cell is open if any of its pixels or neighbours is.

    Max-pooling keeps strokes of one pixel, which nearest sampling loses; the extra cell covers
    what the VAE smears over cell borders.
    """
    cells = F.max_pool2d(mask, factor)
    return F.max_pool2d(cells, kernel_size=3, stride=1, padding=1)


def make_hint(bundle: Bundle, spec: Spec, batch: Batch) -> Tensor:
    """The hint that `spec` promises: the batch's own, through the VAE where the spec is latent."""
    if not spec.at_latent_size:
        return batch.hint
    latents = bundle.encode_image(blanked_image(batch.image, batch.mask)).float()
    return torch.cat([latents, latent_mask(batch.mask, bundle.factor)], dim=1)


def encode_condition(bundle: Bundle, spec: Spec, batch: Batch) -> Condition:
    """The condition of `batch`, on the device of the batch."""
    return Condition(text=bundle.text.encode(batch.prompts), hint=make_hint(bundle, spec, batch))

"""The shapes of SD 1.5 and SDXL, for counting and timing without their weights.

The numbers are those of the models' own config files. Weights are random, or not there at all on
the device "meta".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import tiny
from controlfill.models.text import Words

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
TINY_XL_UNET = {
    **SDXL_UNET,
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 64,
    "norm_num_groups": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
CLIP_LAYERS, CLIP_TOKENS = 12, 77
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A base's configs, its usual side in pixels and the width of its text."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    side: int
    text: int
    pooled: int = 0


FAMILIES = {
    "sd15": Family(unet=SD15_UNET, vae=VAE, side=512, text=768),
    "sdxl": Family(unet=SDXL_UNET, vae=VAE, side=1024, text=2048, pooled=1280),
    "sd15-tiny": Family(unet=tiny.unet_config(32), vae=tiny.vae_config(32), side=64, text=96),
    "sdxl-tiny": Family(
        unet=TINY_XL_UNET, vae=tiny.vae_config(32), side=64, text=64, pooled=32
    ),
}  # fmt: skip


class Told(nn.Module):
    """A network that is always told the same size and pooled text, as SDXL's want to be.

    With it SDXL's networks go through the stock code, which was written for SD 1.5's.
    """

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        self.network, self.family = network, family

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def forward(self, sample: Tensor, *words: Any, **more: Any) -> Any:
        """What the network says, with the extra words that it wants."""
        shared = {"device": sample.device, "dtype": sample.dtype}
        added = {
            "text_embeds": torch.zeros(len(sample), self.family.pooled, **shared),
            "time_ids": framing(self.family, len(sample), sample.device),
        }
        return self.network(sample, *words, added_cond_kwargs=added, **more)


class FixedText:
    """Stands for tokenizer and text encoder: the same random vectors for every prompt.

    Text is 0.4 % of a step; SDXL's two encoders are left out, SD 1.5's is counted by `flops`.
    """

    def __init__(self, family: Family, device: torch.device) -> None:
        self.encoder = nn.Embedding(CLIP_TOKENS, family.text, device=device).requires_grad_(False)
        self.pooled = torch.zeros(1, family.pooled, device=device) if family.pooled else None

    def encode(self, prompts: list[str]) -> Words:
        """(B, tokens, width), and for SDXL (B, width)."""
        tokens = self.encoder.weight.expand(len(prompts), -1, -1)
        pooled = None if self.pooled is None else self.pooled.expand(len(prompts), -1)
        return Words(tokens, pooled)


@dataclass(kw_only=True)
class Networks:
    """UNet, VAE and ControlNet of a family; all but the ControlNet frozen."""

    family: Family
    unet: Any
    vae: Any
    control: Any

    def bundle(self) -> Any:
        """Our bundle of them."""
        from controlfill.models.bundle import Bundle

        return Bundle(
            name="shapes", vae=self.vae, unet=self.unet,
            text=cast(Any, FixedText(self.family, self.vae.device)),
            scheduler_config=SCHEDULE,
        )  # fmt: skip

    def told(self, network: Any) -> Any:
        """`network`, or for SDXL what tells it its extra words."""
        return Told(network, self.family) if self.family.pooled else network


def make_networks(name: str, device: str) -> Networks:
    """The networks of family `name` with random weights, made where they are wanted."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    family = FAMILIES[name]
    with torch.device(device):
        unet = UNet2DConditionModel(**family.unet)
        vae = AutoencoderKL(**family.vae)
        # Without weights there is nothing to copy.
        control = ControlNetModel.from_unet(unet, load_weights_from_unet=device != "meta")
    unet.requires_grad_(False).eval()
    vae.requires_grad_(False).eval()
    return Networks(family=family, unet=unet, vae=vae, control=control.train())


def framing(family: Family, count: int, device: Any) -> Tensor:
    """What SDXL's networks are told of whole pictures of the family's size, (count, 6)."""
    side = float(family.side)
    return torch.tensor([[side, side, 0, 0, side, side]] * count, device=device)


@torch.no_grad()
def perturb(network: nn.Module) -> None:
    """A little noise on all weights, so that zero layers say something."""
    for parameter in network.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))


def make_batch(family: Family, count: int, device: str) -> Any:
    """A random batch of ours."""
    from controlfill.data.sample import Batch

    size = (count, 3, family.side, family.side)
    image, hint = (torch.rand(size, device=device) for _ in range(2))
    mask = torch.ones((count, 1, *size[2:]), device=device)
    return Batch(image=image, mask=mask, hint=hint, prompts=[""] * count)

"""The inpainter: the base itself as a network that learns, and the pipeline folder it becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlfill.errors import UserError
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.configs import INPAINT_CHANNELS, PLAIN_CHANNELS, pipeline_class
from controlfill.models.controlnet import HEADER_KEY, own_version
from controlfill.models.text import Text, Words

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# What the names of the weights begin with, here and in pipeline folders and LoRA files.
UNET, ENCODERS = "unet.", "encoders."
PARTS = {"unet.": "unet.", "encoders.0.": "text_encoder.", "encoders.1.": "text_encoder_2."}


@dataclass(frozen=True, kw_only=True)
class TunedHeader:
    """What fine-tuned weights say of themselves.

    `unet` is a file or folder whose UNet took the place of the base's own, as a whole path; `rank`
    that of a LoRA.
    """

    base: str
    base_family: str
    prediction_type: str
    unet: str | None = None
    rank: int | None = None
    step: int = 0
    version: str = field(default_factory=own_version)

    def as_metadata(self) -> dict[str, str]:
        """The same as the header of a safetensors file."""
        return {"format": "pt", HEADER_KEY: json.dumps(asdict(self))}


class Inpainter(nn.Module):
    """An inpaint UNet, with text encoders where they learn too.

    All that predicts is one network, so that whatever wraps it meets every weight that learns.
    """

    def __init__(
        self, unet: UNet2DConditionModel, text: Text, encoders: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.unet, self.text = unet, text
        self.encoders = nn.ModuleList(encoders)

    def forward(
        self,
        seen: Tensor,
        timesteps: Tensor,
        told: Words | Sequence[str],
        framing: Tensor | None = None,
    ) -> Tensor:
        """The prediction (B, 4, h, w) for `seen` (B, C, h, w): noisy latents, and what is known.

        Prompts that are `told` as such are read by the encoders that learn; `framing` (B, 6) is for
        SDXL.
        """
        words = told if isinstance(told, Words) else self.text.read(list(told), [*self.encoders])
        added = None
        if words.pooled is not None and framing is not None:
            added = {"text_embeds": words.pooled, "time_ids": framing}
        dtype = self.unet.conv_in.weight.dtype
        unet: Any = self.unet
        return unet(
            seen.to(dtype),
            timesteps,
            encoder_hidden_states=words.tokens.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def learned(self) -> dict[str, nn.Parameter]:
        """The weights that learn, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def take(self, weights: dict[str, Tensor]) -> None:
        """Give what learns its `weights`. Raises UserError for those of others."""
        own = self.learned()
        strange = own.keys() ^ weights.keys()
        wrong = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
        if strange or wrong:
            name = min([*strange, *wrong])
            raise UserError(f"the checkpoint was trained on another base, or elsewhere: {name}")
        for name, parameter in own.items():
            parameter.data.copy_(weights[name])


def make_inpainter(bundle: Bundle, learns_text: bool) -> Inpainter:
    """The base of `bundle` as a network whose every weight learns, in the place where it lies.

    With `learns_text`, text encoders learn too, but for what nobody reads of them: SDXL takes what
    its first encoder says before its last layer.
    """
    encoders = bundle.text.encoders if learns_text else []
    network = Inpainter(bundle.unet, bundle.text, encoders).requires_grad_(True)
    if len(encoders) > 1:
        for part in unread_parts(encoders[0]):
            part.requires_grad_(False)
    return network


def unread_parts(encoder: Any) -> list[nn.Module]:
    """The last layer and norm of a text encoder, which SDXL does not read of its first one."""
    inner = getattr(encoder, "text_model", encoder)
    return [inner.encoder.layers[-1], inner.final_layer_norm]


@contextmanager
def whole_weights(bundle: Bundle) -> Iterator[None]:
    """While entered, `bundle` may be moved; weights that learn come along in single precision."""
    networks = (bundle.unet, *bundle.text.encoders)
    learning = [p for network in networks for p in network.parameters() if p.requires_grad]
    own = [p.data for p in learning]
    yield
    for parameter, data in zip(learning, own, strict=True):
        parameter.data = data.to(parameter.device)


def widen(unet: UNet2DConditionModel, channels: int = INPAINT_CHANNELS) -> None:
    """Let a UNet take `channels`: it is blind to new ones at first, so it predicts as before."""
    old = unet.conv_in
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        assert new.bias is not None
        assert old.bias is not None
        new.bias.copy_(old.bias)
    unet.conv_in = new.requires_grad_(old.weight.requires_grad)
    unet.register_to_config(in_channels=channels)


def tuned_base(name: str, weights: dict[str, Tensor], unet: str | Path | None = None) -> Bundle:
    """The base called `name`, read anew, with those of its weights replaced that were learned.

    Its UNet is that in `unet`, where one took the place of its own.
    """
    bundle = load_bundle(name, inpainting=True, unet=unet)
    if not bundle.sees_masks:
        widen(bundle.unet)
    for place, network in enumerate([bundle.unet, *bundle.text.encoders]):
        prefix = UNET if place == 0 else f"{ENCODERS}{place - 1}."
        part = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        network.load_state_dict(part, strict=False)
    return bundle


def save_pipeline(bundle: Bundle, folder: Path) -> None:
    """Write `bundle` as the inpaint pipeline folder of its family, in single precision.

    For a UNet of glid-3-xl-stable's kind diffusers has no inpaint pipeline, so none is named.
    """
    import diffusers

    config = dict(bundle.scheduler_config)
    scheduler: Any = getattr(diffusers, config.get("_class_name", "DDIMScheduler"))
    parts: dict[str, Any] = {
        "vae": bundle.vae,
        "unet": bundle.unet,
        "scheduler": scheduler.from_config(config),
    }
    for place, (tokenizer, encoder) in enumerate(bundle.text.pairs):
        tail = f"_{place + 1}" if place else ""
        parts |= {f"tokenizer{tail}": tokenizer, f"text_encoder{tail}": encoder}
    if bundle.asks_framing:
        parts["force_zeros_for_empty_prompt"] = bundle.text.empty_is_zero
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    channels = PLAIN_CHANNELS if bundle.is_glid else INPAINT_CHANNELS
    cls: Any = getattr(diffusers, pipeline_class(channels, two=bundle.asks_framing))
    cls(**parts).save_pretrained(folder)

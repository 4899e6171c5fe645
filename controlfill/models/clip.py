"""CLIP: prompts and pictures as directions in one space, pictures differentiably."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

T = TypeVar("T")
# Mean and deviation of the channels that OpenAI's CLIPs, and most others, were trained with.
USUAL_MEAN = (0.48145466, 0.4578275, 0.40821073)
USUAL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# Where transformers keeps them: as a file of their own, or in one with the tokenizer's.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A frozen CLIP that looks at pictures of `size` pixels a side, colours about `mean`."""

    network: CLIPModel
    tokenizer: CLIPTokenizer
    size: int
    mean: Tensor
    deviation: Tensor

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """Unit directions (B, D) of `prompts`; longer ones are cut."""
        network: Any = self.network
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=network.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        return direction(network.get_text_features(tokens.input_ids.to(self.mean.device)))

    def look(self, pictures: Tensor) -> Tensor:
        """Unit directions (B, D) of (B, 3, size, size) in [0, 1], differentiable."""
        network: Any = self.network
        return direction(network.get_image_features((pictures - self.mean) / self.deviation))

    def fit(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) at the size that `look` takes, differentiable."""
        # Bicubic and smoothed as CLIP's own pictures were; where they grow there is nothing to.
        return F.interpolate(
            picture, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True
        )


def direction(features: Any) -> Tensor:
    """Features of unit length; newer versions of transformers wrap them."""
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=-1)


@lru_cache(maxsize=1)
def load_clip(name: str, device: torch.device) -> Clip:
    """The CLIP of a folder or hub id, frozen, in float32; the last one is kept.

    Raises UserError when it is not there, or no CLIP.
    """
    from transformers import AutoConfig, CLIPModel, CLIPTokenizer

    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(
            f"--clip_guidance_model {name} is no folder; give one, or a hub id such as "
            "openai/clip-vit-base-patch32"
        )
    config = tried(lambda: AutoConfig.from_pretrained(name), name)
    if config.model_type != "clip":
        raise UserError(
            f"--clip_guidance_model {name} is a {config.model_type}; a whole CLIP, with its text "
            "and its vision network, is needed"
        )
    cls: Any = CLIPModel
    network, about = tried(lambda: cls.from_pretrained(name, output_loading_info=True), name)
    if about["missing_keys"]:
        raise UserError(
            f"--clip_guidance_model {name} lacks {len(about['missing_keys'])} of its weights, such "
            f"as {sorted(about['missing_keys'])[0]}"
        )
    tokenizer = tried(lambda: CLIPTokenizer.from_pretrained(name), name)
    mean, deviation = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in read_colours(name)
    )
    frozen = network.eval().requires_grad_(False)
    torch.nn.Module.to(frozen, device=device, dtype=torch.float32)
    return Clip(
        network=network,
        tokenizer=tokenizer,
        size=int(config.vision_config.image_size),
        mean=mean,
        deviation=deviation,
    )


def read_colours(name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels that a CLIP expects, by its own word if it has one."""
    from transformers.utils import cached_file

    for file in PROCESSORS:
        found = tried(lambda f=file: cached_file(name, f, **QUIETLY), name)
        if found is None:
            continue
        about = read_json(found)
        about = about.get("image_processor", about)
        if "image_mean" in about:
            return about["image_mean"], about["image_std"]
    return list(USUAL_MEAN), list(USUAL_DEVIATION)


def tried(load: Callable[[], T], name: str) -> T:
    """`load()`, with whatever the loaders raise turned into one line."""
    try:
        return load()
    except Exception as error:  # the loaders raise anything from OSError to KeyError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--clip_guidance_model {name} could not be loaded: {reason}") from error


# A file that a model has not is no error.
QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}

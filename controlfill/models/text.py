"""Words to vectors: the only file that touches a tokenizer or a text encoder."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class Kept(Protocol):
    """Vectors of prompts that were encoded before; None for prompts that were not."""

    def get(self, prompts: list[str]) -> Tensor | None: ...


class Recent:
    """Kept vectors of the last prompts of a `text` whose encoder is frozen."""

    def __init__(self, text: Text, most: int = 64) -> None:
        self.encode = lru_cache(most)(lambda prompts: text.encode_anew(list(prompts)))

    def get(self, prompts: list[str]) -> Tensor:
        """The vectors of `prompts`, encoded now unless they were among the last."""
        return self.encode(tuple(prompts))


class Text:
    """A CLIP tokenizer and its text encoder, as SD 1.5 and SD 2 use them."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        places = encoder.config.max_position_embeddings
        self.length = min(tokenizer.model_max_length, places)
        self.cache: Kept | None = None

    def encode(self, prompts: list[str]) -> Tensor:
        """The last hidden states of `prompts`, (B, tokens, width); longer prompts are cut."""
        kept = self.cache.get(prompts) if self.cache is not None else None
        if kept is None:
            return self.encode_anew(prompts)
        place = next(self.encoder.parameters())
        return kept.to(place.device, place.dtype)

    @torch.no_grad()
    def encode_anew(self, prompts: list[str]) -> Tensor:
        """The same by the encoder itself, whatever is kept."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.encoder.parameters()).device
        # SD 2's encoder says that it wants the padding masked; SD 1.5's was trained without.
        masked = getattr(self.encoder.config, "use_attention_mask", None)
        attention = tokens.attention_mask.to(device) if masked else None
        return self.encoder(tokens.input_ids.to(device), attention_mask=attention)[0]

"""Words to vectors: the only file that touches a tokenizer or a text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Words:
    """What encoders say of prompts: `tokens` (B, tokens, width) and, for SDXL, `pooled` (B, width).

    `words[rows]` are those of some of the prompts.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Words:
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> Words:
        """The words with `change` made to their tensors."""
        return Words(change(self.tokens), None if self.pooled is None else change(self.pooled))

    def repeated(self, count: int) -> Words:
        """All of them `count` times, one after the other."""
        return self.each(lambda tensor: torch.cat([tensor] * count))


def join_words(parts: Sequence[Words]) -> Words:
    """The words of several batches as those of one."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    tokens = torch.cat([part.tokens for part in parts])
    return Words(tokens, torch.cat(pooled) if pooled else None)


class Kept(Protocol):
    """Vectors of prompts that were encoded before; None for prompts that were not."""

    def get(self, prompts: list[str]) -> tuple[Tensor, Tensor | None] | None: ...


class Recent:
    """Kept vectors of the last prompts of a `text` whose encoders are frozen."""

    def __init__(self, text: Text, most: int = 64) -> None:
        self.encode = lru_cache(most)(lambda prompts: text.encode_anew(list(prompts)))

    def get(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """The vectors of `prompts`, encoded now unless they were among the last."""
        words = self.encode(tuple(prompts))
        return words.tokens, words.pooled


@dataclass(frozen=True)
class JoinedKept:
    """Vectors that `first` has, and for prompts that it lacks those of `second`."""

    first: Kept
    second: Kept

    def get(self, prompts: list[str]) -> tuple[Tensor, Tensor | None] | None:
        """The vectors of `prompts`; None unless each is in one of the two."""
        found = [self.first.get([prompt]) or self.second.get([prompt]) for prompt in prompts]
        told = [Words(*vectors) for vectors in found if vectors is not None]
        if len(told) < len(prompts):
            return None
        words = join_words(told)
        return words.tokens, words.pooled


class Text:
    """CLIP tokenizers and text encoders: one as in SD 1.5 and SD 2, or two as in SDXL.

    With `empty_is_zero` the empty prompt's vectors are zeros, as SDXL's base was trained.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        encoder: CLIPTextModel,
        second: tuple[CLIPTokenizer, Any] | None = None,
        empty_is_zero: bool = False,
    ) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.pairs: list[tuple[CLIPTokenizer, Any]] = [(tokenizer, encoder)]
        self.pairs += [second] if second else []
        self.empty_is_zero = empty_is_zero
        self.cache: Kept | None = None

    @property
    def encoders(self) -> list[Any]:
        """All text encoders."""
        return [encoder for _, encoder in self.pairs]

    def encode(self, prompts: list[str]) -> Words:
        """The words of `prompts`; longer ones are cut."""
        kept = self.cache.get(prompts) if self.cache is not None else None
        if kept is None:
            return self.encode_anew(prompts)
        place = next(self.encoder.parameters())
        return Words(*kept).each(lambda tensor: tensor.to(place.device, place.dtype))

    @torch.no_grad()
    def encode_anew(self, prompts: list[str]) -> Words:
        """The same by the encoders themselves, whatever is kept."""
        return self.read(prompts, self.encoders)

    def read(self, prompts: list[str], encoders: Sequence[Any]) -> Words:
        """The words of `prompts` by `encoders` in the place of the base's own, differentiable."""
        pairs = zip(self.pairs, encoders, strict=True)
        told = [self._ask(tokenizer, encoder, prompts) for (tokenizer, _), encoder in pairs]
        if len(told) == 1:
            # After the last layer and its norm.
            return Words(told[0][0])
        # SDXL reads the last but one layer of both, before the norm, and the second's projection.
        words = Words(torch.cat([t.hidden_states[-2] for t in told], dim=-1), told[1][0])
        if not self.empty_is_zero:
            return words
        there = torch.tensor([prompt != "" for prompt in prompts], device=words.tokens.device)
        return words.each(lambda t: t * there.to(t).view(-1, *[1] * (t.ndim - 1)))

    def _ask(self, tokenizer: CLIPTokenizer, encoder: Any, prompts: list[str]) -> Any:
        """The output of one encoder."""
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=min(tokenizer.model_max_length, encoder.config.max_position_embeddings),
            truncation=True,
            return_tensors="pt",
        )
        device = next(encoder.parameters()).device
        # SD 2's encoder says that it wants the padding masked; SD 1.5's was trained without.
        masked = getattr(encoder.config, "use_attention_mask", None)
        attention = tokens.attention_mask.to(device) if masked else None
        return encoder(
            tokens.input_ids.to(device),
            attention_mask=attention,
            output_hidden_states=len(self.pairs) > 1,
        )

"""Image-to-text models of transformers: BLIP and its like, which put pictures into words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from controlfill.errors import UserError

T = TypeVar("T")
# Kinds of models whose words go on from words given; others get the picture alone.
PROMPTED = ("blip", "blip-2", "instructblip")
# What models that talk are asked.
REQUEST = "Describe the colours and the style of this picture in one short line, no letters on it."
GO_ON = " Go on, without repeating them, from the words: "


class Captioner:
    """Words for pictures by `model`, which reads what `processor` makes of them.

    Models that go on from words begin with `prompt`, models that talk are asked to. Neither it nor
    the request is part of the answer.
    """

    def __init__(
        self, model: Any, processor: Any, prompt: str = "", max_new_tokens: int = 30
    ) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.max_new_tokens = max_new_tokens
        self.talks = bool(getattr(processor, "chat_template", None))

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[str]:
        """The words for each of `images`, uint8 (H, W, 3), the likeliest ones."""
        pictures = [Image.fromarray(image) for image in images]
        inputs = self.asked(pictures) if self.talks else self.shown(pictures)
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        # Models that talk repeat what they were asked, token by token.
        begin = inputs["input_ids"].shape[1] if self.talks else 0
        return [self.without_prompt(text) for text in self.read(tokens[:, begin:])]

    def shown(self, pictures: list[Image.Image]) -> Any:
        """The inputs of a model that goes on from the prompt, or from nothing."""
        prompted = self.prompt and self.model.config.model_type in PROMPTED
        text = {"text": [self.prompt] * len(pictures)} if prompted else {}
        return self.processor(images=pictures, return_tensors="pt", **text)

    def asked(self, pictures: list[Image.Image]) -> Any:
        """The inputs of a model that talks."""
        words = {"type": "text", "text": REQUEST + (GO_ON + self.prompt if self.prompt else "")}
        talks = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, words]}]
            for picture in pictures
        ]
        return self.processor.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", padding=True,
        )  # fmt: skip

    def read(self, tokens: Any) -> list[str]:
        """The texts of tokens (B, n), on one line each."""
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def without_prompt(self, text: str) -> str:
        """`text` without the prompt at its beginning, as the tokenizer spells it."""
        if not self.prompt:
            return text
        own = self.processor.tokenizer(self.prompt).input_ids
        (spelled,) = self.read([own])
        for begin in (spelled, self.prompt):
            if text.casefold().startswith(begin.casefold()):
                return text[len(begin) :].strip()
        return text


def load_captioner(
    name: str, device: torch.device, prompt: str = "", max_new_tokens: int = 30
) -> Captioner:
    """The captioner of a hub id or of a folder that `save_pretrained` wrote. Raises UserError."""
    from transformers import AutoModelForImageTextToText

    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(
            f"the captioner {name} is no folder; give one, `template`, or a hub id such as "
            "Salesforce/blip-image-captioning-base"
        )
    processor = tried(lambda: load_processor(name), name)
    model: Any = tried(lambda: AutoModelForImageTextToText.from_pretrained(name), name)
    model = model.eval().requires_grad_(False).to(device)
    return Captioner(model, processor, prompt, max_new_tokens)


def load_processor(name: str) -> Any:
    """What makes inputs of pictures and text of tokens; batches of text are filled up in front."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    processor = AutoProcessor.from_pretrained(name)
    if not hasattr(processor, "image_processor"):  # older folders hold its halves alone
        return Halves(AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    tokenizer = processor.tokenizer
    if getattr(processor, "chat_template", None):
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return processor


class Halves:
    """The image processor and the tokenizer of a model that has no processor of its own."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: list[Image.Image], **more: Any) -> Any:
        """The inputs of the model."""
        return self.image_processor(images, **more)

    def batch_decode(self, tokens: Any, **more: Any) -> list[str]:
        """The texts of tokens."""
        return self.tokenizer.batch_decode(tokens, **more)


def tried(load: Callable[[], T], name: str) -> T:
    """`load()`, with whatever the loaders raise turned into one line."""
    try:
        return load()
    except Exception as error:  # the loaders raise anything from OSError to KeyError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the captioner {name} could not be loaded: {reason}") from error

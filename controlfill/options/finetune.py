"""Options of fine-tuning a base to fill holes: all of its UNet, or a LoRA beside it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from controlfill.options.base import shared_values
from controlfill.options.training import REHEARSALS, FitOptions, LearnOptions, RunOptions

# Peak learning rates: of adapters, and of all weights.
LORA_RATE, FULL_RATE = 1e-4, 5e-6


@dataclass(frozen=True, kw_only=True)
class TuneOptions(LearnOptions):
    """What fine-tuning a base means, whatever the engine."""

    RUN: ClassVar[str] = "finetune_inpainting_"
    WORD: ClassVar[str] = "finetune"
    FIXED: ClassVar[tuple[str, ...]] = (
        "pretrained_model_name_or_path", "instance_data_dir", "ann_file", "use_lora", "rank",
        "lora_target_modules", "train_text_encoder", "with_prior_preservation", "class_data_dir",
        "unet",
    )  # fmt: skip

    instance_data_dir: str
    """Folder of pictures, a table or tar shards in it, `hf:NAME`, or `world:shapes`."""
    unet: Path | None = None
    """A UNet in the place of the base's own: a file of it alone, as of glid-3-xl-stable, a whole
    checkpoint, or a diffusers folder."""
    instance_prompt: str = ""
    """Prompt of pictures that have none; with {} in it, the prompt of all, {} being their own."""
    with_prior_preservation: bool = False
    """Learn beside each picture from one of the class, so that the base forgets less."""
    class_data_dir: Path | None = None
    """Folder of class pictures; missing ones are painted into it by the base itself."""
    class_prompt: str = ""
    """What class pictures are painted by, and the prompt of those that have none."""
    num_class_images: int = 100
    """Class pictures that there should be."""
    prior_loss_weight: float = 1.0
    """What a class picture counts against one to learn."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; otherwise 1e-4 for a LoRA and 5e-6 for all weights."""
    train_text_encoder: bool = False
    """Let the text encoders learn too."""
    text_encoder_lr: float | None = None
    """Their peak learning rate; otherwise that of the UNet."""
    use_lora: bool = False
    """Learn a LoRA, a small file beside the base, instead of all weights."""
    rank: int = 16
    """Rank of its matrices: how much it can learn, and how large it is."""
    lora_alpha: float | None = None
    """What it counts, over its rank; otherwise the rank, so that it counts once."""
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of those layers of the UNet that it changes."""

    @property
    def pictures(self) -> str:
        """Where the pictures to learn from are."""
        return self.instance_data_dir

    @property
    def rate(self) -> float:
        """The peak learning rate: the one given, or that of the method."""
        usual = LORA_RATE if self.use_lora else FULL_RATE
        return usual if self.learning_rate is None else self.learning_rate

    @property
    def text_share(self) -> float:
        """The learning rate of the text encoders, over that of the UNet."""
        given = self.text_encoder_lr
        return 1.0 if given is None or not self.rate else given / self.rate

    @property
    def alpha(self) -> float:
        """What the LoRA counts, over its rank."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha

    def stand_ins(self, there: bool) -> dict[str, Any]:
        """Base, data and size of a rehearsal, whose data is `there` or not.

        Few class pictures are painted, into a folder for those of this prompt, size and seed.
        """
        base, world, size = REHEARSALS["hole"]
        prior, side = self.with_prior_preservation, min(self.image_size, size)
        key = hashlib.sha256(repr((self.class_prompt, side, self.seed)).encode()).hexdigest()[:8]
        folder = self.output_dir / "rehearsal" / f"class_pictures-{key}"
        return {
            "instance_data_dir": self.instance_data_dir if there else world,
            "pretrained_model_name_or_path": base,
            "unet": None,
            "image_size": side,
            "class_data_dir": folder if prior else None,
            "num_class_images": min(self.num_class_images, 4) if prior else self.num_class_images,
        }


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TuneOptions, RunOptions):
    """Fine-tune a base to fill holes, by a LoRA or in all its weights."""


@dataclass(frozen=True, kw_only=True)
class FinetuneLightningOptions(TuneOptions, FitOptions):
    """Fine-tune a base with PyTorch Lightning."""

    def as_train(self) -> FinetuneOptions:
        """The same run in the words of the other engine, which all shared code speaks."""
        return FinetuneOptions(**shared_values(self, TuneOptions), **self.in_words())

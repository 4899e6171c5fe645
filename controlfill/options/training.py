"""Options of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from controlfill.options.base import SD15, Precision, SpecName
from controlfill.options.data import DataOptions


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Train a ControlNet to fill holes."""

    image_dir: str
    """Folder of pictures, or `world:shapes` for endless procedural ones."""
    pretrained_model_name_or_path: str = SD15
    """The base: a diffusers folder, a hub id, or `embedded`."""
    controlnet_model_name_or_path: str | None = None
    """ControlNet to start from; otherwise it starts as a copy of the base's encoder."""
    conditioning: SpecName = "masked-image"
    """What the ControlNet sees; saved with its weights."""
    batch_size: int = 4
    """Pictures per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    num_epochs: int = 100
    """Passes over the pictures, unless --max_steps says otherwise."""
    max_steps: int | None = None
    """Optimizer steps; overrides --num_epochs."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; linear and cosine end at zero."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    adam_weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that final_model then holds; 0 keeps no average."""
    proportion_empty_prompts: float = 0.0
    """Share of prompts replaced by the empty one."""
    mixed_precision: Precision = "no"
    """Number format of the forward pass."""
    output_dir: Path = Path("./outputs")
    """The run's folder is made in here."""
    save_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; older ones go after a new one is whole. All are kept otherwise."""
    log_steps: int = 50
    """Steps between log lines."""
    log_images_steps: int = 500
    """Steps between image panels; 0 draws none."""
    num_workers: int = 4
    """Processes that read pictures and draw masks."""
    resume_from_checkpoint: str | None = None
    """`latest`, or the path of a checkpoint or run, to go on from."""

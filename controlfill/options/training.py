"""Options of training: what both engines share, and what each calls by its own name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from tyro.conf import Positional

from controlfill.options.base import SD15, Device, Precision, SpecName, shared_values
from controlfill.options.data import DataOptions

# What a rehearsal runs on: base, data where there is none yet, side of its cuts.
REHEARSALS = {
    "image": ("embedded-skins", "world:skins-mixed", 128),
    "hole": ("embedded", "world:shapes", 64),
}
REHEARSAL_STEPS = 20
# What it leaves out, of the options of both engines.
PLAIN: dict[str, Any] = {
    "crop": "patch", "aspect_ratio_buckets": False, "cache_dir": None, "lr_warmup_steps": 0,
    "gradient_checkpointing": False, "use_8bit_adam": False, "num_workers": 0,
    "enable_xformers_memory_efficient_attention": False, "torch_compile": False,
    "report_to": "tensorboard", "push_to_hub": False, "resume_from_checkpoint": None,
    "mixed_precision": "no", "precision": "32", "gradient_accumulation_steps": 1,
    "accumulate_grad_batches": 1, "val_split": 0.0,
}  # fmt: skip
T = TypeVar("T", bound="LearnOptions")


@dataclass(frozen=True, kw_only=True)
class LearnOptions(DataOptions):
    """What any training means, whatever learns and whatever the engine."""

    # What the folders of its runs begin with, and what its checkpoints are called.
    RUN: ClassVar[str] = ""
    WORD: ClassVar[str] = ""
    # Options that make it another run when they change; all else is only said.
    FIXED: ClassVar[tuple[str, ...]] = ()

    pretrained_model_name_or_path: str = SD15
    """The base: a diffusers folder, a hub id, or `embedded`."""
    cache_dir: Path | None = None
    """Latents and texts encoded beforehand by `controlfill cache`."""
    aspect_ratio_buckets: bool = False
    """Cut pictures to sizes near their own shape, of the area of the square or less."""
    batch_size: int = 4
    """Pictures per process and forward pass."""
    num_epochs: int = 100
    """Passes over the pictures, unless --max_steps says otherwise."""
    max_steps: int | None = None
    """Optimizer steps; overrides --num_epochs."""
    overfit_batches: int = 0
    """Only this many batches of each process again and again, to see whether a model can learn."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; linear and cosine end at zero."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    adam_weight_decay: float = 0.01
    """Weight decay of AdamW."""
    use_8bit_adam: bool = False
    """AdamW with moments of 8 bits, on a GPU: pip install 'controlfill[bnb]'."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that final_model then holds; 0 keeps no average."""
    proportion_empty_prompts: float = 0.0
    """Share of prompts replaced by the empty one."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss; 5.0 is usual."""
    noise_offset: float = 0.0
    """Noise shared by a whole channel, for darker and lighter pictures; 0.05 is usual."""
    hole_weight: float = 1.0
    """How much more the hole counts than known pixels in the loss."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, slower steps."""
    enable_xformers_memory_efficient_attention: bool = False
    """xformers' attention; otherwise torch's own, which is as good on recent GPUs."""
    torch_compile: bool = False
    """Compile the networks: minutes at the start, faster steps on a GPU."""
    allow_tf32: bool = False
    """Faster float32 on Ampere GPUs and later, a little less exact."""
    val_split: float = 0.0
    """Share of the pictures kept apart to measure a validation loss."""
    validation_image: tuple[Path, ...] = ()
    """Pictures to fill at each validation, or to follow with --conditioning image."""
    validation_mask: tuple[Path, ...] = ()
    """Their masks, one per picture; not with --conditioning image."""
    validation_prompt: tuple[str, ...] = ()
    """Their prompts, one per picture, or one for all."""
    num_validation_images: int = 4
    """Seeds shown for each validation picture."""
    output_dir: Path = Path("./outputs")
    """The run's folder is made in here."""
    save_steps: int = 1000
    """Steps between checkpoints; --checkpointing_steps means the same."""
    num_workers: int = 4
    """Processes that read pictures and draw masks."""
    report_to: Literal["tensorboard", "wandb", "all"] = "tensorboard"
    """Where curves and panels go; wandb: pip install 'controlfill[wandb]', WANDB_MODE=offline."""
    push_to_hub: bool = False
    """Put final_model on the Hugging Face hub at the end, with its model card."""
    hub_model_id: str | None = None
    """Name of the repository there; the run's folder name otherwise."""
    resume_from_checkpoint: str | None = None
    """`latest`, or the path of a checkpoint or run, to go on from."""
    rehearse: bool = False
    """Try the run here and now: few steps on an embedded base, small cuts, a folder of its own."""

    @property
    def pictures(self) -> str:
        """Where the pictures to learn from are."""
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        raise NotImplementedError

    @property
    def text_share(self) -> float:
        """The learning rate of text encoders, over that of the rest."""
        return 1.0

    def rehearsed(self: T) -> T:
        """The same run on an embedded base, at reduced size; itself unless it is a rehearsal.

        Data that is not there yet is stood in for by a procedural world. Nothing is resumed or
        uploaded, and the run lies in a folder of its own, so that no real run is mistaken for it.
        """
        if not self.rehearse:
            return self
        there = any(sign in self.pictures for sign in ":*{") or Path(self.pictures).exists()
        alone = {} if there else {"ann_file": None, "captions_file": None, "mask_dir": None}
        changes = {**PLAIN, **alone, **self.stand_ins(there)}
        return replace(
            self,
            batch_size=min(self.batch_size, 4),
            max_steps=min(self.max_steps or REHEARSAL_STEPS, REHEARSAL_STEPS),
            output_dir=self.output_dir / "rehearsal",
            **{name: value for name, value in changes.items() if hasattr(self, name)},
        )

    def stand_ins(self, there: bool) -> dict[str, Any]:
        """Base, data and size of a rehearsal, whose data is `there` or not."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RunOptions(LearnOptions):
    """The same with what the loop calls by names of its own; all shared code speaks these."""

    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    set_grads_to_none: bool = True
    """Free gradients after a step rather than fill them with zeros."""
    mixed_precision: Precision = "no"
    """Number format of the forward pass."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; older ones go after a new one is whole. All are kept otherwise."""
    log_steps: int = 50
    """Steps between log lines."""
    log_images_steps: int = 500
    """Steps between image panels; 0 draws none."""
    validation_steps: int = 500
    """Steps between validations, where there is something to validate."""


@dataclass(frozen=True, kw_only=True)
class FitOptions(LearnOptions):
    """The same with what PyTorch Lightning calls by names of its own."""

    precision: Literal["16-mixed", "bf16-mixed", "32"] = "32"
    """Number format of the forward pass."""
    accelerator: Literal["auto", "gpu", "cpu", "tpu", "mps"] = "auto"
    """Kind of device."""
    devices: int = -1
    """How many of them; -1 takes all (one, on a CPU)."""
    num_nodes: int = 1
    """Machines that train together."""
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """How several devices share the work."""
    accumulate_grad_batches: int = 1
    """Forward passes per optimizer step."""
    gradient_clip_val: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    save_every_n_epochs: int = 5
    """Epochs between the checkpoints of which the best are kept."""
    save_top_k: int = 3
    """How many to keep by val/loss, or train/loss without a validation split; -1 keeps all."""
    log_every_n_steps: int = 50
    """Steps between log lines."""
    log_images_every_n_steps: int = 500
    """Steps between image panels; 0 draws none."""
    early_stopping_patience: int | None = None
    """Stop after this many epochs in which the monitored loss did not fall."""
    lr_find: bool = False
    """Look for a learning rate first, and train with it."""
    profiler: Literal["simple", "advanced"] | None = None
    """Write where the time goes to logs/."""

    def as_train(self) -> RunOptions:
        """The same run in the words of the other engine, which all shared code speaks."""
        raise NotImplementedError

    def in_words(self) -> dict[str, Any]:
        """What both engines have under different names, in the words of the other one."""
        return {
            "gradient_accumulation_steps": self.accumulate_grad_batches,
            "max_grad_norm": self.gradient_clip_val,
            "mixed_precision": PRECISIONS[self.precision],
            "log_steps": self.log_every_n_steps,
            "log_images_steps": self.log_images_every_n_steps,
        }


@dataclass(frozen=True, kw_only=True)
class ControlOptions(LearnOptions):
    """What training a ControlNet means, whatever the engine."""

    RUN: ClassVar[str] = "controlnet_inpainting_"
    WORD: ClassVar[str] = "controlnet"
    FIXED: ClassVar[tuple[str, ...]] = (
        "conditioning", "pretrained_model_name_or_path", "image_dir", "ann_file",
    )  # fmt: skip

    image_dir: str
    """Folder of pictures, a table or tar shards in it, `hf:NAME`, or `world:shapes`."""
    controlnet_model_name_or_path: str | None = None
    """ControlNet to start from; otherwise it starts as a copy of the base's encoder."""
    conditioning: SpecName = "masked-image"
    """What the ControlNet sees, saved with its weights; `image` is a picture that the data has."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    text_box_weight: float = 1.0
    """How much more the boxes of labels count than the rest in the loss; 2 to 5 is usual."""
    text_loss: float = 0.0
    """Weight of the text loss: labels are read in what one step predicts; 0 leaves it off."""
    text_loss_feature: float = 1.0
    """In it, weight of the distance of what the reader sees to what it sees of the true picture."""
    text_loss_ctc: float = 10.0
    """In it, weight of the CTC of the labels above that of the true picture."""
    text_loss_weighting: Literal["abar", "none", "minsnr"] = "abar"
    """How the text loss counts by noise level: by the share of signal, not at all, or Min-SNR."""
    text_loss_max_t: float = 0.6
    """Share of the noise levels, from the clean end, at which labels are read."""
    text_loss_labels: int = 8
    """Most labels read per batch."""
    text_loss_ocr: Literal["v4", "v6"] = "v6"
    """The PP-OCR reader that is learned from; the other one judges, where it is installed."""

    @property
    def pictures(self) -> str:
        """Where the pictures to learn from are."""
        return self.image_dir

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate

    def stand_ins(self, there: bool) -> dict[str, Any]:
        """Base, data and size of a rehearsal, whose data is `there` or not."""
        base, world, size = REHEARSALS["image" if self.conditioning == "image" else "hole"]
        given = self.controlnet_model_name_or_path
        return {
            "image_dir": self.image_dir if there else world,
            "pretrained_model_name_or_path": base,
            "controlnet_model_name_or_path": base if given else None,
            "image_size": min(self.image_size, size),
        }


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ControlOptions, RunOptions):
    """Train a ControlNet to fill holes."""


@dataclass(frozen=True, kw_only=True)
class LightningOptions(ControlOptions, FitOptions):
    """Train a ControlNet with PyTorch Lightning."""

    val_split: float = 0.05
    """Share of the pictures kept apart for validation after every epoch."""

    def as_train(self) -> TrainOptions:
        """The same run in the words of the other engine, which all shared code speaks."""
        return TrainOptions(**shared_values(self, ControlOptions), **self.in_words())


PRECISIONS: dict[str, Any] = {"16-mixed": "fp16", "bf16-mixed": "bf16", "32": "no"}


@dataclass(frozen=True, kw_only=True)
class CacheOptions(DataOptions):
    """Encode pictures and prompts once, for training runs with --cache_dir."""

    data: Positional[str]
    """What --image_dir of the training will be."""
    pretrained_model_name_or_path: str = SD15
    """The base: a diffusers folder, a hub id, or `embedded`."""
    cache_dir: Path = Path("./outputs/cache")
    """Folder of the cache; what is there for the same data and base is kept and completed."""
    aspect_ratio_buckets: bool = False
    """As the training will have it."""
    variants: int = 1
    """Cuts per picture; with --crop random or --random_flip training goes through them in turn."""
    text: bool = True
    """Encode the prompts too; each wording once."""
    mixed_precision: Precision = "no"
    """Number format of the encoders; the cache holds fp32 for `no`, else 16 bits."""
    batch_size: int = 16
    """Pictures encoded together."""
    num_workers: int = 4
    """Processes that read pictures."""
    device: Device = "auto"
    """Where to compute."""

"""The run of a base that learns itself: all of its UNet, or a LoRA beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from controlfill.data.cache import JoinedLatents, open_cache
from controlfill.data.concepts import Worded, WordedStream, join
from controlfill.data.sample import PreparedSource, Source
from controlfill.data.shards import ShardStream
from controlfill.data.sources import open_source
from controlfill.data.streams import PreparedStream
from controlfill.diffusion.losses import Weighting
from controlfill.diffusion.objective import TuneObjective
from controlfill.errors import UserError
from controlfill.inference.pipeline import HOLE_SPEC, Pipeline, Report
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.controlnet import WEIGHTS
from controlfill.models.inpainter import (
    Inpainter,
    TunedHeader,
    make_inpainter,
    save_pipeline,
    tuned_base,
    whole_weights,
    widen,
)
from controlfill.models.lora import LORA, LoraShape, add_lora, own_names, save_kohya, save_lora
from controlfill.models.text import JoinedKept
from controlfill.options import DataOptions, FinetuneOptions, check_numbers
from controlfill.training import hub
from controlfill.training.batches import Beside, StreamBeside
from controlfill.training.caching import cache_classes
from controlfill.training.class_pictures import Painter, paint_missing
from controlfill.training.start import (
    Data,
    Run,
    open_data,
    open_streamed,
    say_missing,
    spare_memory,
)
from controlfill.training.team import Team

log = logging.getLogger(__name__)
# Options that only count with another one, by that one.
COMPANIONS = {
    "use_lora": ("rank", "lora_alpha", "lora_target_modules"),
    "with_prior_preservation": ("num_class_images", "prior_loss_weight"),
}


@dataclass(kw_only=True)
class FinetuneRun(Run[FinetuneOptions]):
    """A base that learns to fill holes. Its UNet is that of the bundle, which so draws as it is."""

    network: Inpainter

    @property
    def header(self) -> TunedHeader:
        """What the saved weights say of themselves."""
        return TunedHeader(
            base=self.bundle.name,
            base_family=self.bundle.family,
            prediction_type=self.bundle.prediction_type,
            unet=None if self.options.unet is None else str(self.options.unet.resolve()),
            rank=self.options.rank if self.options.use_lora else None,
            step=self.step,
        )

    @property
    def shape(self) -> LoraShape:
        """What the LoRA is like."""
        return lora_shape(self.options)

    def objective(self) -> TuneObjective:
        """The loss that the options ask for."""
        options = self.options
        return TuneObjective(
            self.bundle,
            self.spec,
            learns_text=options.train_text_encoder,
            empty_prompts=options.proportion_empty_prompts,
            noise_offset=options.noise_offset,
            weighting=Weighting(snr_gamma=options.snr_gamma, hole=options.hole_weight),
        )

    def pipeline(self, network: Any) -> Pipeline:
        """The base as it is now."""
        return Pipeline(bundle=self.bundle, network=None, spec=self.spec)

    def write(self, folder: Path, weights: dict[str, Tensor], name: str) -> None:
        """Write `weights`, a LoRA with the names that other tools read."""
        if self.options.use_lora:
            save_lora(folder / self._file(name), weights, self.shape, self.header)
        else:
            save_file(weights, folder / name, metadata=self.header.as_metadata())

    def read(self, folder: Path, name: str) -> dict[str, Tensor]:
        """What `write` wrote."""
        tensors = load_file(folder / self._file(name))
        return own_names(self.network, tensors) if self.options.use_lora else tensors

    def take(self, weights: dict[str, Tensor]) -> None:
        """Give the network what was read."""
        self.network.take(weights)

    def finish(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a pipeline folder, or a LoRA for diffusers and for other tools; and the card."""
        if self.options.use_lora:
            save_lora(folder / LORA, weights, self.shape, self.header)
            save_kohya(folder / f"{self.folder.name}.safetensors", folder / LORA)
        else:
            save_pipeline(self._tuned(weights), folder)
        hub.write_tuned_card(folder, self.header, self.options, self.bundle.is_glid)

    def _tuned(self, weights: dict[str, Tensor]) -> Bundle:
        """The base with `weights`, read anew, since what is frozen may have been rounded."""
        try:
            return tuned_base(self.bundle.name, weights, self.options.unet)
        except UserError as error:
            log.warning(
                "%s; final_model gets what is frozen as the training had it (--mixed_precision %s)",
                error, self.options.mixed_precision,
            )  # fmt: skip
            self.network.take(weights)
            return self.bundle

    def _file(self, name: str) -> str:
        """The file of a checkpoint for what other networks write as `name`."""
        return LORA if self.options.use_lora and name == WEIGHTS else name


def prepare(
    options: FinetuneOptions, team: Team, source: Source | None, report: Report
) -> FinetuneRun:
    """Open the data, load the base, paint class pictures that are missing; no folder yet."""
    check_numbers(options)
    check_companions(options)
    given = source if source is not None else open_source(options.instance_data_dir, options)
    say_missing(given)
    bundle = load_bundle(options.pretrained_model_name_or_path, inpainting=True, unet=options.unet)
    bundle.check_size(options.image_size)
    if not bundle.sees_masks:
        widen_base(options, bundle)
    if isinstance(given, ShardStream):
        stream = WordedStream(given.where, options, options.instance_prompt)
        data = open_streamed(options, stream, team)
    else:
        data = open_data(options, Worded(given, options.instance_prompt), bundle)
    network = start_network(options, bundle)
    with whole_weights(bundle):
        bundle.to(team.device, team.frozen_dtype)
    if options.with_prior_preservation:
        pipeline = Pipeline(bundle=bundle, network=None, spec=HOLE_SPEC)
        data = with_prior(options, data, Painter(
            folder=Path(str(options.class_data_dir)), pipeline=pipeline, options=options, team=team,
        ), report)  # fmt: skip
    return FinetuneRun(
        options=options, team=team, bundle=bundle, spec=HOLE_SPEC, network=network, data=data,
        folder=options.output_dir,
    )  # fmt: skip


def check_companions(options: FinetuneOptions) -> None:
    """Raise UserError for what is only half asked for."""
    asked = options.with_prior_preservation
    for name in ("class_data_dir", "class_prompt"):
        given = bool(getattr(options, name))
        if given and not asked:
            raise UserError(f"--{name} has no effect without --with_prior_preservation")
        if asked and not given:
            raise UserError(f"--with_prior_preservation needs a --{name}")
    check_apart(options)
    if options.text_encoder_lr is not None and not options.train_text_encoder:
        raise UserError("--text_encoder_lr has no effect without --train_text_encoder")
    if options.text_encoder_lr and not options.rate:
        raise UserError(
            f"--text_encoder_lr {options.text_encoder_lr} is a share of --learning_rate, which is "
            "0; give that something however small, such as 1e-12, if the UNet is not to learn"
        )
    for switch, names in COMPANIONS.items():
        for name in names:
            usual = getattr(FinetuneOptions, name)
            if not getattr(options, switch) and getattr(options, name) != usual:
                raise UserError(f"--{name} has no effect without --{switch}")


def check_apart(options: FinetuneOptions) -> None:
    """Raise UserError when the pictures to learn from and those of the class share a folder."""
    if options.class_data_dir is None or not Path(options.instance_data_dir).is_dir():
        return
    own, others = Path(options.instance_data_dir).resolve(), options.class_data_dir.resolve()
    if own == others or own in others.parents or others in own.parents:
        raise UserError(
            f"--class_data_dir {options.class_data_dir} and --instance_data_dir "
            f"{options.instance_data_dir} must lie apart, not one within the other: the pictures "
            "of one would be taken for those of the other"
        )


def widen_base(options: FinetuneOptions, bundle: Bundle) -> None:
    """Let a text-to-image base see masks. Raises UserError for a LoRA, which could not."""
    what = bundle.name if options.unet is None else f"--unet {options.unet}"
    if options.use_lora and not options.rehearse:
        raise UserError(
            f"--use_lora needs an inpaint base, and {what} is a text-to-image one whose new "
            "channels a LoRA could not learn; finetune it without --use_lora first, or merge it"
        )
    log.info("%s does not see masks; it is widened to, and predicts as before", what)
    widen(bundle.unet)


def lora_shape(options: FinetuneOptions) -> LoraShape:
    """The LoRA that the options ask for."""
    return LoraShape(rank=options.rank, alpha=options.alpha, targets=options.lora_target_modules)


def start_network(options: FinetuneOptions, bundle: Bundle) -> Inpainter:
    """What learns, on the CPU and in single precision."""
    network = make_inpainter(bundle, options.train_text_encoder)
    if options.use_lora:
        add_lora(network, lora_shape(options), options.seed)
    if options.train_text_encoder:
        # Texts that were encoded before are not what the encoders will say.
        bundle.text.cache = None
    spare_memory(options, network.unet)
    if options.gradient_checkpointing:
        for encoder in network.encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    return network


def with_prior(options: FinetuneOptions, data: Data, painter: Painter, report: Report) -> Data:
    """`data` with as many class pictures beside those of every batch, painted where they lack."""
    paint_missing(painter, report)
    cuts = DataOptions(image_size=options.image_size, crop=options.crop)
    pictures = open_source(str(painter.folder), cuts)
    classes = Worded(pictures, options.class_prompt, options.prior_loss_weight)
    learn = data.learn
    if isinstance(learn, PreparedStream):
        # A seed of their own, so that no class picture has the mask of one that it stands beside.
        others = PreparedSource(classes, learn.preparation, options.seed + 1)
        return replace(data, learn=StreamBeside(learn, others))
    joined = join(learn, classes)
    if learn.latents is not None:
        team, bundle = painter.team, painter.pipeline.bundle
        # One process encodes; the others wait for its word.
        made = cache_classes(options, bundle, joined, report) if team.main else None
        cache = open_cache(team.tell(made), {})
        if (own := bundle.text.cache) is not None and cache.texts is not None:
            bundle.text.cache = JoinedKept(own, cache.texts)
        joined.latents = JoinedLatents(
            own=learn.latents, others=cache.latents, first=len(learn.source)
        )
    buckets = joined.bucket_of()
    assert buckets is not None
    order = Beside(data.order, buckets[: len(learn)], len(classes), options.seed)
    return Data(learn=joined, keep=data.keep, order=order)

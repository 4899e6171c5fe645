"""The start of a run: options become data, a frozen base, a network, and a folder."""

from __future__ import annotations

import itertools
import logging
import math
import time
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from controlfill.data.buckets import Buckets, make_buckets
from controlfill.data.cache import LatentCache, describe, open_cache
from controlfill.data.hints import Spec, open_spec
from controlfill.data.sample import Batch, PreparedSource, Source
from controlfill.data.shards import ShardStream
from controlfill.data.sources import make_preparation, open_source
from controlfill.data.streams import PreparedStream
from controlfill.diffusion.legibility import TextWeighting
from controlfill.diffusion.losses import Weighting
from controlfill.diffusion.objective import Objective
from controlfill.diffusion.text_loss import TextLoss
from controlfill.errors import UserError
from controlfill.inference.pipeline import choose_spec
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.controlnet import (
    Header,
    find_controlnet,
    load_controlnet,
    make_controlnet,
    make_header,
    read_control_header,
)
from controlfill.models.ocr import READERS, has_reader, load_reader
from controlfill.options import CacheOptions, TrainOptions, check_numbers
from controlfill.training.batches import (
    Order,
    Places,
    Streamed,
    collate_prepared,
    count_steps,
    make_batches,
    make_order,
    make_stream,
    steps_per_epoch,
)
from controlfill.training.checkpoint import RUN
from controlfill.training.team import Team

if TYPE_CHECKING:
    from diffusers import ControlNetModel
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)
# Apart from all seeds of training, so that the validation split is the same for every seed.
SPLIT_SEED = 20_231


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: pictures to learn from in their order, and some kept apart to measure.

    A stream has no places: its order is its own.
    """

    learn: PreparedSource | PreparedStream
    keep: PreparedSource | None
    order: Order


@dataclass(kw_only=True)
class Run:
    """A prepared run: everything an engine needs, wired. `step` is the one it starts after."""

    options: TrainOptions
    team: Team
    bundle: Bundle
    spec: Spec
    network: ControlNetModel
    data: Data
    folder: Path
    step: int = 0
    reading: TextLoss | None = None

    @property
    def header(self) -> Header:
        """What the saved network says of itself."""
        return make_header(self.bundle, self.spec.label, self.step)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the pictures."""
        return steps_per_epoch(self.data.order, self.options, self.team.ranks)

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(self.data.order, self.options, self.team.ranks)

    def objective(self) -> Objective:
        """The loss that the options ask for."""
        options = self.options
        weighting = Weighting(
            snr_gamma=options.snr_gamma, hole=options.hole_weight, text=options.text_box_weight
        )
        return Objective(
            self.bundle,
            self.spec,
            options.proportion_empty_prompts,
            options.noise_offset,
            weighting,
            self.reading,
        )

    def batches(self, start: int, stop: int) -> DataLoader[Any]:
        """The batches of this process for the optimizer steps from `start` to `stop`."""
        options, team, data = self.options, self.team, self.data
        first, last = (step * options.gradient_accumulation_steps for step in (start, stop))
        if isinstance(data.learn, PreparedStream):
            return make_stream(data.learn.between(first, last), self.spec, options.num_workers)
        places = Places(data.order, team.rank, team.ranks, options.overfit_batches)
        return make_batches(data.learn, places.between(first, last), self.spec, options.num_workers)

    def first_batch(self, most: int) -> Batch:
        """At most `most` of the pictures to learn from, of one size, always the same ones."""
        learn = self.data.learn
        if isinstance(learn, PreparedStream):
            alone = PreparedStream(learn.stream, learn.preparation, learn.seed, most)
            items = next(iter(alone.between(0, 1)))
        else:
            count, of = min(most, len(learn)), learn.bucket_of()
            same = np.arange(count) if of is None else np.nonzero(of == of[0])[0][:count]
            items = [learn[0, int(place)] for place in same]
        return collate_prepared(items, self.spec).to("cpu")


def prepare(options: TrainOptions, team: Team, source: Source | None = None) -> Run:
    """Open the data, load the base, and make or load the network; the folder is chosen later."""
    check_numbers(options)
    given = source if source is not None else open_source(options.image_dir, options)
    say_missing(given)
    spec = open_spec(options.conditioning)
    check_hints(given, spec)
    bundle = load_bundle(options.pretrained_model_name_or_path)
    bundle.check_size(options.image_size)
    if isinstance(given, ShardStream):
        data = open_streamed(options, given, team)
    else:
        data = open_data(options, given, bundle)
    network = start_network(options, bundle, spec)
    bundle.to(team.device, team.frozen_dtype)
    return Run(
        options=options, team=team, bundle=bundle, spec=spec, network=network, data=data,
        folder=options.output_dir, reading=open_text_loss(options, given, team),
    )  # fmt: skip


def open_text_loss(options: TrainOptions, source: Source, team: Team) -> TextLoss | None:
    """The text loss that `options` ask for. Raises UserError for data without labels."""
    if not options.text_loss:
        return None
    signs = getattr(source, "signs", "")
    if not signs:
        raise UserError(
            "--text_loss needs to know what is written: data with the columns `box` and `texts`, "
            "as `prepare skins` writes it, or world:skins"
        )
    weighting = TextWeighting(
        scale=options.text_loss, feature=options.text_loss_feature, ctc=options.text_loss_ctc,
        most_t=options.text_loss_max_t, by_time=options.text_loss_weighting,
    )  # fmt: skip
    learned = options.text_loss_ocr
    judges = [name for name in READERS if name != learned and has_reader(name)]
    readers = [load_reader(name).to(team.device) for name in (learned, *judges)]
    return TextLoss(readers, weighting, signs, options.text_loss_labels)


def open_data(options: TrainOptions, source: Source, bundle: Bundle) -> Data:
    """The pictures of `source`, in buckets and with cached latents where asked, and their order."""
    buckets = open_buckets(options, source, bundle)
    if buckets is not None:
        say_buckets(buckets.counts())
    latents = None
    if options.cache_dir is not None:
        latents = use_cache(options, source, bundle)
    learn, keep = split(len(source), options.val_split)
    preparation = make_preparation(options)
    whole = PreparedSource(source, preparation, options.seed, buckets, latents, learn)
    whole[0, 0]  # data that can't be used at all is said now, not after some steps
    rest = copy(whole)
    rest.indices = keep
    return Data(learn=whole, keep=rest if len(keep) else None, order=make_order(whole, options))


def open_buckets(
    options: TrainOptions | CacheOptions, source: Source, bundle: Bundle
) -> Buckets | None:
    """The buckets of `source`, if they are asked for; the same in training and in caching."""
    if not options.aspect_ratio_buckets:
        return None
    return make_buckets(sizes_of(source), options.image_size, bundle.size_multiple)


def open_streamed(options: TrainOptions, stream: ShardStream, team: Team) -> Data:
    """A stream as data. Raises UserError for what needs every picture to have its place."""
    for name in ("aspect_ratio_buckets", "cache_dir", "val_split", "overfit_batches"):
        if getattr(options, name):
            raise UserError(
                f"--{name} needs data whose pictures can be read in any order, which tar shards "
                "are not; unpack them, or leave it out"
            )
    if stream.length is None and options.max_steps is None:
        raise UserError("the length of this stream is not known; give --max_steps")
    order = Streamed(stream.length or 0, options.batch_size)
    preparation = make_preparation(options)
    learn = PreparedStream(
        stream, preparation, options.seed, options.batch_size, team.rank, team.ranks
    )
    return Data(learn=learn, keep=None, order=order)


def split(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to learn from and to keep apart, each sorted; the same for every seed."""
    kept = min(count - 1, math.ceil(count * share))
    turn = np.random.default_rng(SPLIT_SEED).permutation(count) if kept else np.arange(count)
    return np.sort(turn[kept:]), np.sort(turn[:kept])


def use_cache(options: TrainOptions, source: Source, bundle: Bundle) -> LatentCache:
    """Open the cache of `options`, let the bundle read texts from it, and return its latents."""
    assert options.cache_dir is not None
    wanted = describe(options.image_dir, source, options, options.aspect_ratio_buckets)
    cache = open_cache(options.cache_dir, {**wanted, **bundle.fingerprints()})
    bundle.text.cache = cache.texts
    log.info("latents%s come from %s", " and texts" if cache.texts else "", options.cache_dir)
    return cache.latents


def sizes_of(source: Source) -> np.ndarray:
    """Height and width (N, 2) of all pictures, known without decoding them. Raises UserError."""
    sizes = getattr(source, "sizes", lambda: None)()
    if sizes is None:
        raise UserError(
            "--aspect_ratio_buckets needs the pictures' sizes beforehand, which this data does not "
            "tell; give a folder, a table or COCO, or leave it out"
        )
    return sizes


def say_buckets(counts: dict[tuple[int, int], int]) -> None:
    """Say how the pictures fell into buckets."""
    words = ", ".join(f"{width}x{height}: {n}" for (height, width), n in counts.items())
    log.info("buckets (width x height: pictures): %s", words)


def check_hints(source: Source, spec: Spec) -> None:
    """Raise UserError when conditioning pictures are there but not used, or the other way round."""
    has = getattr(source, "has_hints", None)
    if has is False and spec.given:
        raise UserError(
            "--conditioning image needs conditioning pictures, which this data does not have; "
            "leave it out to fill holes"
        )
    if has and not spec.given:
        raise UserError(
            "this data has conditioning pictures; use them with --conditioning image, or take "
            "their column out to fill holes"
        )


def say_missing(source: Source) -> None:
    """Say how many annotated pictures are not there, and name the first."""
    missing = getattr(source, "missing", [])
    if missing:
        log.warning(
            "%d pictures that the data names are absent and left out: %s%s",
            len(missing), ", ".join(missing[:5]), ", ..." if len(missing) > 5 else "",
        )  # fmt: skip


def start_network(options: TrainOptions, bundle: Bundle, spec: Spec) -> ControlNetModel:
    """The ControlNet to begin with: given weights, or a copy of the base's encoder."""
    latent = spec.at_latent_size
    given = options.controlnet_model_name_or_path
    if given:
        file = find_controlnet(given)
        choose_spec(read_control_header(file), spec.name, file)
        network = load_controlnet(file, bundle, spec.channels, at_latent_size=latent)
    else:
        # The hint's convolutions start at random: the same ones for the same seed.
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            network = make_controlnet(bundle, spec.channels, at_latent_size=latent)
    spare_memory(options, network, bundle)
    return network


def spare_memory(options: TrainOptions, network: ControlNetModel, bundle: Bundle) -> None:
    """Turn on what the options ask of the networks' own code. Raises UserError."""
    if options.gradient_checkpointing:
        network.enable_gradient_checkpointing()
        # The frozen decoder keeps activations too, for the gradient that passes through it.
        bundle.unet.enable_gradient_checkpointing()
        bundle.unet.train()  # checkpointing works in this mode only; nothing here drops out
    if options.enable_xformers_memory_efficient_attention:
        if find_spec("xformers") is None:
            raise UserError(
                "--enable_xformers_memory_efficient_attention needs xformers: "
                "pip install 'controlfill[xformers]'; torch's own attention is used without it"
            )
        for part in (network, bundle.unet):
            part.enable_xformers_memory_efficient_attention()
    if options.torch_compile:
        bundle.unet.compile()
        network.compile()
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def new_folder(output_dir: Path, team: Team) -> Path:
    """A new folder `controlnet_inpainting_<time>`, the same for all processes."""
    name = ""
    if team.main:
        stamp = f"{RUN}{time.strftime('%Y%m%d_%H%M%S')}"
        names = itertools.chain([stamp], (f"{stamp}_{n}" for n in itertools.count(2)))
        name = next(n for n in names if not (output_dir / n).exists())
        (output_dir / name / "logs").mkdir(parents=True)
    return output_dir / team.tell(name)

"""The run of a ControlNet: a frozen base, a network that learns to steer it, and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from controlfill.data.hints import Spec, open_spec
from controlfill.data.sample import Source
from controlfill.data.shards import ShardStream
from controlfill.data.sources import open_source
from controlfill.diffusion.legibility import TextWeighting
from controlfill.diffusion.losses import Weighting
from controlfill.diffusion.objective import Objective
from controlfill.diffusion.text_loss import TextLoss
from controlfill.errors import UserError
from controlfill.inference.pipeline import Pipeline, choose_spec
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.controlnet import (
    SINGLE,
    WEIGHTS,
    Header,
    find_controlnet,
    load_controlnet,
    make_controlnet,
    make_header,
    read_control_header,
    save_controlnet,
)
from controlfill.models.ocr import READERS, has_reader, load_reader
from controlfill.options import TrainOptions, check_numbers
from controlfill.training import hub
from controlfill.training.sharding import unsplit
from controlfill.training.start import (
    Run,
    open_data,
    open_streamed,
    say_missing,
    spare_memory,
)
from controlfill.training.team import Team

if TYPE_CHECKING:
    from diffusers import ControlNetModel


@dataclass(kw_only=True)
class ControlRun(Run[TrainOptions]):
    """A ControlNet that learns beside a frozen base."""

    network: ControlNetModel
    reading: TextLoss | None = None

    @property
    def header(self) -> Header:
        """What the saved network says of itself."""
        return make_header(self.bundle, self.spec.label, self.step)

    @property
    def config(self) -> dict[str, Any]:
        """The network's config."""
        return dict(self.network.config)

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

    def pipeline(self, network: Any) -> Pipeline:
        """The base, steered by `network`."""
        return Pipeline(bundle=self.bundle, network=network, spec=self.spec)

    def write(self, folder: Path, weights: dict[str, Tensor], name: str) -> None:
        """Write `weights` as a diffusers folder."""
        save_controlnet(unsplit(self.network), folder, self.header, weights, (name,))

    def read(self, folder: Path, name: str) -> dict[str, Tensor]:
        """What `write` wrote."""
        return load_file(folder / name)

    def take(self, weights: dict[str, Tensor]) -> None:
        """Give the network what was read."""
        self.network.load_state_dict(weights)

    def finish(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a diffusers folder, the same as one file, and the card."""
        save_controlnet(unsplit(self.network), folder, self.header, weights, (WEIGHTS, SINGLE))
        hub.write_card(folder, self.header, self.options)


def prepare(options: TrainOptions, team: Team, source: Source | None = None) -> ControlRun:
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
    return ControlRun(
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
    # The frozen decoder keeps activations too, for the gradient that passes through it.
    spare_memory(options, network, bundle.unet)
    return network

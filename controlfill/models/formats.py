"""Models of other tools, opened as diffusers names them: single files and diffusers folders.

No tensor is read before it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.models import configs
from controlfill.models.configs import Config
from controlfill.models.headers import (
    CONFIG_KEY,
    HEADER_KEY,
    ZEROS,
    file_prediction,
    own_config,
    own_pipeline,
)
from controlfill.models.layout import (
    AsDiffusers,
    AsOriginal,
    InMemory,
    Renamed,
    Row,
    check_names,
    without_prefix,
)
from controlfill.models.layout_text import NESTED, clip_rows, full_name, open_clip_rows
from controlfill.models.layout_unet import unet_rows
from controlfill.models.layout_vae import newer_name, vae_rows
from controlfill.models.recognise import (
    VAE,
    Kind,
    NameLayout,
    What,
    family,
    other_method,
    recognise,
    text_parts,
)
from controlfill.models.weights import Weights, open_weights, unpickle

KINDS: dict[str, Kind] = {
    "UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "ControlNetModel": "controlnet",
}  # fmt: skip
TEXT_PARTS = ("text_encoder", "text_encoder_2")
Rows = Callable[[Iterable[str]], tuple[list[Row], list[str]]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint, ControlNet, UNet or autoencoder. `parts` have diffusers' names and shapes.

    `configs` are those of the parts, and for a checkpoint that of its `scheduler`; `pipeline` is
    the class of its pipeline, `empty_is_zero` says what SDXL makes of an empty prompt, and
    `prediction` what a UNet alone says that it predicts.
    """

    kind: Kind
    layout: NameLayout
    family: str
    parts: dict[str, Weights]
    configs: dict[str, Config]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pipeline: str = ""
    empty_is_zero: bool = True
    prediction: str | None = None

    def state(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part, read now."""
        return {name: self.parts[part][name] for name in self.parts[part].names}


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the user says of a file that it doesn't say itself."""

    config_from: Path | None = None
    prediction_type: str | None = None

    def config(self, part: str) -> Config | None:
        """The config of a part in the folder `config_from`; None when it holds none."""
        if self.config_from is None:
            return None
        if not self.config_from.is_dir():
            raise UserError(
                f"--config_from {self.config_from} is no folder; give a diffusers folder"
            )
        for file in (self.config_from / part / "config.json", self.config_from / "config.json"):
            config = read_json(file) if file.is_file() else {}
            kind = KINDS.get(config.get("_class_name", ""), "text_encoder")
            if config and part.startswith(kind):
                return config
        return None


def open_model(path: Path, told: Told | None = None) -> Model:
    """The model at `path`: a diffusers folder, the folder of one network, or a single file.

    Raises UserError for what is no such thing, incomplete, or needs to be `told` more.
    """
    told = told or Told()
    path = Path(path)
    if (path / "model_index.json").is_file():
        return _open_pipeline(path)
    if (path / "config.json").is_file():
        return open_network(path, read_json(path / "config.json"))
    weights = open_run(path) or open_weights(path)
    what = recognise(weights)
    if what.kind == "checkpoint":
        return _open_checkpoint(path, weights, told)
    if what.kind in ("controlnet", "unet", "vae"):
        return _open_single(path, weights, what, told)
    if what.kind == "lora":
        method = next(filter(None, map(other_method, weights.names)), "a LoRA")
        raise UserError(f"{path} is {method}, which is no network of its own")
    raise UserError(
        f"{path} holds no Stable Diffusion checkpoint, ControlNet, UNet or autoencoder; its first "
        f"tensor is {weights.names[0] if weights.names else 'missing'}"
    )


def open_run(file: Path) -> Weights | None:
    """The ControlNet in a checkpoint of our Lightning engine, its average if it has one.

    None for other files.
    """
    state = unpickle(file) if file.suffix == ".ckpt" and file.is_file() else {}
    own = state.get(HEADER_KEY)
    if not isinstance(own, dict):
        return None
    names = {k.removeprefix("network."): v for k, v in state["state_dict"].items()}
    about = {HEADER_KEY: json.dumps(own["header"]), CONFIG_KEY: json.dumps(own["config"])}
    return InMemory(own["average"] or names, about)


def _open_pipeline(folder: Path) -> Model:
    """A diffusers folder of the Stable Diffusion kind."""
    index = read_json(folder / "model_index.json")
    texts = [part for part in TEXT_PARTS if (index.get(part) or [None])[0]]
    if not (folder / "unet").is_dir() or not texts:
        raise UserError(
            f"{folder} is a {index.get('_class_name')}, no Stable Diffusion with a UNet"
        )
    parts, about = {}, {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
    for part in ("unet", "vae", *texts):
        about[part] = read_json(folder / part / "config.json")
        parts[part] = _plain_names(open_weights(folder / part), part)
    configs.check_channels(str(folder), about["unet"])
    channels, told = about["unet"].get("in_channels", 4), str(index.get("_class_name", ""))
    return Model(
        kind="checkpoint", layout="diffusers", family=family(parts["unet"]), parts=parts,
        configs=about, metadata=parts["unet"].metadata,
        pipeline=configs.pipeline_class(channels, "text_encoder_2" in parts, told),
        empty_is_zero=bool(index.get(ZEROS, True)),
    )  # fmt: skip


def open_network(folder: Path, config: Config) -> Model:
    """The folder of one network, as diffusers saves it."""
    kind = KINDS.get(config.get("_class_name", ""))
    if kind is None:
        raise UserError(
            f"{folder} holds a {config.get('_class_name') or config.get('architectures')}; whole "
            "bases, UNets, autoencoders and ControlNets are converted"
        )
    weights = open_weights(folder)
    model = _lone(kind, "diffusers", _plain_names(weights, kind), config)
    return replace(model, prediction=file_prediction(weights) if kind == "unet" else None)


def _lone(kind: Kind, layout: NameLayout, weights: Weights, config: Config) -> Model:
    return Model(
        kind=kind, layout=layout, family="" if kind == "vae" else family(weights),
        parts={kind: weights}, configs={kind: config}, metadata=weights.metadata,
    )  # fmt: skip


def _plain_names(weights: Weights, part: str) -> Weights:
    """The same with the names that today's files have."""
    newer = {"vae": newer_name}.get(part, full_name if part in TEXT_PARTS else str)
    names = {newer(n): n for n in weights.names if not n.endswith("position_ids")}
    return Renamed(weights, names)


def _open_single(path: Path, weights: Weights, what: What, told: Told) -> Model:
    """A file of one network under any names."""
    kind = what.kind
    config = told.config(kind) or own_config(weights, kind)
    # Asked of the whole file: marks have no prefix.
    says = told.prediction_type or file_prediction(weights) if kind == "unet" else None
    plain = Renamed(weights, {name: name for name in weights.names if name not in configs.MARKS})
    if what.layout == "diffusers":
        named = _plain_names(plain, kind)
        config = config or _config_beside(path, kind)
        config = config or read_config(as_original(named, kind), what, told)
        check_names(named, part_shapes(kind, config), str(path))
        model = _lone(kind, what.layout, named, config)
        return replace(model, prediction=says, pipeline=own_pipeline(weights))
    view = without_prefix(plain, what.prefix)
    config = config or read_config(view, what, replace(told, prediction_type=says))
    converted, used = to_diffusers(view, kind, config, str(path))
    notes = _left_out(weights, used)
    model = _lone(kind, what.layout, converted, config)
    return replace(model, notes=notes, prediction=says, pipeline=own_pipeline(weights))


def _config_beside(path: Path, kind: Kind) -> Config | None:
    """The config in the folder of a weights file, when it is one of its kind."""
    beside = path.parent / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    return config if KINDS.get(config.get("_class_name", "")) == kind else None


def read_config(view: Weights, what: What, told: Told) -> Config:
    """The config of a lone network with original names, by its shapes."""
    if what.kind == "vae":
        return configs.vae_config(view, what.family)
    if what.kind == "controlnet":
        return configs.controlnet_config(view, what.family, told.config("unet"))
    return configs.unet_config(view, what.family, told.prediction_type or "epsilon")


def _open_checkpoint(path: Path, weights: Weights, told: Told) -> Model:
    """A whole checkpoint in the original layout."""
    what = recognise(weights)
    places = {"unet": (what.prefix, False), "vae": (VAE, False), **text_parts(weights.names)}
    views = {
        part: _plain_names(without_prefix(weights, prefix), part)
        for part, (prefix, _) in places.items()
    }
    _check_whole(path, weights, views)
    scheduler = _schedule(weights, views["unet"], what.family, told)
    about, parts, used = {"scheduler": scheduler}, {}, 0
    for part, view in views.items():
        opened = places[part][1]
        config = told.config(part) or own_config(weights, part)
        about[part] = config or _shape_config(view, part, what.family, opened, scheduler)
        parts[part], count = to_diffusers(view, part, about[part], str(path), opened)
        used += count
    configs.check_channels(str(path), about["unet"])
    channels, named = about["unet"].get("in_channels", 4), own_pipeline(weights)
    notes = _left_out(weights, used)
    if channels == configs.PAIR_CHANNELS and not named:
        notes = (*notes, "a UNet of 8 channels that says nothing is taken for InstructPix2Pix's")
    return Model(
        kind="checkpoint", layout="original", family=what.family, parts=parts, configs=about,
        metadata=weights.metadata, notes=notes,
        pipeline=configs.pipeline_class(channels, "text_encoder_2" in parts, named),
        empty_is_zero=bool((own_config(weights, "pipeline") or {}).get(ZEROS, True)),
    )  # fmt: skip


def _check_whole(path: Path, weights: Weights, views: dict[str, Weights]) -> None:
    """Raise UserError unless a checkpoint has all parts and is of a kind known here."""
    if "edm_mean" in weights or "edm_vpred.sigma_max" in weights:
        raise UserError(f"{path} is trained on the EDM schedule, which is not known here")
    if "text_encoder" not in views or not views["vae"].names:
        lacking = "autoencoder" if "text_encoder" in views else "text encoder"
        raise UserError(f"{path} has no {lacking} beside its UNet; give a whole checkpoint")
    if family(views["unet"]) == "refiner":
        raise UserError(f"{path} is SDXL's refiner, which only retouches; give SDXL's base")


def _schedule(weights: Weights, unet: Weights, base: str, told: Told) -> Config:
    """The noise schedule of a checkpoint, with what its UNet predicts."""
    own = own_config(weights, "scheduler")
    prediction = (
        told.prediction_type
        or (own or {}).get("prediction_type")
        or configs.told_prediction(weights, unet, base)
    )
    schedule = own or configs.scheduler_config(prediction, "ztsnr" in weights)
    return schedule | {"prediction_type": prediction}


def _shape_config(view: Weights, part: str, base: str, opened: bool, scheduler: Config) -> Config:
    """The config of a checkpoint's part by its shapes."""
    if part == "unet":
        return configs.unet_config(view, base, scheduler["prediction_type"])
    if part == "vae":
        return configs.vae_config(view, base)
    return configs.for_part(configs.clip_config(view, opened), view, part, opened)


def _left_out(weights: Weights, used: int) -> tuple[str, ...]:
    """Lines about what a checkpoint has and diffusers has no place for."""
    averages = [name for name in weights.names if name.startswith("model_ema.")]
    marks = sum(name in weights for name in configs.MARKS)
    others = len(weights.names) - used - len(averages) - marks
    lines = []
    if averages:
        lines.append(f"left out the {len(averages)} averages of training (model_ema)")
    if others:
        lines.append(f"left out {others} tensors that diffusers has no place for")
    return tuple(lines)


def to_diffusers(
    view: Weights, part: str, config: Config, where: str, opened: bool = False
) -> tuple[Weights, int]:
    """A part with original names as diffusers has it, and how many tensors that takes.

    `opened` says that it is an OpenCLIP text encoder. Raises UserError when something is missing,
    of another shape, or too much.
    """
    shapes = part_shapes(part, config)
    rows, unknown = rows_of(part, opened)(shapes)
    if unknown:
        raise UserError(f"{where}: {unknown[0]} has no name in the original layout")
    wanted = {row.original for row in rows}
    for row in rows:
        if row.original not in view:
            raise UserError(
                f"{where} lacks {row.original} of its {part}; it is cut, or of another architecture"
            )
    extra = [name for name in view.names if name not in wanted]
    if extra and part in ("unet", "controlnet"):
        raise UserError(f"{where} has {extra[0]}, which no architecture known here has")
    converted = AsDiffusers(view, rows)
    check_names(converted, shapes, f"{where} ({part})")
    return converted, len(wanted)


def as_original(weights: Weights, part: str, opened: bool = False) -> Weights:
    """A part under original names, without a prefix. Raises UserError when these lack one."""
    rows, unknown = rows_of(part, opened)(weights.names)
    if unknown:
        raise UserError(
            f"{unknown[0]} has no name in the original layout; write --layout diffusers"
        )
    return AsOriginal(weights, rows)


def rows_of(part: str, opened: bool = False) -> Rows:
    """The table of names for a part; `opened` says that it is an OpenCLIP text encoder."""
    if part in TEXT_PARTS:
        return open_clip_rows if opened else clip_rows
    return vae_rows if part == "vae" else unet_rows


def part_shapes(part: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Names, as files have them, and shapes of a part with this config; nothing is allocated."""
    with torch.device("meta"):
        network = make_part(part, config)
    name = full_name if part in TEXT_PARTS else str
    return {name(key): tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def make_part(part: str, config: Config) -> Any:
    """A fresh network with this config. Raises UserError when the config is none of its kind."""
    import diffusers
    import transformers

    try:
        if part not in TEXT_PARTS:
            name = {kind: cls for cls, kind in KINDS.items()}[part]  # pyright: ignore
            return getattr(diffusers, name).from_config(dict(config))
        known = transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "dtype"})
        two = part == "text_encoder_2"
        cls = transformers.CLIPTextModelWithProjection if two else transformers.CLIPTextModel
        return cls(known)
    except (TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the config of the {part} can't be used: {reason}") from error


def load_part(model: Model, part: str) -> Any:
    """The network of a part with its weights, in evaluation mode and the weights' format."""
    state = model.state(part)
    if part not in TEXT_PARTS:
        # On no device, so that nothing is drawn at random only to be replaced.
        with torch.device("meta"):
            network = make_part(part, model.configs[part])
        network.load_state_dict(state, assign=True)
        return network.eval()
    network = make_part(part, model.configs[part])
    if not any(name.startswith(NESTED) for name in network.state_dict()):
        state = {name.removeprefix(NESTED): tensor for name, tensor in state.items()}
    network.load_state_dict(state)
    return network.to(next(iter(state.values())).dtype).eval()

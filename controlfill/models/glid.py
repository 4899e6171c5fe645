"""UNets alone, as glid-3-xl-stable keeps them: split from a checkpoint, joined, run on a base.

Its files hold the names of Stable Diffusion's checkpoints without their prefix. Diffusers folders
and files of diffusers' names are taken too; tensors are read one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from controlfill.errors import UserError
from controlfill.files import check_empty, read_json, write_folder, write_json
from controlfill.models.configs import (
    MARKS,
    PAIR_CHANNELS,
    PLAIN_CHANNELS,
    is_pipeline,
    pipeline_class,
    spec_prediction,
)
from controlfill.models.headers import CONFIGS_KEY, ZEROS, file_prediction, said_prediction, spec
from controlfill.models.layout import (
    AsDiffusers,
    AsOriginal,
    Renamed,
    Together,
    check_names,
    save,
)
from controlfill.models.layout_unet import unet_rows
from controlfill.models.recognise import UNET, text_parts
from controlfill.models.weights import Weights, open_weights

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# A checkpoint's own average of its UNet, which a new UNet makes stale.
AVERAGE = "model_ema."
# The first convolution in either layout; it alone tells how many channels go in.
FIRST, FIRST_DIFFUSERS = "input_blocks.0.0.weight", "conv_in.weight"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Shapes = dict[str, tuple[int, ...]]


def split(checkpoint: Path, out: Path) -> int:
    """Write the UNet of a whole `checkpoint` as a file of its own; returns how many tensors.

    Raises UserError for what holds no UNet of Stable Diffusion.
    """
    check_file(out)
    with open_unet(checkpoint) as unet:
        alone = as_original(unet)
        save(alone, out, described(alone))
        return len(alone.names)


def join(checkpoint: Path, unet: Path, out: Path) -> int:
    """Write `checkpoint`, a file or a diffusers folder, with `unet` in the place of its own.

    Returns how many tensors the UNet has. It may take other channels than the old one, such as 8
    or 9 instead of 4; averages of the old one are left out. Raises UserError when it does not fit
    or says that it predicts something else.
    """
    if Path(checkpoint).is_dir():
        return join_folder(checkpoint, unet, out)
    check_file(out)
    with open_weights(checkpoint) as whole, open_unet(unet) as new:
        fresh = as_original(new)
        own = {name: whole.shape(UNET + name) for name in names_behind(whole, UNET)}
        if FIRST not in own:
            raise UserError(f"{checkpoint} is no whole checkpoint: it lacks {UNET}{FIRST}")
        check_fits(fresh, own, unet, str(checkpoint))
        check_prediction(str(checkpoint), file_prediction(whole), unet, new)
        others = [name for name in whole.names if not name.startswith((UNET, AVERAGE))]
        parts = [("", Renamed(whole, {name: name for name in others})), (UNET, fresh)]
        channels = fresh.shape(FIRST)[1]
        about = with_channels(described(whole), channels)
        save(Together(parts), out, with_pipeline(about, whole, channels))
        return len(fresh.names)


def join_folder(base: Path, unet: Path, out: Path) -> int:
    """The same for a diffusers folder. Raises UserError when `out` holds something already."""
    check_empty(out, "joined base")
    config = read_json(base / "unet" / "config.json")
    with open_unet(unet) as new:
        seen = as_diffusers(new, config, unet, str(base))
        check_prediction(str(base), folder_prediction(base), unet, new)
        channels = seen.shape(FIRST_DIFFUSERS)[1]
        with write_folder(out) as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True, ignore=ignore_unet(base))
            write_json(folder / "unet" / "config.json", config | {"in_channels": channels})
            save(seen, folder / "unet" / WEIGHTS, described(new))
            describe_pipeline(folder, channels)
        return len(seen.names)


def describe_pipeline(folder: Path, channels: int) -> None:
    """Let the index of a folder name the pipeline of a UNet that takes so many channels."""
    file = folder / "model_index.json"
    index = read_json(file) if file.is_file() else {}
    if is_pipeline(index.get("_class_name")):
        two = bool((index.get("text_encoder_2") or [None])[0])
        write_json(file, index | {"_class_name": joined_class(channels, two)})


def joined_class(channels: int, two: bool) -> str:
    """The pipeline of a UNet that was joined: one of 8 channels is glid-3-xl-stable's.

    diffusers has no pipeline that would fill holes with it.
    """
    return pipeline_class(PLAIN_CHANNELS if channels == PAIR_CHANNELS else channels, two)


def check_prediction(base: str, wanted: str | None, path: Path, unet: Weights) -> None:
    """Raise UserError when the UNet in `path` says that it predicts other than the base does."""
    found = spec_prediction(unet.metadata)
    if wanted and found and wanted != found:
        raise UserError(
            f"{base} predicts {wanted}, {path} {found}; with the other's noise schedule it would "
            "paint noise (`controlfill convert` with --prediction_type makes a file that says "
            "what it predicts)"
        )


def folder_prediction(folder: Path) -> str | None:
    """What the UNet of a diffusers folder predicts, by its scheduler; None where it has none."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    # diffusers takes a missing key for epsilon.
    return read_json(scheduler).get("prediction_type", "epsilon") if scheduler.is_file() else None


def ignore_unet(base: Path) -> Any:
    """What copytree leaves out: the folder `unet` of `base`."""
    return lambda where, names: ["unet"] if Path(where) == Path(base) else []


def load_unet(path: Path, config: dict[str, Any], base: str) -> UNet2DConditionModel:
    """The UNet in `path` in float32, for a `base` whose own UNet has `config`.

    It may take other channels than that. Raises UserError when it is of another family.
    """
    with open_unet(path) as weights:
        seen = as_diffusers(weights, config, path, base)
        network: Any = make_network(config, seen.shape(FIRST_DIFFUSERS)[1])
        state = {name: seen[name].float() for name in seen.names}
        network.load_state_dict(state, assign=True)
    return network


def count_channels(path: Path) -> int:
    """How many channels go into the UNet in `path`, without reading it. Raises UserError."""
    with open_unet(path) as weights:
        return weights.shape(FIRST_DIFFUSERS if FIRST_DIFFUSERS in weights else FIRST)[1]


@contextmanager
def open_unet(path: Path) -> Iterator[Weights]:
    """The tensors of the UNet in `path`, by their names without a prefix.

    `path` is a file (a UNet alone or a whole checkpoint, safetensors or pickled), a UNet's folder,
    or a diffusers folder that has one. The header that it comes with says what it predicts, if
    anything does. Raises UserError when there is none.
    """
    told = folder_prediction(Path(path))
    path = Path(path) / "unet" if (Path(path) / "unet").is_dir() else Path(path)
    with open_weights(path) as weights:
        inner = {name: UNET + name for name in names_behind(weights, UNET)}
        plain = {name: name for name in weights.names if name not in MARKS}
        seen = Renamed(weights, inner or plain)
        seen.metadata = weights.metadata | spec(told or said_prediction(weights))
        if FIRST not in seen and FIRST_DIFFUSERS not in seen:
            raise UserError(
                f"{path} holds no UNet of Stable Diffusion: it has neither {FIRST} nor "
                f"{FIRST_DIFFUSERS}"
            )
        yield seen


def names_behind(weights: Weights, prefix: str) -> list[str]:
    """The rest of all names that begin with `prefix`."""
    return [name[len(prefix) :] for name in weights.names if name.startswith(prefix)]


def as_original(unet: Weights) -> Weights:
    """A UNet's tensors in the layout of Stable Diffusion's checkpoints."""
    return AsOriginal(unet, unet_rows(unet.names)[0]) if FIRST_DIFFUSERS in unet else unet


def as_diffusers(unet: Weights, config: dict[str, Any], path: Path, base: str) -> Weights:
    """A UNet's tensors as a network of `config` has them. Raises UserError where they differ."""
    first = FIRST_DIFFUSERS if FIRST_DIFFUSERS in unet else FIRST
    network = make_network(config, unet.shape(first)[1])
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if first == FIRST:
        rows = unet_rows(shapes)[0]
        own = {row.original: shapes[row.diffusers] for row in rows}
        check_fits(unet, own, path, base)
        return AsDiffusers(unet, rows)
    check_fits(unet, shapes, path, base)
    return unet


def make_network(config: dict[str, Any], channels: int) -> UNet2DConditionModel:
    """A UNet of `config` for so many `channels`, without memory for its weights."""
    from diffusers import UNet2DConditionModel

    cls: Any = UNet2DConditionModel
    with torch.device("meta"):
        return cls.from_config({**config, "in_channels": channels})


def check_fits(unet: Weights, shapes: Shapes, path: Path, base: str) -> None:
    """Raise UserError unless the UNet in `path` has these `shapes`, but for its first channels."""
    for name, shape in shapes.items():
        told = name.endswith("attn2.to_k.weight") and name in unet
        if told and unet.shape(name)[1] != shape[1]:
            raise UserError(
                f"{path} is a UNet of another family than {base}: it listens to text "
                f"{unet.shape(name)[1]} wide, where the base's is {shape[1]}"
            )
    first = FIRST if FIRST in shapes else FIRST_DIFFUSERS
    width, _, *kernel = shapes[first]
    wanted = {**shapes, first: (width, unet.shape(first)[1], *kernel)}
    check_names(unet, wanted, f"{path}, beside {base},")


def check_file(out: Path) -> None:
    """Raise UserError unless `out` is the name of a new safetensors file."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"{out} is no .safetensors file, which is what is written")
    if out.exists():
        raise UserError(f"{out} exists already; name a new file for the result")


def with_channels(about: dict[str, str], channels: int) -> dict[str, str]:
    """A header whose config of the UNet, if it has one, tells how many channels go in now."""
    if CONFIGS_KEY not in about:
        return about
    configs = json.loads(about[CONFIGS_KEY])
    if "unet" in configs:
        configs["unet"] |= {"in_channels": channels}
    pipeline = configs.pop("pipeline", None)  # its class was that of the other UNet
    if isinstance(pipeline, dict) and ZEROS in pipeline:
        configs["pipeline"] = {ZEROS: pipeline[ZEROS]}
    return about | {CONFIGS_KEY: json.dumps(configs)}


def with_pipeline(about: dict[str, str], whole: Weights, channels: int) -> dict[str, str]:
    """A header that also tells glid-3-xl-stable's UNet from InstructPix2Pix's."""
    if channels != PAIR_CHANNELS:
        return about
    two = "text_encoder_2" in text_parts(whole.names)
    told = json.loads(about.get(CONFIGS_KEY, "{}"))
    told["pipeline"] = told.get("pipeline", {}) | {"_class_name": joined_class(channels, two)}
    return about | {CONFIGS_KEY: json.dumps(told)}


def described(weights: Weights) -> dict[str, str]:
    """What a header says beside the format, which is written anyway."""
    return {key: value for key, value in weights.metadata.items() if key != "format"}

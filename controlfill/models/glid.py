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
    INPAINT_CHANNELS,
    PAIR_CHANNELS,
    PLAIN_CHANNELS,
    pipeline_class,
)
from controlfill.models.formats import CONFIGS_KEY
from controlfill.models.layout import (
    AsDiffusers,
    AsOriginal,
    Renamed,
    Together,
    check_names,
    save,
)
from controlfill.models.layout_unet import unet_rows
from controlfill.models.weights import Weights, open_weights

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

PREFIX = "model.diffusion_model."
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
    or 9 instead of 4; averages of the old one are left out. Raises UserError when it does not fit.
    """
    if Path(checkpoint).is_dir():
        return join_folder(checkpoint, unet, out)
    check_file(out)
    with open_weights(checkpoint) as whole, open_unet(unet) as new:
        fresh = as_original(new)
        own = {name: whole.shape(PREFIX + name) for name in names_behind(whole, PREFIX)}
        if FIRST not in own:
            raise UserError(f"{checkpoint} is no whole checkpoint: it lacks {PREFIX}{FIRST}")
        check_fits(fresh, own, unet, str(checkpoint))
        others = [name for name in whole.names if not name.startswith((PREFIX, AVERAGE))]
        parts = [("", Renamed(whole, {name: name for name in others})), (PREFIX, fresh)]
        channels = fresh.shape(FIRST)[1]
        about = with_channels(described(whole), channels)
        save(Together(parts), out, with_pipeline(about, whole, channels))
        return len(fresh.names)


def join_folder(base: Path, unet: Path, out: Path) -> int:
    """The same for a diffusers folder. Raises UserError when `out` holds something already."""
    # It imports the loaders of bases, which import this module.
    from controlfill.models.merge_sources import describe_inpaint

    check_empty(out, "joined base")
    config = read_json(base / "unet" / "config.json")
    with open_unet(unet) as new:
        seen = as_diffusers(new, config, unet, str(base))
        channels = seen.shape(FIRST_DIFFUSERS)[1]
        with write_folder(out) as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True, ignore=ignore_unet(base))
            write_json(folder / "unet" / "config.json", config | {"in_channels": channels})
            save(seen, folder / "unet" / WEIGHTS, described(new))
            if channels == INPAINT_CHANNELS:
                describe_inpaint(folder, "unet")
        return len(seen.names)


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
    or a diffusers folder that has one. Raises UserError when there is none.
    """
    path = Path(path)
    path = path / "unet" if (path / "unet").is_dir() else path
    with open_weights(path) as weights:
        inner = names_behind(weights, PREFIX)
        seen = Renamed(weights, {name: PREFIX + name for name in inner}) if inner else weights
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
    configs.pop("pipeline", None)  # it was that of the other UNet
    return about | {CONFIGS_KEY: json.dumps(configs)}


def with_pipeline(about: dict[str, str], whole: Weights, channels: int) -> dict[str, str]:
    """A header that also tells glid-3-xl-stable's UNet from InstructPix2Pix's."""
    if channels != PAIR_CHANNELS:
        return about
    two = any(name.startswith("conditioner.") for name in whole.names)
    # diffusers has no pipeline that would fill holes with it.
    pipeline = {"_class_name": pipeline_class(PLAIN_CHANNELS, two)}
    told = json.loads(about.get(CONFIGS_KEY, "{}")) | {"pipeline": pipeline}
    return about | {CONFIGS_KEY: json.dumps(told)}


def described(weights: Weights) -> dict[str, str]:
    """What a header says beside the format, which is written anyway."""
    return {key: value for key, value in weights.metadata.items() if key != "format"}

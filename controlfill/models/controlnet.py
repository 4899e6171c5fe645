"""ControlNets: made from a UNet, saved with a header that explains them, loaded from anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_header, read_json
from controlfill.models import embedded
from controlfill.models.bundle import Bundle
from controlfill.models.formats import (
    CONFIG_KEY,
    HEADER_KEY,
    open_run,
    to_diffusers,
    without_prefix,
)
from controlfill.models.recognise import recognise, text_width
from controlfill.models.weights import Weights, open_weights, stem_file

if TYPE_CHECKING:
    from diffusers import ControlNetModel

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SINGLE = "controlnet.safetensors"
AVERAGE = "ema.safetensors"
# The hint passes through these widths of the ControlNet paper, halving its size at each but one.
HINT_WIDTHS = (16, 32, 96, 256)


def own_version() -> str:
    """The installed version; a checkout that runs without being installed has none."""
    try:
        return version("controlfill")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a saved ControlNet says of itself: enough to use it without guessing."""

    conditioning: str
    base: str
    base_family: str
    prediction_type: str
    step: int = 0
    version: str = field(default_factory=own_version)


def make_header(bundle: Bundle, conditioning: str, step: int = 0) -> Header:
    """The header of a ControlNet trained on `bundle` with hints of `conditioning`."""
    return Header(
        conditioning=conditioning,
        base=bundle.name,
        base_family=bundle.family,
        prediction_type=bundle.prediction_type,
        step=step,
    )


def make_controlnet(
    bundle: Bundle, channels: int, *, at_latent_size: bool = False
) -> ControlNetModel:
    """A ControlNet that copies the base's encoder and ends in zero convolutions (Zhang 2023).

    `channels` is that of the hint, which has the picture's size unless `at_latent_size`.
    """
    from diffusers import ControlNetModel

    halvings = 0 if at_latent_size else bundle.factor.bit_length() - 1
    return ControlNetModel.from_unet(
        bundle.unet,
        conditioning_channels=channels,
        conditioning_embedding_out_channels=HINT_WIDTHS[: halvings + 1],
    )


def save_controlnet(
    network: ControlNetModel,
    folder: Path,
    header: Header,
    weights: dict[str, Tensor] | None = None,
    names: tuple[str, ...] = (WEIGHTS,),
) -> None:
    """Write `network`'s config, and its weights (or `weights` in their place) as each of `names`.

    Every file carries `header` and the config, so it can be used alone.
    """
    from safetensors.torch import save_file

    network.save_config(folder)
    state = weights if weights is not None else network.state_dict()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    about = {
        "format": "pt",
        HEADER_KEY: json.dumps(asdict(header)),
        CONFIG_KEY: json.dumps(dict(network.config), default=str),
    }
    for name in names:
        save_file(state, folder / name, metadata=about)


def find_controlnet(where: str) -> Path:
    """The weights file that `where` means: a file, a folder, a run, or the name of
    an embedded base.

    A folder of runs means its newest. Raises UserError when there is none.
    """
    path = embedded.CONTROLS.get(where, Path(where))
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"the ControlNet {where} does not exist; give a checkpoint folder, "
            "final_model, a diffusers folder, a .safetensors file, or `embedded`"
        )
    for folder in (path, path / "final_model", *reversed(list_checkpoints(path))):
        # A run with averaged weights means those, in its checkpoints as in its final model.
        if (folder / AVERAGE).is_file():
            return folder / AVERAGE
        # Others' folders may hold half precision alone, shards, or a pickle.
        if file := stem_file(folder, STEM):
            return file
    for file in (path / "checkpoints" / "last.ckpt", *sorted(path.glob("*.ckpt"))):
        if file.is_file():
            return file
    runs = sorted(path.glob("controlnet_inpainting_*"))
    if runs:
        return find_controlnet(str(runs[-1]))
    seen = ", ".join(sorted(f.name for f in path.iterdir())[:4]) or "nothing"
    raise UserError(
        f"{where} holds no ControlNet: {WEIGHTS} is missing (or the same with .fp16, or .bin); it "
        f"holds {seen}; name the file if it is called otherwise"
    )


def list_checkpoints(run: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def read_control_header(file: Path) -> Header | None:
    """The header of a weights file; None for foreign weights, which carry none."""
    known = {f.name for f in fields(Header)}
    try:
        values = json.loads(_about(file).get(HEADER_KEY) or "null")
        return Header(**{k: v for k, v in values.items() if k in known}) if values else None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} has a damaged header: {error}") from error


def _about(file: Path) -> dict[str, str]:
    """What a weights file says of itself beside its tensors."""
    if file.suffix == ".safetensors":
        return read_header(file)
    own = open_run(file)
    return own.metadata if own else {}


def load_controlnet(file: Path, bundle: Bundle, channels: int, **kind: Any) -> ControlNetModel:
    """The ControlNet in `file`, float32, for use with `bundle`; under any tool's names.

    Its config comes from the file's header or the config.json beside it; foreign single files get
    the one that `make_controlnet` would give. Raises UserError when the weights don't fit.
    """
    from diffusers import ControlNetModel

    config = _config_of(file)
    network: Any = (
        make_controlnet(bundle, channels, **kind)
        if config is None
        else ControlNetModel.from_config(config)
    )
    weights = open_run(file) or open_weights(file)
    width = text_width(weights) or network.config["cross_attention_dim"]
    _check_fit(bundle, channels, file, (width, network.config["conditioning_channels"]))
    named = _diffusers_names(weights, network, file)
    try:
        network.load_state_dict({name: named[name] for name in named.names})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200] if "\n" in str(error) else str(error)
        raise UserError(
            f"the weights in {file} are no ControlNet for this base: {reason}"
        ) from error
    return network.float()


def _config_of(file: Path) -> dict[str, Any] | None:
    if (file.name == AVERAGE or file.name.startswith(STEM)) and (
        file.parent / "config.json"
    ).is_file():
        return read_json(file.parent / "config.json")
    text = _about(file).get(CONFIG_KEY)
    return json.loads(text) if text else None


def _check_fit(bundle: Bundle, channels: int, file: Path, found: tuple[int, int]) -> None:
    """Raise UserError unless text width and hint channels are those of base and spec."""
    width, hint = found
    if width != bundle.unet.config["cross_attention_dim"]:
        raise UserError(
            f"the ControlNet {file} belongs to a base with text width {width}, but {bundle.name} "
            f"has {bundle.unet.config['cross_attention_dim']}; give the base it was trained on"
        )
    if hint != channels:
        raise UserError(
            f"the ControlNet {file} takes hints of {hint} channels, but its conditioning makes "
            f"{channels}; name the conditioning it was trained with"
        )


def _diffusers_names(weights: Weights, network: Any, file: Path) -> Weights:
    """The same weights with the names that `network` has for them."""
    what = recognise(weights)
    if what.kind != "controlnet" or what.layout == "diffusers":
        return weights
    view = without_prefix(weights, what.prefix)
    return to_diffusers(view, "controlnet", dict(network.config), str(file))[0]

"""The pipeline: a base and its ControlNet, loaded once and used by every way in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from controlfill.data.hints import HINTS, Spec, open_spec
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.errors import UserError
from controlfill.inference.openvino import OpenVinoDenoiser
from controlfill.models import embedded
from controlfill.models.bundle import Bundle, current_name, load_bundle
from controlfill.models.controlnet import (
    Header,
    find_controlnet,
    load_controlnet,
    read_control_header,
)
from controlfill.models.lora import find_lora, fuse_lora, read_lora_header
from controlfill.models.text import Recent
from controlfill.options import GrowOptions, HoleOptions, SampleOptions

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from controlfill.inference.complete import Result

log = logging.getLogger(__name__)
# What a pipeline without a ControlNet makes of its pictures; nobody looks at the hint then.
HOLE_SPEC = open_spec("masked-image")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Told (steps done, steps in all); returns False to stop.
Progress = Callable[[int, int], bool | None]
# Told (what is being done, how much of it is done, how much there is).
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where and how networks compute: a device, torch or openvino for CPUs, a number format.

    `engine` openvino reckons in `mixed_precision` inside.
    """

    device: str = "auto"
    mixed_precision: str = "no"
    engine: str = "torch"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A frozen `bundle`, its ControlNet, and the conditioning that it was trained with.

    `denoiser` runs both of them where another engine than torch does.
    """

    bundle: Bundle
    network: ControlNetModel | None
    spec: Spec
    control: str | None = None
    denoiser: ControlDenoiser | None = None
    lock: Lock = field(default_factory=Lock, repr=False)

    def inpaint(
        self,
        image: Any,
        mask: Any,
        prompt: str = "",
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        """Fill the white part of `mask` in `image`: paths, PIL pictures, arrays or tensors.

        `options` are those of HoleOptions (seed, guidance_scale, num_inference_steps, feather,
        only_masked, ...). Raises UserError when sizes differ or nothing is to be filled, and
        InterruptedError when `progress` returns False.
        """
        from controlfill.inference.complete import inpaint

        return inpaint(self, image, mask, HoleOptions(prompt=prompt, **options), progress)

    def outpaint(
        self,
        image: Any,
        prompt: str = "",
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        """A larger picture around `image`: a path, PIL picture, array or tensor.

        `options` are those of GrowOptions: left, right, top and bottom in pixels, or expand="50%",
        or to="1920x1080" with an anchor; and those of `inpaint`. Raises UserError when nothing is
        added, and InterruptedError when `progress` returns False.
        """
        from controlfill.inference.outpaint import outpaint

        return outpaint(self, image, GrowOptions(prompt=prompt, **options), progress)

    def follow(
        self,
        hint: Any,
        prompt: str = "",
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        """A new picture as large as `hint` that follows it, by a ControlNet of given hints.

        `options` as for `inpaint`. Raises UserError for a ControlNet that fills holes.
        """
        from controlfill.inference.complete import follow

        return follow(self, hint, SampleOptions(prompt=prompt, **options), progress)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes the best there is. Raises UserError."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but no CUDA device is there; use --device cpu")
    return torch.device(name)


def load(
    base: str | None = None,
    control: str | None = None,
    *,
    conditioning: str | None = None,
    unet: str | Path | None = None,
    loras: Sequence[str] = (),
    **where: str,
) -> Pipeline:
    """Load a base and a ControlNet; without either, the embedded pair.

    `control` is a checkpoint, final_model, diffusers folder, .safetensors file, or `embedded`;
    `base` is taken from its header when not given; one with an inpaint UNet of 9 or 8 channels also
    works without `control`, and so does `unet`, a file or folder of one, in the place of the base's
    own. Each of `loras`, FILE or FILE:scale, is added to the base's weights; the first one's base
    is taken when none is given, and so is a UNet that one was trained with. `conditioning` is
    needed only for foreign weights, which don't say what they were trained with. `where` is the
    `device`, the `engine` and the `mixed_precision`, as `Where` has them. Raises UserError.
    """
    asked = Where(**where)
    found = [find_lora(words) for words in loras]
    if found and base is None:
        base = choose_lora_base(found[0][0], control)
    if base is not None and unet is None:
        unet = choose_lora_unet([file for file, _ in found], base)
    if control is None and unet is None and (base is None or base in embedded.CONTROLS):
        control = base or embedded.EMBEDDED
    if control is None:
        bundle, network, spec = load_alone(base, unet), None, HOLE_SPEC
    else:
        bundle, network, spec = load_pair(base, find_controlnet(control), conditioning, unet)
    for file, scale in found:
        fuse_lora(bundle, file, scale)
    denoiser = None
    if asked.engine == "openvino":
        if asked.device not in ("auto", "cpu"):
            raise UserError(
                f"--engine openvino computes on the CPU, not on --device {asked.device}"
            )
        place, dtype = torch.device("cpu"), torch.float32
        denoiser = OpenVinoDenoiser(bundle.unet, network, asked.mixed_precision)
    else:
        place, dtype = pick_device(asked.device), DTYPES[asked.mixed_precision]
    place_networks(bundle, network, place, dtype)
    bundle.text.cache = Recent(bundle.text)
    return Pipeline(bundle=bundle, network=network, spec=spec, control=control, denoiser=denoiser)


def load_for(options: Any) -> Pipeline:
    """The pair that the options of a command name, where they say. Raises UserError."""
    return load(
        options.base,
        options.control,
        conditioning=options.conditioning,
        unet=getattr(options, "unet", None),  # commands that follow hints have no such option
        loras=getattr(options, "lora", ()),
        device=options.device,
        mixed_precision=options.mixed_precision,
        engine=options.engine,
    )


def choose_lora_base(file: Path, control: str | None) -> str:
    """The base that `control`, else the LoRA `file`, was trained on. Raises UserError."""
    if control is not None:
        weights = find_controlnet(control)
        return choose_base(read_control_header(weights), None, weights)
    header = read_lora_header(file)
    if header is None:
        raise UserError(f"{file} does not say what base it was trained on; name it with --base")
    return header.base


def choose_lora_unet(files: Sequence[Path], base: str) -> str | None:
    """The UNet that the first of the LoRAs `files` to name one had in the place of the base's own.

    Raises UserError when that is no UNet for `base`, or is not there any more.
    """
    for file in files:
        header = read_lora_header(file)
        if header is None or header.unet is None:
            continue
        if not is_same_base(header.base, base):
            raise UserError(
                f"the LoRA {file} was trained with {header.unet} in the place of the UNet of "
                f"{header.base}; to add it to {base}, name that or another UNet with --unet"
            )
        if not Path(header.unet).exists():
            raise UserError(
                f"the LoRA {file} was trained with {header.unet} in the place of the base's UNet, "
                "which is there no more; name where it is now with --unet"
            )
        log.info("%s was trained with the UNet in %s, which is used too", file, header.unet)
        return header.unet
    return None


def is_same_base(one: str, other: str) -> bool:
    """Whether two names, hub ids or paths, are of one base."""
    first, second = current_name(one), current_name(other)
    there = Path(first).exists() and Path(second).exists()
    return first == second or (there and Path(first).samefile(second))


def place_networks(
    bundle: Bundle, network: ControlNetModel | None, place: torch.device, dtype: torch.dtype
) -> None:
    """Move all networks to `place`, frozen and in `dtype`."""
    bundle.to(place, dtype)
    if network is not None:
        torch.nn.Module.to(network.eval().requires_grad_(False), device=place, dtype=dtype)
    if place.type == "cpu":
        # Convolutions of narrow networks take up to an eighth less time so.
        parts: list[Any] = [bundle.unet, bundle.vae, network]
        for part in filter(None, parts):
            part.to(memory_format=torch.channels_last)


def load_pair(
    base: str | None, file: Path, conditioning: str | None, unet: str | Path | None = None
) -> tuple[Bundle, ControlNetModel, Spec]:
    """The ControlNet in `file`, its base (with another `unet`) and its conditioning.

    Raises UserError.
    """
    header = read_control_header(file)
    spec = choose_spec(header, conditioning, file)
    bundle = load_bundle(choose_base(header, base, file), inpainting=True, unet=unet)
    check_base(header, bundle, file)
    network = load_controlnet(file, bundle, spec.channels, at_latent_size=spec.at_latent_size)
    return bundle, network, spec


def load_alone(base: str | None, unet: str | Path | None = None) -> Bundle:
    """A base that needs no ControlNet, since its UNet sees what is known. Raises UserError."""
    if base is None:
        raise UserError(f"--unet {unet} needs a --base, whose autoencoder and text encoder it uses")
    bundle = load_bundle(base, inpainting=True, unet=unet)
    if not bundle.sees_masks:
        what = f"--base {base}" if unet is None else f"--unet {unet}"
        raise UserError(
            f"{what} needs a --control that was trained on it; only inpaint UNets, which take 9 "
            "channels, or 8 in glid-3-xl-stable, fill holes alone"
        )
    return bundle


def choose_spec(header: Header | None, conditioning: str | None, file: Path) -> Spec:
    """The conditioning recorded with the weights, or the one named. Raises UserError."""
    if header is None:
        if conditioning is None:
            raise UserError(
                f"{file} does not say what conditioning it was trained with; name it with "
                f"--conditioning, one of: {', '.join(HINTS)}"
            )
        return open_spec(conditioning)
    spec = open_spec(header.conditioning)
    if conditioning is not None and open_spec(conditioning) != spec:
        raise UserError(
            f"{file} was trained with conditioning {header.conditioning}, not {conditioning}; "
            "leave --conditioning out"
        )
    return spec


def choose_base(header: Header | None, base: str | None, file: Path) -> str:
    """The base named, or the one recorded with the weights. Raises UserError."""
    if base is not None:
        return base
    if header is None:
        raise UserError(f"{file} does not say what base it was trained on; name it with --base")
    return header.base


def check_base(header: Header | None, bundle: Bundle, file: Path) -> None:
    """Raise UserError when the weights were trained on another kind of base."""
    if header is None:
        return
    wanted = (header.base_family, header.prediction_type)
    found = (bundle.family, bundle.prediction_type)
    if wanted != found:
        raise UserError(
            f"{file} was trained on a {' '.join(wanted)} base ({header.base}), but "
            f"{bundle.name} is {' '.join(found)}; give a base of that kind"
        )
    if current_name(header.base) != bundle.name:
        log.info("%s was trained on %s and is used with %s", file, header.base, bundle.name)

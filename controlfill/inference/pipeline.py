"""The pipeline: a base and its ControlNet, loaded once and used by every way in."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
    device: str = "auto",
    mixed_precision: str = "no",
    engine: str = "torch",
) -> Pipeline:
    """Load a base and a ControlNet; without either, the embedded pair.

    `control` is a checkpoint, final_model, diffusers folder, .safetensors file, or `embedded`;
    `base` is taken from its header when not given; one with a 9-channel inpaint UNet also works
    without `control`. `conditioning` is needed only for foreign
    weights, which don't say what they were trained with. `engine` is torch, or openvino for CPUs,
    which reckons in `mixed_precision` inside. Raises UserError.
    """
    if control is None and (base is None or base in embedded.CONTROLS):
        control = base or embedded.EMBEDDED
    if control is None:
        bundle, network, spec = load_alone(str(base)), None, HOLE_SPEC
    else:
        bundle, network, spec = load_pair(base, find_controlnet(control), conditioning)
    denoiser = None
    if engine == "openvino":
        if device not in ("auto", "cpu"):
            raise UserError(f"--engine openvino computes on the CPU, not on --device {device}")
        place, dtype = torch.device("cpu"), torch.float32
        denoiser = OpenVinoDenoiser(bundle.unet, network, mixed_precision)
    else:
        place, dtype = pick_device(device), DTYPES[mixed_precision]
    place_networks(bundle, network, place, dtype)
    bundle.text.cache = Recent(bundle.text)
    return Pipeline(bundle=bundle, network=network, spec=spec, control=control, denoiser=denoiser)


def load_for(options: Any) -> Pipeline:
    """The pair that the options of a command name, where they say. Raises UserError."""
    return load(
        options.base,
        options.control,
        conditioning=options.conditioning,
        device=options.device,
        mixed_precision=options.mixed_precision,
        engine=options.engine,
    )


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
    base: str | None, file: Path, conditioning: str | None
) -> tuple[Bundle, ControlNetModel, Spec]:
    """The ControlNet in `file`, its base and its conditioning. Raises UserError."""
    header = read_control_header(file)
    spec = choose_spec(header, conditioning, file)
    bundle = load_bundle(choose_base(header, base, file), inpainting=True)
    check_base(header, bundle, file)
    network = load_controlnet(file, bundle, spec.channels, at_latent_size=spec.at_latent_size)
    return bundle, network, spec


def load_alone(base: str) -> Bundle:
    """A base that needs no ControlNet, since its UNet sees masks itself. Raises UserError."""
    bundle = load_bundle(base, inpainting=True)
    if not bundle.sees_masks:
        raise UserError(
            f"--base {base} needs a --control that was trained on it; only inpaint UNets, which "
            "take 9 channels, fill holes alone"
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

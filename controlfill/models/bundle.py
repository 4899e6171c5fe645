"""The bundle: everything frozen of a base, and all that differs between bases."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.models import embedded
from controlfill.models.configs import INPAINT_CHANNELS, PAIR_CHANNELS
from controlfill.models.glid import count_channels, load_unet
from controlfill.models.headers import own_config
from controlfill.models.single_file import LEAST_WORDS, load_checkpoint
from controlfill.models.text import Text
from controlfill.models.weights import open_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

log = logging.getLogger(__name__)
T = TypeVar("T")

# Ids that left the hub, and where the same weights live now.
SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
USUAL_GUIDANCE = 7.5
GUIDANCE = {"embedded": embedded.GUIDANCE, "sdxl": 5.0}
# Noisy latents and the known latents, zero in open cells; no mask (glid-3-xl-stable).
GLID_CHANNELS = PAIR_CHANNELS
FAMILIES = {768: "sd15", 1024: "sd2", 2048: "sdxl", embedded.TEXT_WIDTH: "embedded"}
# The kind of extra embedding by which diffusers knows SDXL's networks.
FRAMING = "text_time"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A frozen base. `name` is how the user called it, `scheduler_config` its noise schedule."""

    name: str
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text: Text
    scheduler_config: dict[str, Any]

    @property
    def factor(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """Pictures must have sides that are multiples of this."""
        return self.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    @property
    def native_size(self) -> int:
        """Side of the squares that the base was trained on, in pixels."""
        cells = self.unet.config["sample_size"]
        return self.factor * (cells if isinstance(cells, int) else max(cells))

    def check_size(self, size: int) -> None:
        """Raise UserError unless the base can take squares of `size` pixels."""
        multiple = self.size_multiple
        if size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise UserError(
                f"--image_size is {size}, but {self.name} needs a multiple of {multiple}; "
                f"{near} would do"
            )

    @property
    def sees_masks(self) -> bool:
        """Whether the UNet itself sees what is known and what is not: an inpaint UNet."""
        return self.is_glid or self.unet.config["in_channels"] == INPAINT_CHANNELS

    @property
    def is_glid(self) -> bool:
        """Whether it sees the known latents alone, without a mask, as glid-3-xl-stable's does."""
        return self.unet.config["in_channels"] == GLID_CHANNELS

    @property
    def family(self) -> str:
        """sd15, sd2, sdxl or embedded; bases of another text width are named by it."""
        width = self.unet.config["cross_attention_dim"]
        return FAMILIES.get(width, f"{'sdxl' if self.asks_framing else 'sd'}-{width}")

    @property
    def asks_framing(self) -> bool:
        """Whether the networks want pooled words and the picture's size and cut (SDXL)."""
        return self.unet.config["addition_embed_type"] == FRAMING

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or sample."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def guidance_scale(self) -> float:
        """The guidance scale this base is usually run with."""
        return GUIDANCE.get(self.family.partition("-")[0], USUAL_GUIDANCE)

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def encode_moments(self, image: Tensor) -> Tensor:
        """Mean and deviation (B, 2, C, h, w) of the posterior of (B, 3, H, W) in [-1, 1]."""
        with self._own_precision():
            encoded: Any = self.vae.encode(image.to(self.vae.dtype))
        return torch.stack([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)

    def draw_latents(self, moments: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, h, w) drawn from the posteriors `moments` by `rng`, else their modes."""
        latents, deviation = moments.unbind(dim=1)
        if rng is not None:
            noise = torch.randn(latents.shape, generator=rng).to(latents)
            latents = latents + deviation * noise
        return (latents - self._shift) * self.vae.config["scaling_factor"]

    def encode_image(self, image: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Latents of (B, 3, H, W) in [-1, 1]; drawn from the posterior by `rng`, else its mode."""
        return self.draw_latents(self.encode_moments(image), rng)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The picture (B, 3, H, W) in [0, 1] of `latents`."""
        return self.decode_freely(latents).clamp(0, 1)

    def decode_freely(self, latents: Tensor) -> Tensor:
        """The picture (B, 3, H, W), differentiable, with what stands out of [0, 1]."""
        latents = latents / self.vae.config["scaling_factor"] + self._shift
        vae: Any = self.vae
        with self._own_precision():
            image = vae.decode(latents.to(vae.dtype)).sample
        return image.float() / 2 + 0.5

    def _own_precision(self) -> AbstractContextManager[Any]:
        """SDXL's autoencoder overflows in half precision, also where training asks for that."""
        return (
            torch.autocast(self.vae.device.type, enabled=False)
            if self.asks_framing
            else nullcontext()
        )

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the encoders' weights, by which caches know what they were made with."""
        texts = [hash_weights(encoder) for encoder in self.text.encoders]
        return {"vae": hash_weights(self.vae), "text_encoder": "+".join(texts)}

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Bundle:
        """Move the networks; returns the bundle itself."""
        for network in (self.unet, *self.text.encoders):
            # The library's own `to` warns of parts to be kept in float32, although it has none.
            torch.nn.Module.to(network, device=device, dtype=dtype)
        # SDXL's autoencoder overflows in half precision, and says so in its config.
        upcast = dtype == torch.float16 and self.vae.config["force_upcast"] and self.asks_framing
        torch.nn.Module.to(self.vae, device=device, dtype=torch.float32 if upcast else dtype)
        return self


def hash_weights(module: torch.nn.Module) -> str:
    """A fingerprint of a network's weights: 16 hex digits, the same in every number format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def current_name(name: str) -> str:
    """`name`, or its successor where the id has left the hub (said once per call in the log)."""
    successor = SUCCESSORS.get(name)
    if successor is None:
        return name
    log.warning("%s has left the hub; using %s, the same weights", name, successor)
    return successor


def load_bundle(name: str, inpainting: bool = False, unet: str | Path | None = None) -> Bundle:
    """Load a base by `embedded`, a diffusers folder, a file, or a hub id; all frozen, float32.

    A file is a whole checkpoint as A1111 and ComfyUI read it. Raises UserError when the base is not
    there or no SD 1.5, SD 2 or SDXL; `inpainting` lets it have an inpaint UNet. `unet` is a file or
    folder whose UNet takes the place of the base's own.
    """
    name = current_name(name)
    if Path(name).is_file():
        parts = _open_file(name, inpainting, unet)
    else:
        parts = _open_folder(name, inpainting, unet)
    bundle = Bundle(name=name, **parts)
    for network in (bundle.vae, bundle.unet, *bundle.text.encoders):
        network.eval().requires_grad_(False)
    return bundle.to(torch.device("cpu"))


def _open_folder(name: str, inpainting: bool, unet: str | Path | None) -> dict[str, Any]:
    """What a bundle is made of, from a diffusers folder or the hub."""
    from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

    where = find_base(name)
    config = _config(UNet2DConditionModel, where, "unet")
    if unet is None:
        check_unet(name, config, inpainting)
        check_kind(name, config, lambda: _config(DiffusionPipeline, where).get("_class_name"))
    return {
        "vae": _load_part(AutoencoderKL, where, "vae"),
        "unet": _load_part(UNet2DConditionModel, where, "unet")
        if unet is None
        else _other_unet(unet, config, name, inpainting),
        "text": _load_text(where, two=config.get("addition_embed_type") == FRAMING),
        "scheduler_config": _config(DDPMScheduler, where, "scheduler"),
    }


def _open_file(name: str, inpainting: bool, unet: str | Path | None) -> dict[str, Any]:
    """What a bundle is made of, from a whole checkpoint in one file."""
    found = load_checkpoint(Path(name))
    config = dict(found["unet"].config)
    if unet is None:
        check_unet(name, config, inpainting)
        check_kind(name, config, lambda: found["pipeline"])
    two = "text_encoder_2" in found
    return {
        "vae": found["vae"],
        "unet": found["unet"] if unet is None else _other_unet(unet, config, name, inpainting),
        "text": Text(
            found["tokenizer"],
            found["text_encoder"],
            second=(found["tokenizer_2"], found["text_encoder_2"]) if two else None,
            empty_is_zero=two and found["empty_is_zero"],
        ),
        "scheduler_config": found["scheduler"],
    }


def _other_unet(unet: str | Path, config: dict[str, Any], name: str, inpainting: bool) -> Any:
    """The UNet in `unet`, of the kind of the base's own, which has `config`."""
    path = Path(unet)
    found = config | {"in_channels": count_channels(path)}
    check_unet(str(unet), found, inpainting)
    # One that says nothing is what the user takes it for.
    check_kind(str(unet), found, lambda: told_pipeline(path) or "StableDiffusionPipeline")
    return load_unet(path, config, name)


def told_pipeline(path: Path) -> str | None:
    """The class of the pipeline that the UNet in `path` says it belongs to; None where it doesn't.

    A folder says so in its model_index.json, a safetensors file in its header.
    """
    part = path if path.is_dir() else path.parent
    index = (part.parent if part.name == "unet" else path) / "model_index.json"
    if index.is_file():
        return read_json(index).get("_class_name")
    if path.suffix not in (".safetensors", ".sft"):
        return None
    with open_weights(path) as weights:
        return (own_config(weights, "pipeline") or {}).get("_class_name")


def _load_text(where: str, two: bool) -> Text:
    """The tokenizer and text encoder of a base, or its `two` of each."""
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def pair(cls: Any, tail: str) -> tuple[CLIPTokenizer, Any]:
        folder = f"tokenizer{tail}"
        tokenizer = _try(lambda: CLIPTokenizer.from_pretrained(where, subfolder=folder), where)
        if len(tokenizer) < LEAST_WORDS:
            # Where there are no files, the library makes one that knows no words.
            raise UserError(f"the base {where} has no {folder}; fetch it whole")
        return tokenizer, _load_part(cls, where, f"text_encoder{tail}")

    if not two:
        return Text(*pair(CLIPTextModel, ""))
    index = _config(DiffusionPipeline, where)
    return Text(
        *pair(CLIPTextModel, ""),
        second=pair(CLIPTextModelWithProjection, "_2"),
        empty_is_zero=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def find_base(name: str) -> str:
    """The folder or hub id to load for `name`. Raises UserError when it can be neither."""
    if name in embedded.FOLDERS:
        return str(embedded.FOLDERS[name])
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise UserError(f"{name} is no diffusers folder: model_index.json is missing")
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"the base {name} is no folder; give a diffusers folder, a checkpoint file, a hub id, "
            "or `embedded`"
        )
    return name


def _load_part(cls: Any, where: str, subfolder: str) -> Any:
    """A network from its subfolder; half-precision-only folders are read by their variant."""
    variant = {"variant": "fp16"} if is_half(Path(where) / subfolder) else {}
    return _try(lambda: cls.from_pretrained(where, subfolder=subfolder, **variant), where)


def is_half(folder: Path) -> bool:
    """Whether the weights that a folder holds as safetensors, else pickled, are in fp16 alone."""
    for suffix in (".safetensors", ".bin"):
        # Other variants, such as `.non_ema`, are read only when asked for.
        stems = [file.stem for file in folder.glob(f"*{suffix}")]
        whole = any("." not in stem for stem in stems)
        if whole or any(re.search(r"\.fp16($|-)", stem) for stem in stems):
            return not whole
    return False


def _config(cls: Any, where: str, subfolder: str | None = None) -> dict[str, Any]:
    """The config of a part, or of the whole base, without its weights."""
    return _try(lambda: dict(cls.load_config(where, subfolder=subfolder)), where)


def check_unet(name: str, config: dict[str, Any], inpainting: bool = False) -> None:
    """Raise UserError for UNets of other families, before gigabytes of them are fetched."""
    if config.get("addition_embed_type") == FRAMING and config.get("cross_attention_dim") == 1280:
        raise UserError(f"{name} is SDXL's refiner, which only retouches; give SDXL's base")
    channels = config.get("in_channels", 4)
    plain = config.get("out_channels", 4)
    if channels not in (plain, GLID_CHANNELS, INPAINT_CHANNELS):
        raise UserError(f"{name}: its UNet takes {channels} channels; 4, 8 or 9 are known here")
    if channels != plain and not inpainting:
        raise UserError(
            f"{name}: its UNet takes {channels} channels; a ControlNet is trained on a plain "
            "text-to-image base, whose UNet takes 4"
        )


def check_kind(name: str, config: dict[str, Any], pipeline: Callable[[], Any]) -> None:
    """Raise UserError for UNets of 8 channels that see something else than known latents there.

    `pipeline` finds the class of the base's pipeline, which tells.
    """
    if config.get("in_channels") != GLID_CHANNELS:
        return
    kind = str(pipeline())
    if not re.fullmatch(r"StableDiffusion(XL)?(Inpaint)?Pipeline", kind):
        raise UserError(
            f"{name} is a {kind}, whose UNet of {GLID_CHANNELS} channels fills no holes; of those "
            "that take as many only glid-3-xl-stable's does, which `controlfill glid join` puts "
            "into a base"
        )


def _try(load: Callable[[], T], where: str) -> T:
    """`load()`, with whatever the loaders raise turned into one line."""
    try:
        return load()
    except Exception as error:  # the loaders raise anything from OSError to KeyError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the base {where} could not be loaded: {reason}") from error

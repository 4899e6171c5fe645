"""What is merged: diffusers folders and single files, read and written tensor by tensor.

Every tensor of a source has one name: `unet/conv_in.weight` in a diffusers folder, its own in a
file or in the folder of a single network.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import check_empty, read_json, write_folder, write_json
from controlfill.models import embedded
from controlfill.models.configs import (
    INPAINT_CHANNELS,
    SPEC_KEY,
    SPECS,
)
from controlfill.models.controlnet import own_version
from controlfill.models.glid import describe_pipeline, folder_prediction, with_channels
from controlfill.models.headers import CONFIGS_KEY, file_prediction
from controlfill.models.layout import too_large
from controlfill.models.recognise import CONTROL, UNET, other_method, recognise
from controlfill.models.weights import SHARDS, Shapes, Weights, find_weights, open_weights
from controlfill.models.weights import write_weights as write_file

Report = Callable[[str, int, int], None]
RECIPE_KEY = "controlfill_merge"
# Averages of training, which a merge would leave behind as they were in A.
AVERAGES = "model_ema."
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HASH_BYTES = 2**24
# What a folder holds beside weights: configs, vocabularies, sentencepiece models.
SMALL = (".json", ".txt", ".model", ".jinja")


class Source:
    """An open checkpoint. `files` are its weights by subfolder; a lone one is called ""."""

    def __init__(self, path: Path, files: dict[str, Weights]) -> None:
        self.path, self.files = path, files
        known = {
            f"{where}/{key}" if where else key: (where, key)
            for where, weights in files.items()
            for key in weights.names
            if not key.startswith(AVERAGES)
        }
        self.names = tuple(known)
        # Newer versions of transformers leave `text_model.` out; both find each other so.
        self._known = {plain(name): place for name, place in known.items()}

    @property
    def is_pipeline(self) -> bool:
        """Whether this is a diffusers folder of several networks."""
        return "" not in self.files

    def __contains__(self, name: str) -> bool:
        """Whether a tensor has this name."""
        return plain(name) in self._known

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        where, key = self._known[plain(name)]
        return self.files[where].shape(key)

    def dtype(self, name: str) -> torch.dtype:
        """The number format of a tensor."""
        where, key = self._known[plain(name)]
        return self.files[where].dtype(key)

    def read(self, name: str) -> Tensor:
        """One tensor. Raises UserError when it holds NaN or infinite numbers."""
        where, key = self._known[plain(name)]
        tensor = self.files[where][key]
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(
                f"{self.path}: {name} holds NaN or infinite numbers; what is merged with them "
                "would paint black pictures"
            )
        return tensor

    def part(self, name: str) -> str:
        """`unet`, `vae`, `text_encoder` (also the second), or `other`."""
        where, key = self._known[plain(name)]
        if self.is_pipeline:
            return PARTS.get(where, "other")
        found = next((part for start, part in ORIGINAL_PARTS.items() if key.startswith(start)), "")
        return found or self._lone_part()

    def _lone_part(self) -> str:
        return next(
            (part for mark, part in LONE_MARKS.items() if mark in self),
            "other",
        )

    @property
    def is_original(self) -> bool:
        """Whether its tensors have the names of Stable Diffusion's first release."""
        return any(name.startswith((UNET, "time_embed.")) for name in self.names)

    @property
    def layout(self) -> str:
        """How its tensors are called, in words."""
        if self.is_pipeline:
            return "a diffusers folder"
        if any(name.startswith(UNET) for name in self.names):
            return "a file in the original layout"
        if self._lone_part() == "unet":
            names = "diffusers'" if "conv_in.weight" in self else "the original"
            return f"a UNet with {names} names"
        if method := next(filter(None, map(other_method, self.names)), None):
            return f"{method}, which is not merged"
        if recognise(*self.files.values()).kind == "lora":
            return "a LoRA, which goes into a model with --method lora --loras"
        return LONE_WORDS.get(self._lone_part(), "a file of unknown kind")

    @property
    def text_width(self) -> int | None:
        """The width of the prompt's vectors that the UNet takes, which tells families apart."""
        tail = "attn2.to_k.weight"
        names = (n for n in self.names if n.endswith(tail) and self.part(n) == "unet")
        name = next(names, None)
        return None if name is None else self.shape(name)[1]

    @property
    def prediction(self) -> str | None:
        """What the UNet predicts; None where that is not told."""
        if self.is_pipeline:
            return folder_prediction(self.path)
        (weights,) = self.files.values()
        return file_prediction(weights)

    def about(self, parts: Sequence[str], report: Report) -> dict[str, Any]:
        """Name and hashes of what is used, and the recipe by which that was merged before."""
        used = [where for where in self.files if not where or PARTS.get(where) in parts]
        entry: dict[str, Any] = {"name": self.path.name, "sha256": {}}
        for number, where in enumerate(used):
            file = self.path / where if self.path.is_dir() else self.path
            entry["sha256"][where or self.path.name] = hash_files(weights_files(file))
            report(f"hashing {self.path.name}", number + 1, len(used))
            if earlier := self.files[where].metadata.get(RECIPE_KEY):
                entry["recipe"] = json.loads(earlier)
        return entry


def plain(name: str) -> str:
    """The name of a tensor as all versions of transformers have it."""
    return re.sub(r"^(text_encoder(?:_2)?/|)text_model\.", r"\1", name)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, told from their least and greatest, without a copy."""
    if not tensor.numel():
        return True
    # The 8-bit formats know no minimum.
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(torch.stack(numbers.aminmax())).all())


@contextmanager
def open_sources(paths: Sequence[str]) -> Iterator[list[Source]]:
    """The checkpoints at `paths`, open. Raises UserError for what can't be read."""
    with ExitStack() as stack:
        yield [open_source(path, stack) for path in paths]


def open_source(where: str, stack: ExitStack) -> Source:
    """A diffusers folder, the folder of one network, or a file; `embedded` names the own base."""
    path = Path(embedded.FOLDERS.get(where, where))
    if not path.exists():
        raise UserError(
            f"{where} does not exist; give a diffusers folder, the folder of a network, or a "
            ".safetensors or .ckpt file"
        )
    index = path / "model_index.json"
    if not index.is_file():
        return Source(path, {"": stack.enter_context(open_weights(path))})
    parts = [key for key in subfolders(path) if holds_weights(path / key)]
    if not parts:
        raise UserError(f"{path} is a diffusers folder without any weights")
    files = {part: stack.enter_context(open_weights(path / part)) for part in parts}
    return Source(path, files)


def subfolders(folder: Path) -> list[str]:
    """What a diffusers folder's index names; never a path that leads out of the folder."""
    keys = read_json(folder / "model_index.json")
    return [key for key in keys if Path(key).name == key and key not in ("", ".", "..")]


def holds_weights(folder: Path) -> bool:
    """Whether a subfolder is that of a network, and not of a tokenizer or scheduler."""
    return any(f.suffix in (".safetensors", ".bin") for f in folder.glob("*"))


def weights_files(path: Path) -> list[Path]:
    """The files that `open_weights` would read at `path`, shards and all."""
    file = find_weights(path) if path.is_dir() else path
    if not file.name.endswith((SHARDS, ".index.fp16.json")):
        return [file]
    return [file.parent / name for name in sorted(set(read_json(file)["weight_map"].values()))]


def hash_files(files: Sequence[Path]) -> str:
    """The SHA-256 of files one after the other; of one file it is what model sites show."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()


def make_recipe(method: str, **about: Any) -> str:
    """The recipe of a result, for its header."""
    return json.dumps({"version": own_version(), "method": method, **about})


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in another number format. Raises UserError where that can't hold it."""
    result = tensor.to(dtype)
    if result.is_floating_point() and not is_finite(result):
        raise too_large(tensor, dtype, name)
    return result


def wanted_dtype(own: torch.dtype, wanted: str) -> torch.dtype:
    """The number format to write a tensor of format `own` in; whole numbers keep theirs."""
    return DTYPES[wanted] if wanted != "keep" and own.is_floating_point else own


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written where, and what should be known about it."""

    path: Path
    what: str
    notes: tuple[str, ...] = ()


def quiet(what: str, done: int, total: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A result that is written like the source `like`: the shapes of all its tensors, by the
    source's names, and what makes each."""

    like: Source
    shapes: Shapes
    make: Callable[[str], Tensor]
    recipe: str
    # What the UNet predicts, by any of the models.
    prediction: str | None = None

    @property
    def is_widened(self) -> bool:
        """Whether its UNet takes the mask and the masked picture, which the source's did not."""
        return any(spec[1] != self.like.shape(name) for name, spec in self.shapes.items())


def check_out(like: Source, out: Path) -> None:
    """Raise UserError unless `out` is free, and a name for what would be written there."""
    if like.path.is_dir():
        if out.suffix in (".safetensors", ".ckpt"):
            raise UserError(f"{like.path} is a folder, so the result is one; {out} names a file")
        check_empty(out, "result")
        return
    check_out_file(out)


def check_out_file(out: Path) -> None:
    """Raise UserError unless `out` names a new .safetensors file."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the result is a file whose name ends in .safetensors")
    if out.exists():
        raise UserError(f"{out} exists already; name a new file for the result")


def write_draft(draft: Draft, out: Path, report: Report) -> None:
    """Write a result, whole or not at all: a folder like the source's, or a file."""
    done = 0

    def tensors(where: str) -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for name in names_in(draft, where):
            yield name.removeprefix(f"{where}/"), draft.make(name)
            done += 1
            report("tensors", done, len(draft.shapes))

    def write(where: str, file: Path) -> None:
        shapes = {n.removeprefix(f"{where}/"): draft.shapes[n] for n in names_in(draft, where)}
        about = kept_metadata(like.files[where].metadata, draft.is_widened)
        if draft.prediction and not like.is_pipeline and not like.prediction:
            about |= {SPEC_KEY: SPECS.get(draft.prediction, draft.prediction)}
        write_file(file, shapes, tensors(where), about | {RECIPE_KEY: draft.recipe})

    like = draft.like
    if not like.path.is_dir():
        write("", out)
        return
    with write_folder(out) as folder:
        for where in like.files:
            first = weights_files(like.path / where)[0].name
            own = first.startswith("diffusion_pytorch_model")
            write(where, folder / where / f"{'diffusion_pytorch_' if own else ''}model.safetensors")
        copy_small(draft, folder)


def names_in(draft: Draft, where: str) -> list[str]:
    """The names of all tensors in one subfolder."""
    return [n for n in draft.shapes if not where or n.startswith(f"{where}/")]


def copy_small(draft: Draft, folder: Path) -> None:
    """Copy configs and vocabularies; a UNet that got more channels is described as it is now."""
    source = draft.like
    keys = subfolders(source.path) if source.is_pipeline else []
    for path in (source.path, *(source.path / key for key in keys)):
        for file in sorted(path.glob("*")):
            if file.suffix in SMALL and ".index." not in file.name:
                target = folder / file.relative_to(source.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    if draft.is_widened:
        describe_inpaint(folder, "unet" if source.is_pipeline else "")


def kept_metadata(metadata: dict[str, str], is_widened: bool) -> dict[str, str]:
    """What A's header says that is true of the result too."""
    about = {key: metadata[key] for key in KEPT_KEYS if key in metadata}
    return with_channels(about, INPAINT_CHANNELS) if is_widened else about


def describe_inpaint(folder: Path, unet: str) -> None:
    """Let the configs of a folder say that its UNet takes the mask and the masked picture."""
    config = folder / unet / "config.json"
    if config.is_file():
        write_json(config, read_json(config) | {"in_channels": INPAINT_CHANNELS})
    describe_pipeline(folder, INPAINT_CHANNELS)


PARTS = {
    "unet": "unet", "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder",
}  # fmt: skip
ORIGINAL_PARTS = {
    UNET: "unet", "first_stage_model.": "vae", "cond_stage_model.": "text_encoder",
    "conditioner.": "text_encoder",
}  # fmt: skip
# Tensors by which a file of a single network is known. A ControlNet has those of a UNet too.
LONE_MARKS = {
    "controlnet_cond_embedding.conv_in.weight": "controlnet",
    "zero_convs.0.0.weight": "controlnet", f"{CONTROL}zero_convs.0.0.weight": "controlnet",
    "time_embedding.linear_1.weight": "unet", "time_embed.0.weight": "unet",
    "decoder.conv_in.weight": "vae", "embeddings.token_embedding.weight": "text_encoder",
}  # fmt: skip
LONE_WORDS = {
    "vae": "a VAE", "text_encoder": "a text encoder", "controlnet": "a ControlNet",
}  # fmt: skip
KEPT_KEYS = (CONFIGS_KEY, SPEC_KEY, "modelspec.resolution")

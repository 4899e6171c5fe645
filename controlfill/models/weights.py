"""Tensors of files, read and written one at a time: safetensors, shards, and legacy pickles.

No file is ever whole in memory, and no pickle runs code.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json, whole_file

# Read pages of a mapped file count as memory until it is unmapped; so it is, after as many bytes.
MAPPED_BYTES = 128 * 2**20
SHARDS = ".safetensors.index.json"
# What names in a folder end in: safetensors before pickles, of each whole precision first.
TAILS = (
    ".safetensors", SHARDS, ".fp16.safetensors",
    ".safetensors.index.fp16.json", ".fp16.safetensors.index.json", ".bin", ".fp16.bin",
)  # fmt: skip
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Weights(ABC):
    """Tensors by name, each read when asked for. `metadata` is a safetensors header's."""

    names: tuple[str, ...]
    metadata: dict[str, str]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, told without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The number format of a tensor, told without reading it."""

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read now; the caller owns it. Raises KeyError."""

    def __contains__(self, name: str) -> bool:
        """Whether a tensor has this name."""
        return name in self._set

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.names)

    def close(self) -> None:  # noqa: B027  (nothing to close is the usual case)
        """Let go of the file."""

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


class _SafeWeights(Weights):
    """A safetensors file, read by seeking: mapped pages would count as memory."""

    def __init__(self, file: Path) -> None:
        check_safetensors(file)
        self._path = file
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            about: dict[str, Any] = json.loads(data.read(length))
        self._start = 8 + length
        self.metadata = about.pop("__metadata__", {})
        self._about = about
        self.names = tuple(about)
        for name in self.names:
            if about[name]["dtype"] not in DTYPES:
                raise UserError(
                    f"{file}: {name} has the number format {about[name]['dtype']}; known here "
                    f"are: {', '.join(DTYPES)}"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._about[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._about[name]["dtype"]]

    def __getitem__(self, name: str) -> Tensor:
        begin, end = self._about[name]["data_offsets"]
        if begin == end:
            return torch.empty(self.shape(name), dtype=self.dtype(name))
        data = bytearray(end - begin)
        with self._path.open("rb") as file:
            file.seek(self._start + begin)
            if file.readinto(data) != len(data):
                raise UserError(f"{self._path} became shorter while it was read")
        return torch.frombuffer(data, dtype=self.dtype(name)).reshape(self.shape(name))


class _PickledWeights(Weights):
    """A file of torch.save, mapped; never one that would run code."""

    def __init__(self, file: Path) -> None:
        self._path = file
        self.metadata = {}
        self._tensors = self._map()
        self._about = {name: (t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
        self._read = 0
        self.names = tuple(self._about)

    def _map(self) -> dict[str, Tensor]:
        state = unpickle(self._path)
        state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
        found = {str(k): v.detach() for k, v in state.items() if isinstance(v, Tensor)}
        if not found:
            raise UserError(f"{self._path} is no state dict of plain tensors: it holds none")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._about[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._about[name][0]

    def __getitem__(self, name: str) -> Tensor:
        if self._read > MAPPED_BYTES:
            self._tensors.clear()
            self._tensors, self._read = self._map(), 0
        tensor = self._tensors[name].clone(memory_format=torch.contiguous_format)
        self._read += tensor.nbytes
        return tensor

    def close(self) -> None:
        self._tensors.clear()


class _Shards(Weights):
    """Several files that an index JSON makes one of."""

    def __init__(self, index: Path) -> None:
        table = read_json(index)
        where = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(where, dict):
            raise UserError(f"{index} is no index of shards: it has no weight_map")
        odd = next((name for name, file in where.items() if not isinstance(file, str)), None)
        if odd is not None:
            raise UserError(f"{index} is no index of shards: {odd} lies in {where[odd]!r}, no file")
        for name in sorted(set(where.values())):
            if Path(name).name != name or not (index.parent / name).is_file():
                raise UserError(f"{index.parent / name} is missing, a shard that {index} names")
        files = {n: _SafeWeights(index.parent / n) for n in sorted(set(where.values()))}
        self._files = {name: files[file] for name, file in where.items()}
        for name, file in self._files.items():
            if name not in file:
                raise UserError(f"{index.parent / where[name]} lacks {name}, which {index} names")
        self.names = tuple(where)
        self.metadata = {k: v for file in files.values() for k, v in file.metadata.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].dtype(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][name]


def open_weights(path: Path) -> Weights:
    """The tensors of a file, of shards by their index, or of a folder that holds one of these.

    Raises UserError for what is missing, broken, of unknown kind, or would run code.
    """
    path = Path(path)
    if path.is_dir():
        return open_weights(find_weights(path))
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a weights file or a folder that holds one")
    if ".safetensors.index." in path.name:
        return _Shards(path)
    if path.suffix in (".safetensors", ".sft"):
        return _SafeWeights(path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return _PickledWeights(path)
    raise UserError(
        f"{path} is no weights file; .safetensors, .safetensors.index.json, .ckpt, .pt, .pth and "
        ".bin are read"
    )


def find_weights(folder: Path) -> Path:
    """The weights file in a folder of one network. Raises UserError when there is none or many."""
    for stem in (
        "diffusion_pytorch_model", "model", "pytorch_lora_weights", "pytorch_model",
        "adapter_model",
    ):  # fmt: skip
        if file := stem_file(folder, stem):
            return file
    found = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".sft"))
    if len(found) == 1:
        return found[0]
    seen = ", ".join(p.name for p in found[:3]) if found else "no weights"
    raise UserError(f"{folder} should hold the weights of one network; it holds {seen}")


def stem_file(folder: Path, stem: str) -> Path | None:
    """The first file in a folder that is called `stem` with one of TAILS; None without any."""
    files = (folder / f"{stem}{tail}" for tail in TAILS)
    return next((file for file in files if file.is_file()), None)


def check_safetensors(file: Path) -> None:
    """Raise UserError unless `file` is a whole, sound safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is a broken safetensors file: {error}") from error


class _Inert:
    """Stands for what training tools leave in their checkpoints beside tensors; does nothing."""

    def __init__(self, *state: object) -> None:
        """Take whatever the real thing would have been made of."""

    def __setstate__(self, state: object) -> None:
        """Forget it."""


# What the Stable Diffusion releases have beside their tensors; read as something inert.
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def unpickle(file: Path) -> dict[str, Any]:
    """What torch.save wrote, mapped where the format allows; code in it is refused, not run."""
    from torch.serialization import safe_globals

    try:
        with safe_globals([(_Inert, name) for name in _HARMLESS]):
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                # The format of torch before 1.6 can't be mapped.
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "unreadable"
        raise UserError(f"{file} is no state dict of plain tensors: {reason}") from error
    return state if isinstance(state, dict) else {}


def write_weights(
    file: Path,
    shapes: Shapes,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file of exactly `shapes`, from tensors that come in any order.

    Its header says `format` pt, which the libraries ask for, and `metadata`. Raises UserError when
    the disk is full, ValueError when `tensors` are not those promised; `file` is then untouched.
    """
    # Wider numbers first, so that each lies at a multiple of its width.
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    about: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end, missing = 0, set(order)
    for name in order:
        dtype, shape = shapes[name]
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        about[name] = {
            "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end],
        }  # fmt: skip
    header = json.dumps(about, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with whole_file(file) as temporary, temporary.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name, tensor in tensors:
            if name not in missing or (tensor.dtype, tuple(tensor.shape)) != shapes[name]:
                raise ValueError(f"{name} is twice, unasked for, or not of the promised shape")
            missing.remove(name)
            out.seek(8 + len(header) + about[name]["data_offsets"][0])
            out.write(_as_bytes(tensor))
            del tensor  # before the next one is made
        if missing:
            raise ValueError(f"tensors promised and not given: {', '.join(sorted(missing)[:3])}")


def _as_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, not copied where it lies in order in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

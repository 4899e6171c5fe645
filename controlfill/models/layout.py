"""Two names for every tensor: the rows of a layout, and weights seen through them.

Nothing is converted before it is asked for, so whatever is written from here streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.models.weights import Weights, write_weights

# What becomes of a diffusers tensor in the original layout: the same; a convolution of 1 x 1; the
# transpose; one third (query, key, value) of the rows of a fused matrix.
How = Literal["same", "conv", "turned", "query", "key", "value"]
THIRDS = ("query", "key", "value")


@dataclass(frozen=True)
class Row:
    """What one tensor is called in diffusers and in the original layout, and how they differ."""

    diffusers: str
    original: str
    how: How = "same"


class Renamed(Weights):
    """Some tensors of `source` under other names, given as new name: old name."""

    def __init__(self, source: Weights, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names
        self.names, self.metadata = tuple(names), source.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._names[name])

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._names[name]]


def without_prefix(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names start with `prefix`, without it."""
    return Renamed(weights, {n[len(prefix) :]: n for n in weights.names if n.startswith(prefix)})


class AsDiffusers(Weights):
    """A network in the original layout, as diffusers names and shapes it."""

    def __init__(self, source: Weights, rows: Iterable[Row]) -> None:
        self._source = source
        self._rows = {row.diffusers: row for row in rows}
        self.names, self.metadata = tuple(self._rows), source.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        row = self._rows[name]
        shape = self._source.shape(row.original)
        if row.how == "conv":
            return shape[:2]
        if row.how == "turned":
            return shape[::-1]
        return (shape[0] // 3, *shape[1:]) if row.how in THIRDS else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._rows[name].original)

    def __getitem__(self, name: str) -> Tensor:
        how, tensor = self._rows[name].how, self._source[self._rows[name].original]
        if how == "conv":
            return tensor.reshape(tensor.shape[:2])
        if how == "turned":
            return tensor.T.contiguous()
        return tensor.chunk(3)[THIRDS.index(how)].clone() if how in THIRDS else tensor


class AsOriginal(Weights):
    """A network as diffusers names it, in the original layout."""

    def __init__(self, source: Weights, rows: Iterable[Row]) -> None:
        self._source = source
        self._rows: dict[str, list[Row]] = {}
        for row in rows:
            self._rows.setdefault(row.original, []).append(row)
        self.names, self.metadata = tuple(self._rows), source.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        row = self._rows[name][0]
        shape = self._source.shape(row.diffusers)
        if row.how == "conv":
            return (*shape, 1, 1)
        if row.how == "turned":
            return shape[::-1]
        return (3 * shape[0], *shape[1:]) if row.how in THIRDS else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._rows[name][0].diffusers)

    def __getitem__(self, name: str) -> Tensor:
        rows = {row.how: row.diffusers for row in self._rows[name]}
        how = self._rows[name][0].how
        if how in THIRDS:
            return torch.cat([self._source[rows[third]] for third in THIRDS])
        tensor = self._source[rows[how]]
        if how == "conv":
            return tensor.reshape(*tensor.shape, 1, 1)
        return tensor.T.contiguous() if how == "turned" else tensor


class Together(Weights):
    """Several weights as one, each behind a prefix."""

    def __init__(self, parts: Iterable[tuple[str, Weights]]) -> None:
        self._places = {
            f"{prefix}{name}": (weights, name)
            for prefix, weights in parts
            for name in weights.names
        }
        self.names, self.metadata = tuple(self._places), {}

    def shape(self, name: str) -> tuple[int, ...]:
        weights, own = self._places[name]
        return weights.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        weights, own = self._places[name]
        return weights.dtype(own)

    def __getitem__(self, name: str) -> Tensor:
        weights, own = self._places[name]
        return weights[own]


class Cast(Weights):
    """Weights whose floating-point numbers have another format; `None` keeps them as they are."""

    def __init__(self, source: Weights, dtype: torch.dtype | None) -> None:
        self._source, self._dtype = source, dtype
        self.names, self.metadata = source.names, source.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        own = self._source.dtype(name)
        return self._dtype if self._dtype is not None and own.is_floating_point else own

    def __getitem__(self, name: str) -> Tensor:
        """One tensor. Raises UserError when the format can't hold one of its numbers."""
        tensor, dtype = self._source[name], self.dtype(name)
        result = tensor.to(dtype)
        if dtype != tensor.dtype and result.is_floating_point() and result.numel():
            # The least and the greatest tell without a copy whether to look closer.
            ends = torch.stack(result.aminmax())
            if not torch.isfinite(ends).all() and (tensor.isfinite() & ~result.isfinite()).any():
                raise too_large(tensor, dtype, name)
        return result


def too_large(tensor: Tensor, dtype: torch.dtype, name: str) -> UserError:
    """The error of a tensor whose numbers `dtype` can't hold."""
    return UserError(
        f"{name} has numbers of up to {float(tensor.abs().max()):.3g}, too large for "
        f"{dtype}; use --dtype bf16 or fp32".replace("torch.", "")
    )


class InMemory(Weights):
    """Tensors that are in memory already."""

    def __init__(self, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        self._state = state
        self.names, self.metadata = tuple(state), metadata or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]


def save(weights: Weights, file: Path, metadata: dict[str, str], told: Any = None) -> None:
    """Write `weights` to a safetensors file, one tensor at a time; `told()` after each."""
    shapes = {name: (weights.dtype(name), weights.shape(name)) for name in weights.names}

    def read() -> Iterable[tuple[str, Tensor]]:
        for name in weights.names:
            yield name, weights[name]
            if told is not None:
                told()

    write_weights(file, shapes, read(), metadata)


def check_names(weights: Weights, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise UserError unless `weights` are exactly those of `what`, whose `shapes` are given."""
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise UserError(
            f"{what} lacks {len(missing)} of {len(shapes)} tensors, such as {missing[0]}; the file "
            "is cut, or of another architecture"
        )
    for name in weights.names:
        if name not in shapes:
            raise UserError(f"{what} has {name}, which its architecture knows not")
        if weights.shape(name) != shapes[name]:
            raise UserError(
                f"{what}: {name} has the shape {weights.shape(name)}, where its architecture has "
                f"{shapes[name]}"
            )

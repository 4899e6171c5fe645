"""Checkpoints: folders that are whole or not there, and hold all that is needed to go on exactly.

    checkpoint-300/
      config.json, diffusion_pytorch_model.safetensors   the network, a diffusers folder
      optimizer.safetensors   AdamW's moments
      ema.safetensors         averaged weights, if any
      state.json              step, options, sizes of the files above

Learning rate, noise and data order are functions of the step, so no state of theirs is kept.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json, remove_leftovers, write_folder, write_json
from controlfill.models.controlnet import AVERAGE, WEIGHTS, list_checkpoints
from controlfill.options import ControlOptions

log = logging.getLogger(__name__)
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
# Where Lightning's own checkpoints lie in a run's folder, and the newest of them.
CKPTS = "checkpoints"
LAST = "last.ckpt"


class Write(Protocol):
    """Writes `weights` of a network into `folder`, as WEIGHTS or AVERAGE."""

    def __call__(self, folder: Path, weights: dict[str, Tensor], name: str) -> None: ...


def save_checkpoint(
    folder: Path,
    write: Write,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
) -> None:
    """Write a checkpoint to `folder`, whole or not at all; `state` goes into state.json.

    `tensors` are whole, by the name of their file: WEIGHTS, OPTIMIZER, and AVERAGE if there is one.
    """
    with write_folder(folder) as temporary:
        save_file(tensors[OPTIMIZER], temporary / OPTIMIZER)
        for name in (WEIGHTS, AVERAGE):
            if name in tensors:
                write(temporary, tensors[name], name)
        sizes = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        write_json(temporary / STATE, {**state, "files": sizes})


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by names like "12.exp_avg"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give `optimizer` the moments that `flatten_optimizer` gave; its options stay its own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there at its full size."""
    try:
        files = read_json(folder / STATE)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (UserError, OSError, KeyError, TypeError):
        return False


def checkpoints_of(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [p for p in list_checkpoints(run) if is_whole(p)]


def prune(run: Path, limit: int | None) -> None:
    """Remove all but the newest `limit` checkpoints."""
    if limit is not None:
        for old in checkpoints_of(run)[: -max(1, limit)]:
            shutil.rmtree(old, ignore_errors=True)


def find_resume(where: str, output_dir: Path, prefix: str = ControlOptions.RUN) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    `latest` is the newest whole one of the newest run in `output_dir`, whose name begins with
    `prefix`; None where that run has none yet: an older run is another run. Raises UserError for a
    path that holds none.
    """
    if where != "latest":
        path = Path(where)
        if is_whole(path):
            return path
        within = checkpoints_of(path) if path.is_dir() else []
        if not within:
            raise UserError(
                f"--resume_from_checkpoint {where} holds no whole checkpoint; give a checkpoint "
                "folder, a run's folder, or `latest`"
            )
        return within[-1]
    runs = sorted(output_dir.glob(f"{prefix}*"))
    if not runs:
        return None
    remove_leftovers(runs[-1])
    return (checkpoints_of(runs[-1]) or [None])[-1]


def find_ckpt(where: str | None, output_dir: Path, prefix: str = ControlOptions.RUN) -> Path | None:
    """The .ckpt file that `--resume_from_checkpoint` means. Raises UserError."""
    if where is None:
        return None
    if where == "latest":
        runs = sorted(output_dir.glob(f"{prefix}*"))
        file = runs[-1] / CKPTS / LAST if runs else None
        if file is None or not file.is_file():
            log.warning("no checkpoint in %s yet; starting from the beginning", output_dir)
            return None
        return file
    path = Path(where)
    for file in (path, path / CKPTS / LAST):
        if file.is_file() and file.suffix == ".ckpt":
            return file
    raise UserError(
        f"--resume_from_checkpoint {where} holds no .ckpt file; weights of the other engine go in "
        "by --controlnet_model_name_or_path"
    )

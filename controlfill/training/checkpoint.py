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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from controlfill.errors import UserError
from controlfill.files import read_json, remove_leftovers, write_folder, write_json
from controlfill.models.controlnet import AVERAGE, WEIGHTS, list_checkpoints
from controlfill.options import ControlOptions, RunOptions

log = logging.getLogger(__name__)
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
# Where Lightning's own checkpoints lie in a run's folder, and the newest of them.
CKPTS = "checkpoints"
LAST = "last.ckpt"
# Options that decide what an optimizer keeps: the moments of one kind say nothing to another.
OPTIMIZERS = ("use_8bit_adam",)
# How numbers of an optimizer's state are kept; AdamW's own steps are tensors of other types.
NUMBERS = {int: torch.int64, float: torch.float64}
# Options that may differ between a run and its continuation without changing what is learned.
FREE_OPTIONS = {
    "output_dir", "resume_from_checkpoint", "save_steps", "log_steps", "log_images_steps",
    "num_workers", "checkpoints_total_limit", "max_steps", "num_epochs", "report_to",
    "push_to_hub", "hub_model_id", "validation_image", "validation_mask", "validation_prompt",
    "validation_steps", "num_validation_images", "set_grads_to_none",
}  # fmt: skip


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
    """The optimizer's tensors by names like "12.exp_avg".

    Numbers become tensors, and names within names are joined: bitsandbytes has both.
    """
    return _flat(optimizer.state_dict()["state"])


def _flat(values: Mapping[Any, Any], start: str = "") -> dict[str, Tensor]:
    """The tensors and numbers in `values`, however deep, by names that begin with `start`."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            tensors |= _flat(value, f"{start}{name}.")
        elif isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            # A table that all parameters share on a CPU is refused by safetensors.
            shared = str(name).startswith("qmap")
            tensors[f"{start}{name}"] = tensor.clone() if shared else tensor
        else:
            tensors[f"{start}{name}"] = torch.tensor(value, dtype=NUMBERS[type(value)])
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give `optimizer` the moments that `flatten_optimizer` gave; its options stay its own."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, *outer, name = key.split(".")
        values = state.setdefault(int(index), {})
        for word in outer:
            values = values.setdefault(word, {})
        number = tensor.dim() == 0 and tensor.dtype in NUMBERS.values()
        values[name] = tensor.item() if number else tensor
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
    other = (
        "weights of the other engine go in by --controlnet_model_name_or_path"
        if prefix == ControlOptions.RUN
        else "a run of the other engine goes on with --engine accelerate"
    )
    raise UserError(f"--resume_from_checkpoint {where} holds no .ckpt file; {other}")


def check_same(saved: dict[str, Any], options: RunOptions, where: Path) -> None:
    """Refuse other data, base, conditioning or optimizer; say which other options differ."""
    now, fixed = options.as_dict(), (*options.FIXED, *OPTIMIZERS)
    # Options that came later had their usual values; those that must be given tell kinds apart.
    usual = {n: getattr(type(options), n) for n in fixed if hasattr(type(options), n)}
    strange = next((n for n in fixed if n not in saved and n not in usual), None)
    saved = {n: v for n, v in usual.items() if n not in saved} | saved
    changed = [k for k, v in saved.items() if k not in FREE_OPTIONS and now.get(k) != v]
    if strange is not None:
        raise UserError(
            f"{where} was trained by another kind of run, which has no --{strange}; resume a "
            f"{options.WORD} run, or start a new one"
        )
    for name in fixed:
        if name in changed:
            raise UserError(
                f"{where} was trained with --{name} {saved[name]}, not {now[name]}; resume with "
                "the run's own, or start a new run"
            )
    if changed:
        words = ", ".join(f"{k} {saved[k]} -> {now.get(k)}" for k in changed)
        log.warning("resuming with other options than the run had: %s", words)


def say_classes(saved: Mapping[str, Any], now: int) -> None:
    """Warn when other class pictures than in the run so far come to stand beside each picture."""
    before = saved.get("class_pictures", now)
    if before != now:
        log.warning(
            "there were %d class pictures, now there are %d: from here on each picture has others "
            "beside it than if the run had not stopped", before, now,
        )  # fmt: skip


def recount(loops: dict[str, Any], step: int, per_epoch: int, micro: int) -> None:
    """Let Lightning's own counters, `loops`, say that step number `step` (from 1) has just ended.

    They count epochs and forward passes, and other options make other numbers of both out of the
    same steps. Counters that fit are left alone: they may say that the epoch has ended too.
    """
    epoch, place = divmod(step - 1, per_epoch)
    passes = (place + 1) * micro
    fit = loops["fit_loop"]
    epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    if (epochs["current"]["ready"], batches["current"]["ready"]) == (epoch + 1, passes):
        return
    # The epoch has begun and not ended; of the pass all is done but what follows from it.
    begun = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    for over, n in (("total", step * micro), ("current", passes)):
        epochs[over] = dict(begun)
        batches[over] = {"ready": n, "started": n, "processed": n, "completed": n - 1}
    batches["is_last_batch"] = place + 1 == per_epoch

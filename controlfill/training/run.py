"""A run with Accelerate: options become a prepared run around the loop, and Steps come out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from controlfill.data.sample import Source
from controlfill.files import read_json
from controlfill.inference.pipeline import Report
from controlfill.models.controlnet import AVERAGE, WEIGHTS
from controlfill.options import RunOptions
from controlfill.training import watch
from controlfill.training.checkpoint import (
    OPTIMIZER,
    STATE,
    check_same,
    checkpoints_of,
    find_resume,
    load_optimizer,
    prune,
    save_checkpoint,
    say_classes,
)
from controlfill.training.kinds import prepare
from controlfill.training.loop import Plan, make_accelerator, make_team, train_loop
from controlfill.training.optim import Average, make_optimizer
from controlfill.training.sharding import cut_all, gather, gather_moments, wrap
from controlfill.training.start import Run, new_folder, quiet
from controlfill.training.step import Step
from controlfill.training.stop import Stopped, StopSignals
from controlfill.training.watchers import Watchers, Weights

log = logging.getLogger(__name__)


def train(
    options: RunOptions, source: Source | None = None, report: Report = quiet
) -> Iterator[Step]:
    """Train what `options` are for; yields each Step after it was logged and saved as they ask.

    `source` brings your own data: anything with a length that gives a Sample for an index; `report`
    is told of what takes long before the first step. The result is in the run's folder: logs/,
    checkpoint-<step>/, final_model/. Raises UserError, and Stopped after a signal, when all is
    saved.
    """
    options = options.rehearsed()
    accelerator = make_accelerator(options)
    team = make_team(accelerator)
    resume = team.tell(find_start(options) if team.main else None)
    run = prepare(options, team, source, report)
    optimizer = make_optimizer(run.network, options)
    if resume:
        run.step = restore(run, resume, accelerator, optimizer)
    # 1) The network and the optimizer go through Accelerate, which may wrap or split them.
    wrapped, prepared = wrap(accelerator, run.network, optimizer)
    average = make_average(run, resume)
    run.folder = choose_folder(options, resume, run)
    watchers = Watchers(run, average, Saver(run, accelerator, optimizer))
    watchers.open(options)
    plan = Plan(start=run.step, total=run.total, options=options, average=average)
    batches = run.batches(run.step, run.total)
    check_now = watch.every(options.validation_steps, watchers.validate)
    with StopSignals(team) as signals:
        # 2) Each Step is a weight update that has happened; what follows from it happens here.
        for step in train_loop(accelerator, run.objective(), wrapped, batches=batches,
                               optimizer=prepared, plan=plan):  # fmt: skip
            watchers(step)
            check_now(step)
            yield step
            if signals.received(step):
                watchers.save(step)
                raise Stopped(step.index, run.folder)
    accelerator.wait_for_everyone()
    watchers.finish()


class Saver:
    """Writes a checkpoint folder, then lets old ones go."""

    def __init__(
        self, run: Run, accelerator: Accelerator, optimizer: torch.optim.Optimizer
    ) -> None:
        self.run, self.accelerator, self.optimizer = run, accelerator, optimizer

    def __call__(self, step: Step, averages: Weights | None) -> None:
        """Write `checkpoint-<step>`, on the main process; all of them put its tensors together."""
        run, scaler = self.run, self.accelerator.scaler
        main = run.team.main
        tensors = {
            WEIGHTS: gather(run.network, None, main),
            OPTIMIZER: gather_moments(self.optimizer, run.network, main),
        }
        if not main:
            return
        if averages is not None:
            tensors[AVERAGE] = averages
        state = {
            "step": step.index,
            "options": run.options.as_dict(),
            "class_pictures": run.class_pictures,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        folder = run.folder / f"checkpoint-{step.index}"
        save_checkpoint(folder, run.write, tensors, state)
        prune(run.folder, run.options.checkpoints_total_limit)


def find_start(options: RunOptions) -> Path | None:
    """The checkpoint to go on from, if one is asked for and there; it must be of the same run."""
    if options.resume_from_checkpoint is None:
        return None
    resume = find_resume(options.resume_from_checkpoint, options.output_dir, options.RUN)
    if resume is None:
        log.warning("no checkpoint in %s yet; starting from the beginning", options.output_dir)
    else:
        check_same(read_json(resume / STATE)["options"], options, resume)
    return resume


def choose_folder(options: RunOptions, resume: Path | None, run: Run) -> Path:
    """The run's own folder when it goes on from its end, else a new one.

    Going on from the middle starts a branch of its own, so that no later checkpoint is lost.
    """
    if (
        resume
        and resume.parent.name.startswith(options.RUN)
        and checkpoints_of(resume.parent)[-1] == resume
    ):
        return resume.parent
    return new_folder(options, run.team)


def restore(
    run: Run, resume: Path, accelerator: Accelerator, optimizer: torch.optim.Optimizer
) -> int:
    """Load the checkpoint to resume; returns its step."""
    state = read_json(resume / STATE)
    say_classes(state, run.class_pictures)
    run.take(run.read(resume, WEIGHTS))
    load_optimizer(optimizer, load_file(resume / OPTIMIZER))
    if accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])
    log.info("resuming from %s at step %d", resume, state["step"])
    return int(state["step"])


def make_average(run: Run, resume: Path | None) -> Average | None:
    """The average to keep: the checkpoint's own, else one that starts at the present weights.

    For a network that went through Accelerate already: the average is split as its weights are.
    """
    if not run.options.ema_decay:
        return None
    average = Average(run.network, run.options.ema_decay)
    if resume and (resume / AVERAGE).is_file():
        average.load(cut_all(run.read(resume, AVERAGE), run.network))
    return average

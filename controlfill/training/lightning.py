"""A run with PyTorch Lightning: the same objective, data, watchers and files as the other engine.

Everything that decides a number is shared; Lightning brings devices, strategies, its loop and its
checkpoints. Data order and randomness follow our own count of forward passes.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import lightning as lit
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn

from controlfill.data.sample import Batch, Source, Stack
from controlfill.diffusion.objective import Objective, step_rng
from controlfill.errors import UserError
from controlfill.files import write_whole
from controlfill.inference.pipeline import Report
from controlfill.models.controlnet import HEADER_KEY
from controlfill.options import FitOptions, RunOptions
from controlfill.training import optim
from controlfill.training.batches import Remaining
from controlfill.training.checkpoint import CKPTS, LAST, check_same, find_ckpt, recount, say_classes
from controlfill.training.kinds import prepare
from controlfill.training.optim import Average, learning_rate, make_optimizer, set_learning_rate
from controlfill.training.sharding import learning
from controlfill.training.start import Run, new_folder, quiet
from controlfill.training.step import MicroBatches, Step
from controlfill.training.stop import Stopped, StopSignals
from controlfill.training.team import Team, check_device
from controlfill.training.watchers import Watchers, Weights

log = logging.getLogger(__name__)
OnStep = Callable[[Step], None]


def make_team(trainer: lit.Trainer, options: RunOptions) -> Team:
    """What the rest of the training room may know of Lightning."""
    strategy: Any = trainer.strategy

    def total(values: Tensor) -> Tensor:
        return strategy.reduce(values.to(strategy.root_device), reduce_op="sum").cpu()

    return Team(
        rank=trainer.global_rank,
        ranks=trainer.world_size,
        device=strategy.root_device,
        precision=options.mixed_precision,
        tell=strategy.broadcast,
        total=total,
        autocast=trainer.precision_plugin.forward_context,
    )


class LearnModule(lit.LightningModule):
    """The network that learns, as Lightning wants it; what is frozen stays outside of it."""

    def __init__(
        self,
        options: FitOptions,
        source: Source | None,
        resume: Path | None,
        on_step: OnStep,
        report: Report = quiet,
    ) -> None:
        super().__init__()
        self.asked, self.options = options, options.as_train()
        self.source, self.resume = source, resume
        self.on_step, self.report = on_step, report
        self.number = 0
        self.finding = False
        self.lr = self.options.rate
        self.passes = MicroBatches()
        self.grad_norm = torch.zeros(())
        self.average: Average | None = None
        self.average_is_late = False
        self.parts: tuple[Run, Objective, Watchers] | None = None
        self.signals: StopSignals | None = None
        self.stopped: Stopped | None = None

    @property
    def run(self) -> Run:
        """The prepared run."""
        assert self.parts is not None
        return self.parts[0]

    @property
    def watchers(self) -> Watchers:
        """What happens to each Step."""
        assert self.parts is not None
        return self.parts[2]

    # -- before the first step

    def setup(self, stage: str) -> None:
        """Wire the run, once the processes have found each other."""
        if self.parts is not None:
            return
        team = make_team(self.trainer, self.options)
        run = prepare(self.options, team, self.source, self.report)
        self.network = run.network
        # Checkpoints hold what learns; what is frozen in the network comes from the base.
        self.strict_loading = all(p.requires_grad for p in run.network.parameters())
        if self.options.ema_decay:
            self.average = Average(run.network, self.options.ema_decay)
        self.parts = (run, run.objective(), Watchers(run, self.average, self._save_last))

    def on_train_start(self) -> None:
        """Choose the folder, that of the run that goes on from its end, and listen for signals."""
        if self.finding:
            return
        run, profiler = self.run, cast(Any, self.trainer).profiler
        run.step = self.number // self.options.gradient_accumulation_steps
        own = self.resume.parent.parent if self.resume and self.resume.name == LAST else None
        if own is None or not own.name.startswith(run.options.RUN):
            own = new_folder(run.options, run.team)
        run.folder = own
        profiler.dirpath = own / "logs"
        for callback in self.trainer.checkpoint_callbacks:
            cast(ModelCheckpoint, callback).dirpath = str(run.folder / CKPTS)
        if self.average is not None:
            if self.average_is_late:
                # Only by now does the network have the weights of the checkpoint.
                self.average.start(self.network)
            self.average.to(run.team.device)
        self.watchers.open(self.asked)
        self.signals = StopSignals(run.team).__enter__()

    def on_train_end(self) -> None:
        """Give the signals back."""
        if self.signals is not None:
            self.signals.__exit__(None, None, None)

    def on_exception(self, exception: BaseException) -> None:
        """Give the signals back."""
        self.on_train_end()

    def train_dataloader(self) -> Any:
        """The batches of the present epoch, from where it was left."""
        run, micro = self.run, self.options.gradient_accumulation_steps
        per_epoch = run.steps_per_epoch
        step = self.number // micro
        stop = (step // per_epoch + 1) * per_epoch
        loader = run.batches(step, stop)
        return Remaining(loader, per_epoch * micro)

    def val_dataloader(self) -> Any:
        """Nothing: what is measured after an epoch is measured by the watchers."""
        return []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same optimizer as the other engine's."""
        return make_optimizer(self.network, self.options)

    # -- a forward pass

    def transfer_batch_to_device(
        self, batch: Stack, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Our batches move themselves."""
        return batch.to(device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate, a function of the step."""
        if self.finding:
            return
        step = self.number // self.options.gradient_accumulation_steps
        set_learning_rate(self._optimizer(), learning_rate(step, self.run.total, self.options))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Noise the pictures, let ControlNet and frozen UNet predict, compare."""
        assert self.parts is not None
        rng = step_rng(self.options.seed, self.run.team.rank, self.number)
        cost = self.parts[1].cost(self.network, batch, rng)
        loss = cost.losses.mean()
        self.passes.add(loss, cost.parts, batch.skipped)
        self.number += 1
        return loss

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip by norm as the other engine does, and keep the norm for the log."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(self._optimizer())
        most = self.options.max_grad_norm or math.inf
        wrapped: Any = self.trainer.strategy.model
        # FSDP shards gradients, and its wrapper alone knows their norm.
        clip = getattr(wrapped, "clip_grad_norm_", None)
        if clip is not None:
            self.grad_norm = clip(most)
        else:
            self.grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), most)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizers[0]

    # -- after a step

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After the last forward pass of a step: average, watch, and leave if asked to."""
        micro = self.options.gradient_accumulation_steps
        if self.number % micro or self.finding:
            return
        step = self._make_step(batch)
        if self.average is not None:
            self.average.update(self.network, step.index)
        self.log(
            "train/loss", step.loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
        )
        self.watchers(step)
        self.on_step(step)
        if self.signals is not None and self.signals.received(step):
            self.watchers.save(step)
            # Lightning ends the whole process on a KeyboardInterrupt; so ours is raised later.
            self.stopped = Stopped(step.index, self.run.folder)
            self.trainer.should_stop = True

    def _make_step(self, batch: Batch) -> Step:
        micro, team = self.options.gradient_accumulation_steps, self.run.team
        step = Step(
            index=self.number // micro,
            total=self.run.total,
            grad_norm=self.grad_norm,
            learning_rate=self._optimizer().param_groups[0]["lr"],
            images=len(batch.prompts) * micro * team.ranks,
            **self.passes.summed_up(),
        )
        self.passes = MicroBatches()
        self.last = step
        return step

    def on_train_epoch_end(self) -> None:
        """Validate, with the same masks, noise and times every time."""
        if not self.finding and self.stopped is None:
            for name, value in self.watchers.validate(self.last).items():
                self.log(name, value)

    # -- checkpoints

    def _save_last(self, step: Step, averages: Weights | None) -> None:
        """`last.ckpt`: all that is needed to go on exactly; every .ckpt holds the averages."""
        self.trainer.save_checkpoint(self.run.folder / CKPTS / LAST)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the place in the data, the averages, and what the network is."""
        run = self.run
        own = {f"network.{name}" for name, _ in learning(self.network)}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in own}
        checkpoint[HEADER_KEY] = {
            "number": self.number,
            "options": run.options.as_dict(),
            "header": asdict(run.header),
            "config": run.config,
            "average": self.watchers.averages,
            "class_pictures": run.class_pictures,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the place in the data and the averages. Raises UserError for another run's."""
        kept, run = checkpoint[HEADER_KEY], self.run
        micro = self.options.gradient_accumulation_steps
        check_same(kept["options"], self.options, self.resume or Path())
        # Steps are what was done, whatever number of forward passes each of them took.
        step = kept["number"] // kept["options"]["gradient_accumulation_steps"]
        self.number = step * micro
        recount(checkpoint["loops"], min(step, run.total), run.steps_per_epoch, micro)
        say_classes(kept, run.class_pictures)
        self.average_is_late = kept["average"] is None
        if self.average is not None and not self.average_is_late:
            self.average.load(kept["average"])
        optim.renew(checkpoint.get("optimizer_states", []), self.network, self.options)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints written whole or not at all, and read without running code in them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write through a temporary file, fsync, rename."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values only."""
        return torch.load(path, map_location="cpu", weights_only=True)


def train_lightning(
    options: FitOptions,
    source: Source | None = None,
    on_step: OnStep = lambda step: None,
    report: Report = quiet,
) -> Path:
    """Train what `options` are for with Lightning; returns the run's folder.

    `source` brings your own data; `on_step` hears of every Step, `report` of what comes
    before. The folder holds logs/, checkpoints/*.ckpt, final_model/. Raises UserError and Stopped.
    """
    # Its own lines would drown ours.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = options.rehearsed()
    check_device(options)
    resume = find_ckpt(options.resume_from_checkpoint, options.output_dir, options.RUN)
    module = LearnModule(options, source, resume, on_step, report)
    trainer = make_trainer(options)
    with warnings.catch_warnings():
        # Our loader decides on workers, and an epoch may well be shorter than the log interval.
        warnings.filterwarnings("ignore", module="lightning.*")
        if options.lr_find:
            find_learning_rate(trainer, module)
            trainer = make_trainer(options)
        trainer.fit(module, ckpt_path=str(resume) if resume else None, weights_only=True)
    if module.stopped is not None:
        raise module.stopped
    module.watchers.finish()
    return module.run.folder


def make_trainer(options: FitOptions) -> lit.Trainer:
    """The Trainer that `options` describe."""
    monitor = "val/loss" if options.val_split else "train/loss"
    short = monitor.replace("/", "_")
    callbacks: list[Callback] = [
        ModelCheckpoint(
            monitor=monitor,
            save_top_k=options.save_top_k,
            every_n_epochs=options.save_every_n_epochs,
            filename=f"{options.WORD}-epoch={{epoch:02d}}-{short}={{{monitor}:.4f}}",
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
        )
    ]
    if options.early_stopping_patience is not None:
        patience = options.early_stopping_patience
        callbacks += [EarlyStopping(monitor, patience=patience, check_on_train_epoch_end=True)]
    return lit.Trainer(
        accelerator=options.accelerator,
        devices=1 if options.devices == -1 and options.accelerator == "cpu" else options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision=options.precision,
        accumulate_grad_batches=options.accumulate_grad_batches,
        max_steps=options.max_steps if options.max_steps is not None else -1,
        max_epochs=None if options.max_steps is not None else options.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        profiler=PROFILERS[options.profiler](filename="profile") if options.profiler else None,
        plugins=[WholeFiles()],
        default_root_dir=str(options.output_dir),
    )


def find_learning_rate(trainer: lit.Trainer, module: LearnModule) -> None:
    """Try rising rates on the first batches and take that of the steepest descent."""
    module.finding = True
    # Losses differ more between noise levels than between rates: none of them means divergence.
    finder: Any = Tuner(trainer).lr_find(
        module, update_attr=False, num_training=50, early_stop_threshold=None
    )
    module.finding = False
    found = finder.suggestion() if finder is not None else None
    if found is None:
        raise UserError(
            "--lr_find saw no rate at which the loss falls; give --learning_rate, or more pictures"
        )
    log.info("--lr_find suggests a learning rate of %.2e", found)
    module.options = replace(module.options, learning_rate=found)
    module.number, module.passes = 0, MicroBatches()
    module.parts = None


PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}

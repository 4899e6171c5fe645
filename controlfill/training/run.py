"""The wiring room: options become a bundle, a network, batches and watchers around the loop."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from controlfill.data.hints import Spec, check_range, open_spec
from controlfill.data.sample import Batch, PreparedSource, Source
from controlfill.data.sources import make_preparation, open_source
from controlfill.diffusion.objective import Objective
from controlfill.errors import UserError
from controlfill.files import read_json, write_folder, write_whole
from controlfill.images import save_image
from controlfill.inference.pipeline import DTYPES, Pipeline, choose_spec
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.controlnet import (
    AVERAGE,
    SINGLE,
    WEIGHTS,
    Header,
    find_controlnet,
    load_controlnet,
    make_controlnet,
    read_control_header,
    save_controlnet,
)
from controlfill.options import TrainOptions, check_numbers
from controlfill.training import watch
from controlfill.training.batches import Places, collate_prepared, make_batches
from controlfill.training.checkpoint import (
    OPTIMIZER,
    RUN,
    STATE,
    checkpoints_of,
    find_resume,
    load_optimizer,
    load_weights,
    prune,
    save_checkpoint,
)
from controlfill.training.loop import Plan, Step, agree, make_accelerator, train_loop
from controlfill.training.optim import Average, make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ControlNetModel

log = logging.getLogger(__name__)
PANEL_ROWS = 4
# Options that may differ between a run and its continuation without changing what is learned.
FREE_OPTIONS = {
    "output_dir", "resume_from_checkpoint", "save_steps", "log_steps", "log_images_steps",
    "num_workers", "checkpoints_total_limit", "max_steps", "num_epochs",
}  # fmt: skip
# Options that make it another run.
FIXED_OPTIONS = ("conditioning", "pretrained_model_name_or_path", "image_dir", "ann_file")


def count_steps(options: TrainOptions, pictures: int, ranks: int) -> int:
    """Optimizer steps of the whole run."""
    if options.max_steps is not None:
        return options.max_steps
    per_step = options.batch_size * options.gradient_accumulation_steps * ranks
    return math.ceil(pictures * options.num_epochs / per_step)


@dataclass(kw_only=True)
class Run:
    """A prepared run: everything `train` needs, wired."""

    options: TrainOptions
    accelerator: Accelerator
    bundle: Bundle
    spec: Spec
    network: ControlNetModel
    data: PreparedSource
    folder: Path
    resume: Path | None
    step: int = 0

    @property
    def header(self) -> Header:
        """What the saved network says of itself."""
        return Header(
            conditioning=self.spec.label,
            base=self.bundle.name,
            base_family=self.bundle.family,
            prediction_type=self.bundle.prediction_type,
            step=self.step,
        )


def prepare(options: TrainOptions, source: Source | None = None) -> Run:
    """Open the data, load the base, make or load the network, and choose the run's folder."""
    check_numbers(options)
    accelerator = make_accelerator(options)
    source = source if source is not None else open_source(options.image_dir, options)
    say_missing(source)
    data = PreparedSource(source, make_preparation(options), options.seed)
    data[0, 0]  # data that can't be used at all is said now, not after the base is loaded
    resume = find_start(options)
    bundle = load_bundle(options.pretrained_model_name_or_path)
    bundle.check_size(options.image_size)
    spec = open_spec(options.conditioning)
    network = start_network(options, bundle, spec)
    folder = choose_folder(options, resume, accelerator)
    # On a GPU half-precision frozen weights save memory; the CPU's autocast wants them in single.
    on_cpu = accelerator.device.type == "cpu"
    bundle.to(accelerator.device, DTYPES["no" if on_cpu else accelerator.mixed_precision])
    return Run(
        options=options, accelerator=accelerator, bundle=bundle, spec=spec, network=network,
        data=data, folder=folder, resume=resume,
    )  # fmt: skip


def find_start(options: TrainOptions) -> Path | None:
    """The checkpoint to go on from, if one is asked for and there; it must be of the same run."""
    if options.resume_from_checkpoint is None:
        return None
    resume = find_resume(options.resume_from_checkpoint, options.output_dir)
    if resume is None:
        log.warning("no checkpoint in %s yet; starting from the beginning", options.output_dir)
    else:
        check_same(read_json(resume / STATE)["options"], options, resume)
    return resume


def choose_folder(options: TrainOptions, resume: Path | None, accelerator: Accelerator) -> Path:
    """The run's own folder when it goes on from its end, else a new one.

    Going on from the middle starts a branch of its own, so that no later checkpoint is lost.
    """
    if (
        resume
        and resume.parent.name.startswith(RUN)
        and checkpoints_of(resume.parent)[-1] == resume
    ):
        return resume.parent
    return new_folder(options.output_dir, accelerator)


def say_missing(source: Source) -> None:
    """Say how many annotated pictures are not there, and name the first."""
    missing = getattr(source, "missing", [])
    if missing:
        log.warning(
            "%d annotated pictures are absent and left out: %s%s",
            len(missing), ", ".join(missing[:5]), ", ..." if len(missing) > 5 else "",
        )  # fmt: skip


def start_network(options: TrainOptions, bundle: Bundle, spec: Spec) -> ControlNetModel:
    """The ControlNet to begin with: given weights, or a copy of the base's encoder."""
    latent = spec.at_latent_size
    given = options.controlnet_model_name_or_path
    if given:
        file = find_controlnet(given)
        choose_spec(read_control_header(file), spec.name, file)
        return load_controlnet(file, bundle, spec.channels, at_latent_size=latent)
    # The hint's convolutions start at random: the same ones for the same seed.
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return make_controlnet(bundle, spec.channels, at_latent_size=latent)


def new_folder(output_dir: Path, accelerator: Accelerator) -> Path:
    """A new folder `controlnet_inpainting_<time>`, the same for all processes."""
    name = ""
    if accelerator.is_main_process:
        stamp = f"{RUN}{time.strftime('%Y%m%d_%H%M%S')}"
        names = itertools.chain([stamp], (f"{stamp}_{n}" for n in itertools.count(2)))
        name = next(n for n in names if not (output_dir / n).exists())
        (output_dir / name / "logs").mkdir(parents=True)
    return output_dir / agree(accelerator, name)


def train(options: TrainOptions, source: Source | None = None) -> Iterator[Step]:
    """Train a ControlNet; yields each Step after it was logged and saved as `options` ask.

    `source` brings your own data: anything with a length that gives a Sample for an index. The
    result is in the run's folder: logs/, checkpoint-<step>/, final_model/. Raises UserError.
    """
    run = prepare(options, source)
    accelerator, network = run.accelerator, run.network
    optimizer = make_optimizer(network, options)
    if run.resume:
        run.step = restore(run, optimizer)
    average = make_average(run)
    total = count_steps(options, len(run.data), accelerator.num_processes)
    spans = [step * options.gradient_accumulation_steps for step in (run.step, total)]
    places = Places(len(run.data), options, accelerator.process_index, accelerator.num_processes)
    batches = make_batches(run.data, places.between(*spans), run.spec, options.num_workers)
    objective = Objective(run.bundle, run.spec, options.proportion_empty_prompts)
    wrapped, prepared = accelerator.prepare(network, optimizer)
    if average is not None:
        average.weights = {n: w.to(accelerator.device) for n, w in average.weights.items()}
    plan = Plan(start=run.step, total=total, options=options, average=average)
    watchers = Watchers(run, optimizer, average)
    for step in train_loop(accelerator, objective, wrapped, prepared, batches, plan):
        run.step = step.index
        watchers(step)
        yield step
    watchers.finish()


def restore(run: Run, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint to resume; returns its step."""
    assert run.resume is not None
    state = read_json(run.resume / STATE)
    load_weights(run.resume, run.network)
    load_optimizer(optimizer, load_file(run.resume / OPTIMIZER))
    if run.accelerator.scaler is not None and state.get("scaler"):
        run.accelerator.scaler.load_state_dict(state["scaler"])
    log.info("resuming from %s at step %d", run.resume, state["step"])
    return int(state["step"])


def make_average(run: Run) -> Average | None:
    """The average to keep: the checkpoint's own, else one that starts at the present weights."""
    if not run.options.ema_decay:
        return None
    average = Average(run.network, run.options.ema_decay)
    if run.resume and (run.resume / AVERAGE).is_file():
        average.load(load_file(run.resume / AVERAGE))
    return average


def check_same(saved: dict[str, Any], options: TrainOptions, where: Path) -> None:
    """Refuse other data, base or conditioning; say which other options differ from the run's."""
    now = options.as_dict()
    changed = [k for k, v in saved.items() if k not in FREE_OPTIONS and now.get(k) != v]
    for name in FIXED_OPTIONS:
        if name in changed:
            raise UserError(
                f"{where} was trained with --{name} {saved[name]}, not {now[name]}; resume with "
                "the run's own, or start a new run"
            )
    if changed:
        words = ", ".join(f"{k} {saved[k]} -> {now.get(k)}" for k in changed)
        log.warning("resuming with other options than the run had: %s", words)


class Watchers:
    """Logging, panels and saving of one run, on its main process."""

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer, average: Average | None) -> None:
        self.run, self.optimizer, self.average = run, optimizer, average
        self.meter, self.skipped = watch.Meter(), watch.Skipped()
        self.main = run.accelerator.is_main_process
        self.panel_batch = self._check_hint()
        options = run.options
        self.watchers = [
            watch.every(options.log_steps, self.log),
            watch.every(options.log_images_steps, self.draw),
            watch.every(options.save_steps, self.save),
        ]
        if self.main:
            self.writer = watch.open_writer(run.folder, run.step)
            text = yaml.safe_dump(options.as_dict(), sort_keys=False, allow_unicode=True)
            write_whole(run.folder / "config.yaml", text.encode())

    def _check_hint(self) -> Batch:
        """The fixed batch of the panels; its hint is checked here, before the first step."""
        rows = min(PANEL_ROWS, len(self.run.data))
        items = [self.run.data[0, index] for index in range(rows)]
        batch = collate_prepared(items, self.run.spec)
        check_range(batch.hint, batch.mask, self.run.spec)
        return batch

    def __call__(self, step: Step) -> None:
        self.meter.add(step)
        self.skipped.add(step)
        for watcher in self.watchers:
            watcher(step)

    def log(self, step: Step) -> None:
        """Scalars to TensorBoard; stops the run when the loss is no number."""
        values = self.meter.read()
        if self.main:
            watch.write_scalars(self.writer, values, step.index)

    def draw(self, step: Step) -> None:
        """Panels to TensorBoard and to logs/panels.png."""
        if not self.main:
            return
        run = self.run
        network = run.network.eval()
        pipeline = Pipeline(bundle=run.bundle, network=network, spec=run.spec)
        with run.accelerator.autocast():
            picture = watch.draw_panels(pipeline, self.panel_batch, run.options.seed)
        network.train()
        self.writer.add_image("panels", picture, step.index, dataformats="HWC")
        save_image(run.folder / "logs" / "panels.png", picture)

    def save(self, step: Step) -> None:
        """A checkpoint, never of a broken network; then old ones go."""
        watch.check_finite(float(step.loss), step.index)
        watch.check_weights(self.run.network, step.index)
        if not self.main:
            return
        run = self.run
        scaler = run.accelerator.scaler
        state = {
            "step": step.index,
            "options": run.options.as_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        save_checkpoint(
            run.folder / f"checkpoint-{step.index}",
            run.network,
            run.header,
            self.optimizer,
            self._averages(),
            state,
        )
        prune(run.folder, run.options.checkpoints_total_limit)

    def _averages(self) -> dict[str, Tensor] | None:
        if self.average is None:
            return None
        return {name: w.cpu().contiguous() for name, w in self.average.weights.items()}

    def finish(self) -> None:
        """Write final_model: the averaged weights if there are any, else the last ones."""
        if self.skipped.reasons:
            log.warning("%d pictures were skipped", len(self.skipped.reasons))
        run = self.run
        watch.check_weights(run.network, run.step)
        run.accelerator.wait_for_everyone()
        if not self.main:
            return
        with write_folder(run.folder / "final_model") as folder:
            save_controlnet(run.network, folder, run.header, self._averages(), (WEIGHTS, SINGLE))
        self.writer.close()
        log.info("the trained ControlNet is in %s", run.folder / "final_model")

"""The watchers of a run: log, measure, draw, save, finish; the same for both engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from torch import Tensor

from controlfill.data.hints import check_range
from controlfill.files import write_folder, write_whole
from controlfill.images import save_image
from controlfill.inference.pipeline import Pipeline
from controlfill.options import Options
from controlfill.training import hub, watch
from controlfill.training.optim import Average
from controlfill.training.sharding import gather, is_split, whole_copy
from controlfill.training.start import Run
from controlfill.training.step import Step
from controlfill.training.validate import (
    averaged,
    check_requests,
    draw_requests,
    measure,
)
from controlfill.training.writers import Writers, open_writers

log = logging.getLogger(__name__)
PANEL_ROWS = 4
Weights = dict[str, Tensor]
Save = Callable[[Step, Weights | None], None]


class Watchers:
    """What happens to each Step of one run, on every process; only the main one writes.

    `save` is the engine's own way of writing a checkpoint, given the Step and the averages.
    """

    def __init__(self, run: Run, average: Average | None, save: Save) -> None:
        self.run, self.average, self.save_now = run, average, save
        self.meter, self.skipped = watch.Meter(), watch.Skipped()
        self.objective = run.objective()
        self.panel_batch = run.first_batch(PANEL_ROWS)
        check_range(self.panel_batch.hint, self.panel_batch.mask, run.spec)
        check_requests(run.options, run.spec.given)
        options = run.options
        self.watchers = [
            watch.every(options.log_steps, self.log),
            watch.every(options.log_images_steps, self.draw),
            watch.every(options.save_steps, self.save),
        ]
        self.writers = Writers([])

    def open(self, options: Options) -> None:
        """Write config.yaml and open the logs, in the run's folder; once that is chosen."""
        if self.run.team.main:
            self.writers = open_writers(self.run.options, self.run.folder, self.run.step)
            text = yaml.safe_dump(options.as_dict(), sort_keys=False, allow_unicode=True)
            write_whole(self.run.folder / "config.yaml", text.encode())

    def __call__(self, step: Step) -> None:
        self.run.step = step.index
        self.meter.add(step)
        self.skipped.add(step)
        for watcher in self.watchers:
            watcher(step)

    @contextmanager
    def _shown(self, everywhere: bool) -> Iterator[Any]:
        """While entered, what the run will end with: the network, with its average if it has one.

        Where weights are split over processes it is a copy, on the main process or `everywhere`.
        """
        run, weights = self.run, self.average.weights if self.average else None
        if is_split(run.network):
            yield whole_copy(run.network, weights, run.team.device, everywhere or run.team.main)
        else:
            with averaged(run.network, weights):
                yield run.network

    @property
    def averages(self) -> Weights | None:
        """The averaged weights, whole, on the CPU of the main process; for all to ask together."""
        if self.average is None:
            return None
        return gather(self.run.network, self.average.weights, self.run.team.main)

    def log(self, step: Step) -> None:
        """Write curves, the loss as the mean over all processes; stops when one is no number."""
        team, values = self.run.team, self.meter.read()
        shares = team.total(torch.tensor([values["train/loss"]], dtype=torch.float64))
        values["train/loss"] = float(shares) / team.ranks
        self.writers.scalars(values, step.index)

    def _pipeline(self, network: Any) -> Pipeline:
        return self.run.pipeline(network)

    def draw(self, step: Step) -> None:
        """Panels of training pictures, to the logs and to logs/panels.png."""
        with self._shown(everywhere=False) as network, self.run.team.autocast():
            if not self.run.team.main:
                return
            pipeline, seed = self._pipeline(network), self.run.options.seed
            picture = watch.draw_panels(pipeline, self.panel_batch, seed)
        self.writers.picture("panels", picture, step.index)
        save_image(self.run.folder / "logs" / "panels.png", picture)

    def validate(self, step: Step) -> dict[str, float]:
        """Measure the pictures kept apart and draw the validation pictures; returns the means."""
        run, values = self.run, {}
        with self._shown(everywhere=True) as network:
            if run.data.keep is not None:
                values = measure(run, self.objective, network)
            if run.options.validation_image and run.team.main:
                with run.team.autocast():
                    picture = draw_requests(self._pipeline(network), run.options)
                assert picture is not None
                self.writers.picture("validation", picture, step.index)
                save_image(run.folder / "logs" / f"validation-{step.index}.png", picture)
        self.writers.scalars(values, step.index)
        return values

    def save(self, step: Step) -> None:
        """A checkpoint, never of a broken network."""
        watch.check_finite(float(step.loss), step.index)
        watch.check_weights(self.run.network, step.index)
        self.save_now(step, self.averages)

    def finish(self) -> None:
        """Write final_model: the averaged weights if there are any, else the last ones."""
        if self.skipped.reasons:
            log.warning("%d pictures were skipped", len(self.skipped.reasons))
        run = self.run
        watch.check_weights(run.network, run.step)
        parts = self.average.weights if self.average else None
        weights = gather(run.network, parts, run.team.main)
        if not run.team.main:
            return
        with write_folder(run.folder / "final_model") as folder:
            run.finish(folder, weights)
        self.writers.close()
        log.info("what was trained is in %s", run.folder / "final_model")
        if run.options.push_to_hub:
            hub.push(run.folder / "final_model", run.options.hub_model_id or run.folder.name)

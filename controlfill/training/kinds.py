"""The kinds of runs there are: which of them `options` ask for."""

from __future__ import annotations

from controlfill.data.sample import Source
from controlfill.inference.pipeline import Report
from controlfill.options import FinetuneOptions, RunOptions, TrainOptions
from controlfill.training import control, finetune
from controlfill.training.start import Run, quiet
from controlfill.training.team import Team


def prepare(
    options: RunOptions, team: Team, source: Source | None = None, report: Report = quiet
) -> Run:
    """The run that `options` ask for, all but its folder. Raises UserError.

    `report` is told of what takes long before the first step.
    """
    if isinstance(options, TrainOptions):
        return control.prepare(options, team, source)
    assert isinstance(options, FinetuneOptions)
    return finetune.prepare(options, team, source, report)

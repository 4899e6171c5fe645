"""Leaving cleanly: Ctrl-C and SIGTERM end a run after its present step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from controlfill.training.step import Step
from controlfill.training.team import Team

# Steps between the moments at which several processes ask each other whether one was signalled.
ASK_EVERY = 10


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop has saved step `step` in `folder` and left."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder
        super().__init__(
            f"stopped after step {step}, which is saved in {folder}; go on with "
            "--resume_from_checkpoint latest"
        )


class StopSignals:
    """While entered, notes SIGINT and SIGTERM; a second Ctrl-C interrupts at once.

    Python lets only the main thread listen; elsewhere (a notebook's worker, a server) the signals
    keep the meaning they have.
    """

    def __init__(self, team: Team) -> None:
        self.team, self.noted = team, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = True

    def received(self, step: Step) -> bool:
        """Whether any process was signalled, the same answer on all of them."""
        if self.team.ranks == 1:
            return self.noted
        if step.index % ASK_EVERY:
            return False
        return bool(self.team.total(torch.tensor([int(self.noted)])).item())

"""What people see on the terminal: lines, errors, progress bars."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str, code: int = 2) -> int:
    """Say one line on stderr; returns the exit code."""
    ERR.print(f"controlfill: error: {message}", markup=False)
    return code


def say(message: str) -> None:
    """Say one line on stdout."""
    OUT.print(message, markup=False)


def quiet_libraries() -> None:
    """Let our own log lines through and keep the libraries' chatter away."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("controlfill").setLevel(logging.INFO)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with counts, time spent and time left, on stderr."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=ERR, disable=not is_first_process()) as bar:
        yield bar


def is_first_process() -> bool:
    """Whether this is the process that speaks, of the several that a launcher may have started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def reporting() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for work of several named parts."""
    with progress_bar() as bar:
        yield reporter(bar)


def reporter(bar: Progress) -> Callable[[str, int, int], None]:
    """Shows named parts of the work as lines of `bar`."""
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    return report

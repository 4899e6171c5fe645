"""Where curves and panels go: TensorBoard, Weights and Biases, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from controlfill.errors import UserError
from controlfill.files import refuse_full_disk
from controlfill.options import RunOptions


class Writer(Protocol):
    """One destination of curves and pictures."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, picture: np.ndarray, step: int) -> None: ...

    def close(self) -> None: ...


class Writers:
    """Several writers as one; with none of them, silence."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = writers

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write `values` by their names."""
        for writer in self.writers:
            writer.scalars(values, step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 (H, W, 3)."""
        for writer in self.writers:
            writer.picture(name, picture, step)

    def close(self) -> None:
        """Write what is left."""
        for writer in self.writers:
            writer.close()


class TensorBoard:
    """TensorBoard event files in the run's logs/; what was logged after `step` is superseded."""

    def __init__(self, logs: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.logs = logs
        self.writer = SummaryWriter(str(logs), purge_step=step + 1 if step else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write `values` as curves."""
        with refuse_full_disk(self.logs):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a picture."""
        with refuse_full_disk(self.logs):
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        self.writer.close()


class WandB:
    """A Weights and Biases run, named like the run's folder and continued under the same id."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "--report_to wandb needs the wandb package: pip install 'controlfill[wandb]'"
            ) from error
        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project="controlfill",
            id=folder.name,
            name=folder.name,
            dir=str(folder / "logs"),
            config=config,
            resume="allow",
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log `values` with their step."""
        self.run.log({**values, "step": step})

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log a picture with its step."""
        self.run.log({name: self.wandb.Image(picture), "step": step})

    def close(self) -> None:
        """End the run."""
        self.run.finish()


def open_writers(options: RunOptions, folder: Path, step: int) -> Writers:
    """The writers that `--report_to` names, for a run in `folder` that starts after `step`."""
    writers: list[Writer] = []
    if options.report_to in ("tensorboard", "all"):
        writers.append(TensorBoard(folder / "logs", step))
    if options.report_to in ("wandb", "all"):
        writers.append(WandB(folder, options.as_dict()))
    return Writers(writers)

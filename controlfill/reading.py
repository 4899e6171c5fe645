"""Reading options: from flags, and from a YAML file with the same names."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import tyro

from controlfill import options as opts
from controlfill.errors import UserError

# What each engine adds to the name of a command that trains.
ENGINES = {"accelerate": "", "lightning": "_lightning"}
TRAINING = ("train", "finetune")
PRESETS = Path(__file__).parent / "assets" / "presets"


def read_options(cls: type[Any], name: str, arguments: list[str]) -> Any:
    """Options from `--config FILE.yaml` and flags; flags win. Raises UserError."""
    wants = f"a YAML file or one of: {', '.join(presets())}"
    config, arguments = take_option("config", arguments, wants)
    values = read_config(cls, config) if config else {}
    default = None
    if values:
        blank = {
            f.name: tyro.MISSING
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        default = cls(**{**blank, **values})
    with one_line():
        return tyro.cli(
            cls,
            prog=f"controlfill {name}",
            args=own_names(arguments),
            default=default,
            use_underscores=True,
        )


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what tyro says of wrong flags, a box of several lines, into one UserError."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        words = re.sub(r"[─-╿]", " ", said.getvalue()).split()
        raise UserError(" ".join(words)) from error


def take_option(name: str, arguments: list[str], wants: str) -> tuple[str | None, list[str]]:
    """Split `--name VALUE` or `--name=VALUE` off the arguments."""
    for i, word in enumerate(arguments):
        if word.startswith(f"--{name}="):
            return word.partition("=")[2], arguments[:i] + arguments[i + 1 :]
        if word == f"--{name}":
            if i + 1 == len(arguments):
                raise UserError(f"--{name} needs {wants}")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def own_names(arguments: list[str]) -> list[str]:
    """The arguments with options called by their other names called by ours."""
    renamed = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        known = flag.startswith("--") and name in opts.ALIASES
        renamed.append(f"--{opts.ALIASES[name]}{equals}{value}" if known else word)
    return renamed


def read_config(cls: type[Any], file: str) -> dict[str, Any]:
    """The options in a YAML file or a preset, each checked against its field. Raises UserError."""
    import yaml

    shipped = PRESETS / f"{file}.yaml"
    path = shipped if file in presets() and not Path(file).exists() else Path(file)
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file} holds no `option: value` lines")
    return opts.check_values(cls, values, file)


def presets() -> list[str]:
    """The names of the presets that ship."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def take_engine(name: str, arguments: list[str]) -> tuple[str, list[str]]:
    """`train --engine lightning ...` is the command `train_lightning ...`. Raises UserError."""
    if name not in TRAINING:
        return name, arguments
    engine, arguments = take_option("engine", arguments, "`accelerate` or `lightning`")
    if engine is not None and engine not in ENGINES:
        raise UserError(f"--engine {engine} is none of: {', '.join(ENGINES)}")
    return name + ENGINES[engine or "accelerate"], arguments

"""The commands about model files: make one call each, print one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from controlfill import options as opts
from controlfill.console import quiet_libraries, reporting, say


def convert(options: opts.ConvertOptions) -> None:
    """`controlfill convert`."""
    quiet_libraries()
    from controlfill.models.convert import convert as write

    with reporting() as report:
        done = write(options, report)
    for note in done.notes:
        say(note)
    say(f"wrote {done.path}: {done.what}, {done.tensors} tensors")


def merge(options: opts.MergeOptions) -> None:
    """`controlfill merge`."""
    quiet_libraries()
    from controlfill.models.merge import merge as write

    with reporting() as report:
        done = write(options, report)
    for note in done.notes:
        say(note)
    say(f"wrote {done.path}: {done.what}")


def glid_split(options: opts.GlidSplitOptions) -> None:
    """`controlfill glid split`."""
    quiet_libraries()
    from controlfill.models.glid import split

    count = split(options.source, options.out)
    say(f"wrote {options.out}: a UNet of {count} tensors")


def glid_join(options: opts.GlidJoinOptions) -> None:
    """`controlfill glid join`."""
    quiet_libraries()
    from controlfill.models.glid import join

    count = join(options.source, options.unet, options.out)
    say(f"wrote {options.out}: {options.source} with a UNet of {count} tensors")


MODELS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "convert": (opts.ConvertOptions, convert),
    "merge": (opts.MergeOptions, merge),
    "glid split": (opts.GlidSplitOptions, glid_split),
    "glid join": (opts.GlidJoinOptions, glid_join),
}

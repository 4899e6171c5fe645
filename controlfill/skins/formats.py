"""All formats of themes: written by the name of the file, opened by what is in it."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from controlfill.errors import UserError
from controlfill.skins.archive import Files, open_files
from controlfill.skins.fcitx5 import export_fcitx5, read_fcitx5
from controlfill.skins.layout import Layout
from controlfill.skins.theme import export_cskin, read_cskin
from controlfill.skins.trime import export_trime, read_trime


def export_theme(image: np.ndarray, layout: Layout, out: Path, labels: bool = True) -> Path:
    """Write a skin (H, W, 3) as the theme that the name of `out` asks for. Raises UserError."""
    for suffix, export in EXPORTS.items():
        if out.name.endswith(suffix) and out.name != suffix:
            return export(image, layout, out, labels)
    *most, last = (f"NAME{suffix}" for suffix in EXPORTS)
    raise UserError(f"{out} is no name of a theme; {', '.join(most)} or {last} would be")


def import_theme(path: Path) -> tuple[Layout, np.ndarray]:
    """The layout and the skin (H, W, 3) of a theme that was written here, whatever its format.

    `path` is an archive, or a folder of the same files. Raises UserError for all others.
    """
    files = open_files(path)
    for mark, read in IMPORTS.items():
        if any(fnmatchcase(name, mark) for name in files):
            return read(files, path)
    raise UserError(f"{path} is no theme: none of {', '.join(IMPORTS)} is in it")


# By the ends of names, and by a file that only this format has.
EXPORTS: dict[str, Callable[[np.ndarray, Layout, Path, bool], Path]] = {
    ".cskin": export_cskin,
    ".trime.zip": export_trime,
    ".fcitx5.zip": export_fcitx5,
}
IMPORTS: dict[str, Callable[[Files, Path], tuple[Layout, np.ndarray]]] = {
    "config.yaml": read_cskin,
    "*.trime.yaml": read_trime,
    "*.json": read_fcitx5,
}

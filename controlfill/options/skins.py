"""Options of the commands that make and take apart keyboard skins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from controlfill.options.base import Options


@dataclass(frozen=True, kw_only=True)
class LayoutOptions(Options):
    """Which keyboard, and how it is labelled."""

    layout: str = "qwerty-26"
    """A layout that ships (qwerty-26, t9, keyboard-parts-4), or a YAML file."""
    size: str | None = None
    """WIDTHxHEIGHT of the canvas; otherwise the layout's own."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions(LayoutOptions):
    """The same, and how labels are written."""

    font: Path | None = None
    """Font file of the labels; otherwise one of the system's."""


@dataclass(frozen=True, kw_only=True)
class SkinHintOptions(LabelOptions):
    """Draw the hint of a layout: the outlines of its keys, with or without labels."""

    out: Positional[Path]
    """The picture to write."""
    glyphs: bool = False
    """Write the labels too."""


@dataclass(frozen=True, kw_only=True)
class SkinComposeOptions(LayoutOptions):
    """Lay the element images of a folder out on one canvas; what misses is reported."""

    parts: Positional[Path]
    """Folder of element images, called after slots (q.png) or parts (key.png, panel-26.png)."""
    out: Positional[Path]
    """The skin to write."""


@dataclass(frozen=True, kw_only=True)
class SkinSliceOptions(LayoutOptions):
    """Cut a skin into its parts; composed again they give the same picture."""

    image: Positional[Path]
    """The skin, as large as the layout's canvas or --size."""
    out: Positional[Path]
    """The folder to write."""
    pressed: bool = True
    """Write each key as it looks while held down too."""


@dataclass(frozen=True, kw_only=True)
class SkinRenderOptions(LabelOptions):
    """Write the labels on a skin without text."""

    image: Positional[Path]
    """The skin, as large as the layout's canvas or --size."""
    out: Positional[Path]
    """The picture to write."""


@dataclass(frozen=True, kw_only=True)
class SkinThemesOptions(LayoutOptions):
    """Draw part sets of procedural themes, each a folder of element images with its caption."""

    out: Positional[Path]
    """The folder to write."""
    count: int = 40
    """Themes to draw."""
    seed: int = 0
    """Seed of the first; each next one's is one more."""


@dataclass(frozen=True, kw_only=True)
class SkinCheckOptions(LayoutOptions):
    """Say which keys of a skin are where the layout has them (KeyFit)."""

    image: Positional[Path]
    """The skin, as large as the layout's canvas or --size."""


@dataclass(frozen=True, kw_only=True)
class SkinExportOptions(LayoutOptions):
    """Write a skin as a theme to install, for Yuanshu (Hamster), Trime or fcitx5-android."""

    image: Positional[Path]
    """The skin, as large as the layout's canvas or --size."""
    out: Positional[Path]
    """The theme to write: NAME.cskin, NAME.trime.zip or NAME.fcitx5.zip."""
    labels: bool = True
    """Let the input method write the labels, on a skin without text."""


@dataclass(frozen=True, kw_only=True)
class SkinImportOptions(LayoutOptions):
    """Open a theme that was exported here, or take over the element images of somebody else's."""

    source: Positional[Path]
    """The theme: .cskin, .trime.zip or .fcitx5.zip; with --parts a folder of pictures."""
    out: Positional[Path]
    """The folder to write: skin.png and layout.yaml, or parts as --layout calls them."""
    parts: bool = False
    """Take over element images, whatever they are called."""

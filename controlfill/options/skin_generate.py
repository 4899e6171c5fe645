"""Options of the commands that generate keyboard skins and measure them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from controlfill.options.base import Options
from controlfill.options.filling import SampleOptions, SeedsOptions
from controlfill.options.skins import LabelOptions, LayoutOptions

SkinHint = Literal["edges", "glyphs"]
SkinLabels = Literal["drawn", "in-picture", "none"]
ThemeName = Literal["cskin", "trime", "fcitx5"]
OcrName = Literal["v4", "v6"]


@dataclass(frozen=True, kw_only=True)
class SkinChangeOptions(LayoutOptions, SampleOptions):
    """All that may differ from one skin of a batch to the next."""

    prompt: str = ""
    """What the skin looks like."""


@dataclass(frozen=True, kw_only=True)
class SkinGenerateOptions(LabelOptions, SeedsOptions, SkinChangeOptions):
    """Paint keyboard skins that follow a layout: pictures, their parts, installable themes."""

    output_dir: Positional[Path] = Path("./outputs/skins")
    """The folder to write; an interrupted batch goes on there."""
    control: str
    """ControlNet trained on skins with --conditioning image: checkpoint, final_model, file."""
    base: str | None = None
    """The base; otherwise the one the ControlNet was trained on."""
    prompts: Path | None = None
    """Many skins: a file with a prompt in each line, or a .jsonl file whose lines say prompt, name,
    layout, seed or any other option of sampling."""
    num_images: int = 1
    """Skins of each prompt, in so many seeds counted from --seed."""
    hint: SkinHint = "edges"
    """What the ControlNet was trained on and is told: outlines of keys (`edges`), labels too
    (`glyphs`)."""
    labels: SkinLabels | None = None
    """`drawn`: the networks paint no text, and NAME-labelled.png has the labels drawn on it;
    `in-picture`: the networks paint them; `none`: nobody does. Otherwise in-picture for the hint
    `glyphs`, else drawn."""
    theme: tuple[ThemeName, ...] = ()
    """Themes to write of each skin: `cskin` (Yuanshu), `trime`, `fcitx5`."""
    window_size: int | None = 0
    """Side of the windows through which the canvas is seen, in pixels; 0 = all at once, as it was
    in training."""
    slices: bool = True
    """Write the parts of each skin, as it is painted, into a folder of its name."""


@dataclass(frozen=True, kw_only=True)
class SkinReportOptions(Options):
    """Measure the skins of a folder: keys in place, legible labels; writes a page and its JSON."""

    skins: Positional[Path]
    """Folder of skins; what was generated here says its layout, labels and prompt itself."""
    layout: str | None = None
    """A layout that ships, or a YAML file; otherwise what a picture says, or qwerty-26."""
    size: str | None = None
    """WIDTHxHEIGHT of the canvas; otherwise what a picture says, or the layout's own."""
    labels: SkinLabels | None = None
    """Where the labels are, as in `skin generate`; otherwise what a picture says, or in-picture."""
    font: Path | None = None
    """Font file of the labels that painted ones are compared with; otherwise the system has one."""
    ocr: tuple[OcrName, ...] = ("v4", "v6")
    """Text readers that judge (pip install 'controlfill[ocr]'); those that lack are left out."""
    loss_ocr: OcrName | None = None
    """The reader that the text loss was trained with, if any: it is no fair judge and is marked."""
    output: Path | None = None
    """The page to write; otherwise report.html among the skins."""
    json: Path | None = None
    """The figures to write; otherwise report.json among the skins."""

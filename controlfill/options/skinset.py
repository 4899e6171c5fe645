"""Options of the commands that make training data of keyboard skins and other pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from controlfill.options.base import Device, Options
from controlfill.options.data import DataOptions
from controlfill.options.preparing import ImageFormat
from controlfill.options.skins import LabelOptions

LayoutHint = Literal["edges", "glyphs"]
PictureTexts = Literal["unknown", "layout", "none"]


@dataclass(frozen=True, kw_only=True)
class CaptionWords(Options):
    """What stands before and after every caption; where it does already, it is not said twice."""

    prefix: str = "a keyboard skin of"
    """Words before every caption."""
    suffix: str = ",iflyskin"
    """What follows every caption, such as the token of a style."""


@dataclass(frozen=True, kw_only=True)
class PrepareSkinsOptions(LabelOptions, CaptionWords):
    """Turn a folder of skins into training data: pictures, hints, captions, boxes of labels."""

    skins: Positional[Path]
    """Folder of skins: finished pictures, and folders of element images to compose."""
    out: Positional[Path]
    """The folder to write."""
    hint: LayoutHint = "edges"
    """Conditioning picture, from the layout: outlines of keys (`edges`), labels too (`glyphs`)."""
    shared_hint: bool = False
    """Write one conditioning picture that all rows name, not one for each."""
    text: bool = True
    """Draw the labels on skins that carry none."""
    picture_texts: PictureTexts = "unknown"
    """Text of finished pictures: `layout` (its labels, where it has them), `none`, or `unknown`:
    boxes without texts in the middle of keys, which count nothing in the loss."""
    incomplete: bool = False
    """Keep skins that lack parts of the layout, white where they are missing."""
    caption: str = "file"
    """`file`: caption.txt in a folder of parts, NAME.txt beside a picture, else the template;
    `template`: words measured from the picture; anything else is every skin's caption."""
    image_format: ImageFormat = "png"
    """Format of the pictures: png keeps every pixel, jpg takes a tenth of the space."""


@dataclass(frozen=True, kw_only=True)
class PrepareCannyOptions(DataOptions):
    """Write pictures and their Canny edges as conditioning pictures: train.jsonl, like fill50k."""

    data: Positional[str]
    """Any data that training reads: a folder, `world:shapes`, `hf:NAME`, tar shards."""
    out: Positional[Path]
    """The folder to write."""
    low: int = 50
    """Canny's lower threshold: weaker edges count where they go on from stronger ones."""
    high: int = 80
    """Canny's upper threshold: edges from here on count by themselves."""
    size: str | None = None
    """WIDTHxHEIGHT to cut from the middle and resize to, or one number for a square; otherwise
    pictures stay as they are."""
    count: int | None = None
    """Pictures to write, the first ones; all of them otherwise."""
    image_format: ImageFormat = "png"
    """Format of the pictures: png keeps every pixel, jpg takes a tenth of the space."""


@dataclass(frozen=True, kw_only=True)
class PrepareCaptionsOptions(CaptionWords):
    """Write captions into a train.jsonl, or as NAME.txt beside pictures; run it again to go on."""

    data: Positional[Path]
    """Folder with a train.jsonl, or with pictures."""
    model: str = "template"
    """`template` (words measured from the picture), or an image-to-text model: a folder or a hub
    id such as Salesforce/blip-image-captioning-base."""
    captions: Path | None = None
    """Captions written by hand: .jsonl or .csv with the columns image and text."""
    batch_size: int = 8
    """Pictures captioned at once."""
    max_new_tokens: int = 30
    """Most tokens of a model's words."""
    device: Device = "auto"
    """Where the model runs: auto, cpu, cuda, mps."""
    overwrite: bool = False
    """Write captions that are there already anew."""


@dataclass(frozen=True, kw_only=True)
class PrepareGlyphsOptions(Options):
    """Read the texts on pictures without a layout (OCR) and draw them on their hints."""

    data: Positional[Path]
    """Folder with a train.jsonl whose rows have conditioning pictures."""
    confidence: float = 0.98
    """Least confidence of a text that is drawn; others are left out of the text loss."""
    font: Path | None = None
    """Font file of the texts; otherwise one of the system's."""
    overwrite: bool = False
    """Read pictures anew whose texts are there already."""

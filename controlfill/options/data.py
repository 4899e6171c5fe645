"""Options of commands that read pictures: data, masks, previews."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from controlfill.options.base import MASK_KINDS, Options, SpecName


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Where pictures come from, and what is masked in them."""

    ann_file: Path | None = None
    """COCO instances file; its polygons and RLEs become object masks."""
    captions_file: Path | None = None
    """COCO captions file; its captions become prompts."""
    image_column: str = "image"
    """Column (or key) of the pictures in tables and datasets."""
    conditioning_image_column: str = "conditioning_image"
    """Column of the conditioning pictures, used by `--conditioning image`."""
    caption_column: str = "text"
    """Column of the prompts."""
    max_train_samples: int | None = None
    """Use only this many pictures, the first ones."""
    shuffle_buffer: int = 1000
    """Samples of a stream (tar shards) that are mixed with each other."""
    mask_dir: Path | None = None
    """Folder of masks named like the pictures (white = fill); drawn fresh masks otherwise."""
    image_size: int = 512
    """Side of the square training crops, in pixels."""
    crop: Literal["random", "center", "patch"] = "random"
    """Where the square is cut: of the largest one `random` or `center`; `patch` keeps the scale."""
    random_flip: bool = False
    """Mirror half of the pictures, with their masks."""
    mask_kinds: tuple[str, ...] = MASK_KINDS
    """Kinds of masks drawn, each with an optional weight: `strokes=2 object border=0.5`."""
    mask_area: tuple[float, float] = (0.1, 0.3)
    """Smallest and largest share of the picture that a drawn mask covers."""
    seed: int = 42
    """Seed of everything random; the same seed gives the same run."""

    @property
    def least_side(self) -> int | None:
        """The short side below which pictures must not be decoded; None: decode them whole."""
        return None if self.crop == "patch" else self.image_size


@dataclass(frozen=True, kw_only=True)
class MaskOptions(Options):
    """Draw a test mask and write it as PNG."""

    out: Positional[Path]
    """The PNG to write."""
    size: str = "512x512"
    """Width x height in pixels."""
    kind: str = "rectangle"
    """rectangle, circle, text, or any kind that training draws (strokes, noise, border, ...)."""
    area: tuple[float, float] = (0.1, 0.3)
    """Smallest and largest share of the picture that is white; full and text ignore it."""
    text: str = "fill"
    """The text of kind `text`."""
    seed: int = 42
    """Another seed draws another mask."""


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(DataOptions):
    """Show what training will see: a grid of pictures, masks, hints and prompts."""

    data: Positional[str]
    """Folder of pictures, or `world:shapes`."""
    conditioning: SpecName = "masked-image"
    """The hint to show."""
    num_samples: int = 8
    """Rows of the grid."""
    output: Path = Path("data_sample.png")
    """The picture to write."""

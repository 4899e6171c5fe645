"""Procedural skins: palettes, grounds and key shapes drawn from a seed, with words for them."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
from PIL import ImageFont

from controlfill.files import write_whole
from controlfill.images import save_image
from controlfill.skins.draw import draw_labels, rounded
from controlfill.skins.layout import Layout, Size

HUES = {
    "red": 0.0, "orange": 0.08, "yellow": 0.15, "green": 0.33, "teal": 0.48, "blue": 0.6,
    "violet": 0.75, "pink": 0.9,
}  # fmt: skip
# Shares of a key's shorter side.
SHAPES = {"square": 0.02, "rounded": 0.14, "pill": 0.45}
# How far the brightness of keys lies from that of their ground, of 1.
CONTRASTS = {"soft": 0.12, "clear": 0.25, "bold": 0.45}
FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono-Bold.ttf", "DejaVuSansCondensed.ttf", "LiberationSans-Regular.ttf",
    "LiberationSerif-Bold.ttf", "Arial.ttf", "Verdana.ttf",
)  # fmt: skip
Picture = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Theme:
    """How a skin looks, in words: its ground, its keys, and how far they differ."""

    ground: str
    hue: str
    key_hue: str
    shape: str
    contrast: str
    dark: bool
    seed: int

    @property
    def caption(self) -> str:
        """The theme as a prompt."""
        tone = "dark" if self.dark else "light"
        return (
            f"a keyboard skin of {tone} {self.hue} {self.ground} ground and {self.contrast} "
            f"{self.shape} {self.key_hue} keys"
        )


@dataclass(frozen=True, kw_only=True)
class Skin:
    """A drawn skin: `image` with labels, `bare` without, uint8 (H, W, 3), and its theme."""

    image: Picture
    bare: Picture
    theme: Theme


def draw_theme(seed: int, held_out: bool = False) -> Theme:
    """The theme that belongs to a seed; `held_out` ones have words that no other theme has."""
    themes = (draw_any(np.random.default_rng([seed, 77, turn]), seed) for turn in count())
    return next(theme for theme in themes if is_held_out(theme) == held_out)


def is_held_out(theme: Theme) -> bool:
    """Whether a theme is one of the eighth that is kept for measuring."""
    return crc32(theme.caption.encode()) % 8 == 0


def draw_font(seed: int) -> Path | None:
    """The font of a seed, one of those that the system has; None for Pillow's own."""
    there = fonts()
    return there[int(np.random.default_rng([seed, 79]).integers(len(there)))] if there else None


@lru_cache
def fonts() -> tuple[Path, ...]:
    """Those of `FONTS` that are installed."""
    return tuple(Path(name) for name in FONTS if is_installed(name))


def is_installed(name: str) -> bool:
    """Whether the system has a font file called `name`."""
    try:
        ImageFont.truetype(name, 12)
    except OSError:
        return False
    return True


def draw_any(rng: np.random.Generator, seed: int) -> Theme:
    """A theme of any words."""
    hues = rng.choice(list(HUES), 2)
    return Theme(
        ground=str(rng.choice(list(GROUNDS))), hue=str(hues[0]), key_hue=str(hues[1]),
        shape=str(rng.choice(list(SHAPES))), contrast=str(rng.choice(list(CONTRASTS))),
        dark=bool(rng.random() < 0.5), seed=seed,
    )  # fmt: skip


def draw_skin(theme: Theme, layout: Layout, font: Path | None = None) -> Skin:
    """The skin of a theme on the canvas of `layout`. Raises UserError for signs without a font."""
    value = brightness(theme)
    canvas = GROUNDS[theme.ground](theme, layout.size, value)
    for slot in layout.slots:
        here = slot.box.of(canvas)
        shade = value + (0.05 if slot.role == "region" else CONTRASTS[theme.contrast]) * toward(
            value
        )
        if slot.role == "region":
            here[:] = mix(here, colour(theme.hue, shade), 0.35)
            continue
        shade += 0.08 * toward(value) * (slot.role == "function")
        radius = round(SHAPES[theme.shape] * min(slot.box.size))
        inside = rounded(slot.box.size, radius)
        here[inside] = mix(here, colour(theme.key_hue, shade), 0.92)[inside]
    return Skin(image=draw_labels(canvas, layout, font), bare=canvas, theme=theme)


def brightness(theme: Theme) -> float:
    """That of the ground, of 1."""
    return 0.3 if theme.dark else 0.82


def toward(value: float) -> int:
    """The direction in which there is more room for contrast."""
    return 1 if value < 0.5 else -1


def colour(hue: str, value: float) -> np.ndarray:
    """The RGB bytes of a hue at a brightness, as floats."""
    return np.array(colorsys.hsv_to_rgb(HUES[hue], 0.55, float(np.clip(value, 0, 1)))) * 255


def mix(under: Picture, over: np.ndarray, share: float) -> Picture:
    """`share` of `over` on the rest of `under`."""
    return np.rint(under * (1 - share) + over * share).astype(np.uint8)


def plain(theme: Theme, size: Size, value: float) -> Picture:
    """One colour."""
    return np.rint(np.broadcast_to(colour(theme.hue, value), (*size, 3))).astype(np.uint8)


def graded(theme: Theme, size: Size, value: float) -> Picture:
    """From one brightness above to another below."""
    down = np.linspace(0, 1, size[0])[:, None, None]
    ends = colour(theme.hue, value), colour(theme.hue, value + 0.15 * toward(value))
    return np.rint((ends[0] * (1 - down) + ends[1] * down).repeat(size[1], 1)).astype(np.uint8)


def striped(theme: Theme, size: Size, value: float) -> Picture:
    """Slanted stripes, softly."""
    rows, columns = np.indices(size)
    wave = 0.5 + 0.5 * np.sign(np.sin((rows + columns) * 2 * np.pi / (size[0] / 8)))
    ends = colour(theme.hue, value), colour(theme.hue, value + 0.06 * toward(value))
    return np.rint(ends[0] * (1 - wave[..., None]) + ends[1] * wave[..., None]).astype(np.uint8)


def cloudy(theme: Theme, size: Size, value: float) -> Picture:
    """Large soft blotches."""
    rng = np.random.default_rng([theme.seed, 78])
    coarse = rng.random((6, 8)).astype(np.float32)
    wave = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)[..., None].clip(0, 1)
    ends = colour(theme.hue, value), colour(theme.hue, value + 0.1 * toward(value))
    return np.rint(ends[0] * (1 - wave) + ends[1] * wave).astype(np.uint8)


def write_part_set(theme: Theme, layout: Layout, folder: Path) -> None:
    """The element images of a theme, one for each part of `layout`, as skins are made of."""
    bare = draw_skin(theme, layout).bare
    ground = GROUNDS[theme.ground](theme, layout.size, brightness(theme))
    for slot in {slot.part: slot for slot in layout.slots}.values():
        if slot.role == "region":
            save_image(folder / f"{slot.part}.png", slot.box.of(ground))
            continue
        inside = rounded(slot.box.size, round(SHAPES[theme.shape] * min(slot.box.size)))
        save_image(folder / f"{slot.part}.png", slot.box.of(bare), inside.astype(np.uint8) * 255)
    write_whole(folder / "caption.txt", f"{theme.caption}\n".encode())


GROUNDS: dict[str, Callable[[Theme, Size, float], Picture]] = {
    "plain": plain,
    "graded": graded,
    "striped": striped,
    "cloudy": cloudy,
}

"""Themes for fcitx5-android: a picture of the whole keyboard, and 21 colours of what is on it.

The app draws keys and labels itself, at places of its own, with or without borders. So the picture
is the skin without its keys, and what the app draws has their colours. It unpacks all of an archive
and reads the one .json; the skin and its layout travel beside it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

import numpy as np

from controlfill.errors import UserError
from controlfill.files import write_whole
from controlfill.images import png_bytes
from controlfill.skins.archive import (
    OWN,
    Colour,
    Files,
    Tones,
    dump,
    find_rows,
    ground_of,
    layout_words,
    open_files,
    own_layout,
    own_skin,
    theme_name,
    tones_of,
    zipped,
)
from controlfill.skins.draw import check_size
from controlfill.skins.layout import Layout
from controlfill.skins.schema import BUILT_IN, check_fcitx5

SUFFIX, VERSION, SKIN = ".fcitx5.zip", "2.1", "skin.png"
# What texts are written in.
DARK, LIGHT = (24, 24, 28), (245, 245, 245)
# Opacities of 255: of keys over the picture where texts are read on both, and where they aren't; of
# lesser text, of lines, of a key that is held down.
FIRM, VEIL, LESSER, FAINT, HELD, SOLID = 0xE0, 0x4C, 0xC9, 0x1F, 0x33, 0xFF
# The contrast at which texts are read.
ENOUGH = 4


def export_fcitx5(image: np.ndarray, layout: Layout, out: Path, labels: bool = True) -> Path:
    """Write a skin (H, W, 3) without text as a theme that fcitx5-android imports.

    Raises UserError for layouts whose keys form no rows of one panel, for names of themes that the
    app has itself, and without `labels`, since the app always writes them.
    """
    check_size(image, layout)
    name = theme_name(out, SUFFIX)
    if not labels:
        raise UserError("fcitx5-android writes its own labels on any skin; one without text fits")
    if name in BUILT_IN:
        raise UserError(f"fcitx5-android has a theme called {name} itself; name {out} otherwise")
    tones = tones_of(image, layout, find_rows(layout)[0])
    picture, ground = picture_id(image), png_bytes(ground_of(image, layout))
    theme = {
        "name": name, "isDark": text_on(*grounds_of(tones, veil_of(tones))) == LIGHT,
        "backgroundImage": {
            "croppedFilePath": f"{picture}-cropped.png", "srcFilePath": f"{picture}-src.png",
            "brightness": 100, "cropRotation": 0,
            "cropRect": {"bottom": layout.size[0], "left": 0, "right": layout.size[1], "top": 0},
        },
        **make_colours(tones), "version": VERSION,
    }  # fmt: skip
    files = {
        f"{name}.json": json.dumps(theme, indent=2, ensure_ascii=False).encode(),
        f"{picture}-cropped.png": ground, f"{picture}-src.png": ground,
        SKIN: png_bytes(image), OWN: dump(layout_words(layout)),
    }  # fmt: skip
    write_whole(out, zipped(files))
    return out


def picture_id(image: np.ndarray) -> uuid.UUID:
    """The name of a picture: the same pixels always have the same one."""
    pixels = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{image.shape} {pixels}")


def make_colours(tones: Tones) -> dict[str, int]:
    """The 21 colours of a theme, from the medians of a skin."""
    veil = veil_of(tones)
    text, above = text_on(*grounds_of(tones, veil)), text_on(tones.bar)
    enter, bubble = text_on(tones.enter), text_on(tones.key)
    return {
        "backgroundColor": argb(tones.ground), "barColor": argb(tones.bar, VEIL),
        "keyboardColor": argb(tones.ground, 0),
        "keyBackgroundColor": argb(tones.key, veil), "keyTextColor": argb(text),
        "candidateTextColor": argb(above), "candidateLabelColor": argb(above),
        "candidateCommentColor": argb(above, LESSER),
        "altKeyBackgroundColor": argb(tones.function, veil), "altKeyTextColor": argb(text),
        "accentKeyBackgroundColor": argb(tones.enter), "accentKeyTextColor": argb(enter),
        "keyPressHighlightColor": argb(text, HELD), "keyShadowColor": argb(tones.ground, 0),
        "popupBackgroundColor": argb(tones.key), "popupTextColor": argb(bubble),
        "spaceBarColor": argb(tones.space, veil), "dividerColor": argb(above, FAINT),
        "clipboardEntryColor": argb(tones.key, veil),
        "genericActiveBackgroundColor": argb(tones.enter),
        "genericActiveForegroundColor": argb(enter),
    }  # fmt: skip


def veil_of(tones: Tones) -> int:
    """How opaque keys are: as far as one text is read on them, and beside them."""
    grounds = grounds_of(tones, FIRM)
    text = text_on(*grounds)
    return FIRM if min(contrast(text, ground) for ground in grounds) >= ENOUGH else VEIL


def grounds_of(tones: Tones, veil: int) -> tuple[Colour, ...]:
    """What lies under the texts of keys: the ground, as keys may have no borders, or keys on it."""
    kinds = tones.key, tones.function, tones.space
    return tones.ground, *(over(kind, tones.ground, veil) for kind in kinds)


def over(colour: Colour, ground: Colour, veil: int) -> Colour:
    """What is seen of a `veil` of `colour` on `ground`."""
    share = veil / 255
    red, green, blue = (
        round(c * share + g * (1 - share)) for c, g in zip(colour, ground, strict=True)
    )
    return red, green, blue


def text_on(*grounds: Colour) -> Colour:
    """Dark or light, whichever stands out more from that of `grounds` on which it does least."""
    return max(DARK, LIGHT, key=lambda ink: min(contrast(ink, ground) for ground in grounds))


def contrast(one: Colour, other: Colour) -> float:
    """The contrast of two sRGB colours, from 1 to 21 (WCAG 2.1, contrast ratio)."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: Colour) -> float:
    """The relative luminance of an sRGB colour, of 1 (WCAG 2.1)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def argb(colour: Colour, opacity: int = SOLID) -> int:
    """A colour as 32 bits with a sign, as Java counts."""
    red, green, blue = colour
    return int.from_bytes(bytes([opacity, red, green, blue]), "big", signed=True)


def open_fcitx5(path: Path) -> tuple[Layout, np.ndarray]:
    """The layout and the skin (H, W, 3) of a theme that was written here. Raises UserError."""
    return read_fcitx5(open_files(path), path)


def read_fcitx5(files: Files, where: Path) -> tuple[Layout, np.ndarray]:
    """The same of the files of a theme."""
    if OWN not in files:
        raise UserError(f"{where} holds a picture but no layout ({OWN}), so no keys either")
    check_fcitx5(files, where)
    layout = own_layout(files, OWN, where)
    return layout, own_skin(files, SKIN, layout.size, where)

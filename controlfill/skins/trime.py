"""Themes for Trime, the Rime input method on Android: written, checked and opened again.

A theme is NAME.trime.yaml beside backgrounds/NAME, a folder of pictures, both in Rime's user
folder. Each key shows its tile of the skin, and the same tile darkened while it is held down. The
layout travels in the folder of pictures. Field names follow the app's own trime.yaml, version 3.0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from controlfill.errors import UserError
from controlfill.files import check_empty, write_folder, write_whole
from controlfill.images import png_bytes
from controlfill.skins.archive import (
    OWN,
    POINTS,
    Colour,
    Files,
    as_hex,
    dump,
    find_rows,
    ground_of,
    ink_on,
    label_size,
    layout_words,
    open_files,
    own_layout,
    own_skin,
    place_tiles,
    press_keys,
    preview,
    theme_name,
    tones_of,
    zipped,
)
from controlfill.skins.compose import pressed
from controlfill.skins.draw import check_size, readable_on
from controlfill.skins.layout import Box, Layout, Slot
from controlfill.skins.schema import FOLDER, check_trime

SUFFIX, SKIN = ".trime.zip", "board"
# Heights in dp: of the bar of a layout that has none, and at most of keys on a phone held sideways.
BAR, SIDEWAYS = 40, 200
CLEAR = "0x00000000"


def export_trime(image: np.ndarray, layout: Layout, out: Path, labels: bool = True) -> Path:
    """Write a skin (H, W, 3), as large as `layout`, as a theme that Trime installs.

    `out` is an archive to unpack into Rime's user folder, or, without a suffix, a new folder of
    the same files. With `labels` Trime writes them, on a skin without text. Raises UserError for
    layouts whose keys form no rows of one panel.
    """
    check_size(image, layout)
    if out.suffix not in ("", ".zip"):
        raise UserError(f"{out} is no name of a Trime theme; NAME{SUFFIX} or a folder would be")
    files = make_files(image, layout, theme_name(out, SUFFIX), labels)
    if out.suffix:
        write_whole(out, zipped(files))
        return out
    check_empty(out, "theme")
    with write_folder(out) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return out


def make_files(image: np.ndarray, layout: Layout, name: str, labels: bool) -> Files:
    """All files of a theme by their names."""
    panel, rows = find_rows(layout)
    tiles = place_tiles(layout, panel, rows)
    keys = make_keys(image, layout, rows, tiles)
    pictures = {
        **tile_pictures(image, layout, tiles), SKIN: image, "ground": ground_of(image, layout),
        "bar": image[: max(1, panel.box.top)], "preview": preview(image, layout, labels),
    }  # fmt: skip
    theme = {
        "config_version": "3.0", "name": name, "author": "controlfill",
        "style": make_style(layout, panel, name),
        "preset_color_schemes": {"default": make_colours(image, layout, panel, labels)},
        "preset_keys": make_presets(layout),
        "preset_keyboards": {
            "default": {
                "name": name, "ascii_mode": 0, "lock": True, "width": 10,
                "keys": keys if labels else [without_label(key) for key in keys],
            },
            **OTHERS,
        },
    }  # fmt: skip
    folder = f"{FOLDER}/{name}"
    return {
        f"{name}.trime.yaml": dump(theme),
        f"{folder}/{OWN}": dump(layout_words(layout)),
        **{f"{folder}/{word}.png": png_bytes(picture) for word, picture in pictures.items()},
    }


def tile_pictures(
    image: np.ndarray, layout: Layout, tiles: dict[str, Box]
) -> dict[str, np.ndarray]:
    """The pictures of all keys, as they are and as they look while held down."""
    named, held = name_pictures(list(tiles)), press_keys(image, layout)
    free = {named[key]: tile.of(image) for key, tile in tiles.items()}
    return free | {f"{named[key]}-pressed": tile.of(held) for key, tile in tiles.items()}


def name_pictures(keys: list[str]) -> dict[str, str]:
    """A name for the picture of each key: plain letters, and no two alike in any file system."""
    named: dict[str, str] = {}
    taken: set[str] = set()
    for number, key in enumerate(keys):
        plain = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
        name = f"key-{plain}" if plain else f"key-{number}"
        if taken & {name, f"{name}-pressed"}:
            name += f"-{number}"
        taken |= {name, f"{name}-pressed"}
        named[key] = name
    return named


def shares(rows: list[list[Slot]], tiles: dict[str, Box], width: int) -> list[float]:
    """The widths of all keys in percent of the keyboard; as decimals each row adds up to 100."""
    found = []
    for row in rows:
        edges = [round(100 * tiles[key.name].right / width, 4) for key in row]
        found += [round(b - a, 4) for a, b in zip([0.0, *edges], edges, strict=False)]
    return found


def make_keys(
    image: np.ndarray, layout: Layout, rows: list[list[Slot]], tiles: dict[str, Box]
) -> list[dict[str, Any]]:
    """All keys, row by row, with their labels."""
    named, scale = name_pictures(list(tiles)), POINTS / layout.size[1]
    widths = shares(rows, tiles, layout.size[1])
    keys = [key for row in rows for key in row]
    return [
        {**make_key(image, key, tiles[key.name], named[key.name], scale), "width": width}
        for key, width in zip(keys, widths, strict=True)
    ]


def make_key(image: np.ndarray, key: Slot, tile: Box, picture: str, scale: float) -> dict[str, Any]:
    """One key and its label, at `scale` points per pixel."""
    ink = as_colour(readable_on(key.box.inset(0.15).of(image)))
    words = {
        "click": click_of(key), "height": tile.size[0],
        "key_back_color": f"{picture}.png", "hilited_key_back_color": f"{picture}-pressed.png",
        "key_text_color": ink, "hilited_key_text_color": ink,
    }  # fmt: skip
    if not key.label:
        return words
    # Trime writes in the middle of the tile, whose margins are not alike at the borders.
    right, down = (a - b for a, b in zip(key.box.middle, tile.middle, strict=True))
    label = {
        "label": key.label, "key_text_size": label_size(key, scale),
        "key_text_offset_x": round(right * scale, 2), "key_text_offset_y": round(down * scale, 2),
    }  # fmt: skip
    return {**words, **label}


def without_label(key: dict[str, Any]) -> dict[str, Any]:
    """A key whose text is not seen: without a label of its own Trime would write another one."""
    kept = {word: value for word, value in key.items() if not word.startswith(("label", "key_te"))}
    return {**kept, "key_text_color": CLEAR, "hilited_key_text_color": CLEAR}


def click_of(key: Slot) -> str:
    """What Trime does when a key is pressed: a preset by its name, or the sign that it types."""
    if key.name in CLICKS or len(key.name) == 1:
        return CLICKS.get(key.name, key.name)
    # Signs such as / and + mean something in names, their numbers don't.
    return "-".join(["type", *(f"{ord(s):x}" for s in key.name)]) if key.label else "VoidSymbol"


def make_presets(layout: Layout) -> dict[str, dict[str, Any]]:
    """What the keys do, by the names that they call it; labelled as the layout labels them."""
    presets = dict(PRESETS)
    for key in layout.keys:
        click = click_of(key)
        if click in PRESETS:
            label = key.label or PRESETS[click]["label"]
            states = {"states": [label, label]} if "toggle" in PRESETS[click] else {}
            presets[click] = {**PRESETS[click], "label": label, **states}
        elif click.startswith("type-"):
            presets[click] = {"label": key.label, "commit": key.label}
    return presets


def make_style(layout: Layout, panel: Slot, name: str) -> dict[str, Any]:
    """Measures in dp, of a phone that is as wide as the layout, and where the pictures are."""
    scale = POINTS / layout.size[1]
    height = max(1, round(panel.box.size[0] * scale))
    bar = round(panel.box.top * scale) or BAR
    return {
        "background_folder": name,
        "candidate_view_height": bar, "comment_height": 0,
        "candidate_text_size": 18, "comment_text_size": 12, "candidate_padding": 6,
        "keyboard_height": height, "keyboard_height_land": min(height, SIDEWAYS),
        "key_width": 10, "key_height": 50, "key_text_size": 18, "key_long_text_size": 14,
        "symbol_text_size": 10, "label_text_size": 16,
        "horizontal_gap": 0, "vertical_gap": 0, "keyboard_padding": 0,
        "key_border": 0, "round_corner": 0, "shadow_radius": 0,
    }  # fmt: skip


def make_colours(image: np.ndarray, layout: Layout, panel: Slot, labels: bool) -> dict[str, str]:
    """The colour scheme: the skin's own medians, and the pictures of what is no key."""
    tones = tones_of(image, layout, panel)
    held = pressed(np.array(tones.key))
    over, bar, lit = as_colour(ink_on(tones.key)), as_colour(ink_on(tones.bar)), as_colour(held)
    fills = {
        "back_color": tones.bar, "border_color": tones.bar, "text_back_color": tones.bar,
        "candidate_separator_color": tones.bar, "hilited_back_color": tones.key,
        "hilited_candidate_back_color": tones.key, "keyboard_back_color": tones.ground,
        "key_back_color": tones.key, "off_key_back_color": tones.function,
        "key_border_color": tones.ground, "popup_back_color": tones.key,
        "long_text_back_color": tones.key, "shadow_color": tones.ground,
    }  # fmt: skip
    inks = {
        **dict.fromkeys(("text_color", "candidate_text_color", "comment_text_color",
                         "label_color"), bar),
        **dict.fromkeys(("hilited_text_color", "hilited_candidate_text_color",
                         "hilited_comment_text_color", "hilited_label_color", "key_text_color",
                         "key_symbol_color", "hilited_key_text_color", "hilited_key_symbol_color",
                         "popup_text_color", "hilited_popup_text_color", "long_text_color"), over),
        **dict.fromkeys(("hilited_key_back_color", "hilited_popup_back_color"), lit),
    }  # fmt: skip
    grounds = {"root_background": "ground.png", "keyboard_background": "ground.png",
               "candidate_background": "bar.png"}  # fmt: skip
    scheme = {"name": "default", **{word: as_colour(c) for word, c in fills.items()}, **inks}
    return {**scheme, **grounds, **shifted(image, layout, labels)}


def shifted(image: np.ndarray, layout: Layout, labels: bool) -> dict[str, str]:
    """How a shift key looks while it is on, the only key of a keyboard that stays so."""
    named = name_pictures([key.name for row in find_rows(layout)[1] for key in row])
    found = [key for key in layout.keys if click_of(key) == "Shift_L"]
    if not found:
        return {}
    ink = as_colour(readable_on(found[0].box.inset(0.15).of(image))) if labels else CLEAR
    held = f"{named[found[0].name]}-pressed.png"
    return {"on_key_back_color": held, "hilited_on_key_back_color": held,
            "on_key_text_color": ink, "hilited_on_key_text_color": ink}  # fmt: skip


def as_colour(colour: Colour | np.ndarray) -> str:
    """An RGB colour as Trime writes it."""
    return as_hex(colour, "0x")


def open_trime(path: Path) -> tuple[Layout, np.ndarray]:
    """The layout and the skin (H, W, 3) of a theme that was written here. Raises UserError."""
    return read_trime(open_files(path), path)


def read_trime(files: Files, where: Path) -> tuple[Layout, np.ndarray]:
    """The same of the files of a theme."""
    if not any(name.startswith(f"{FOLDER}/") and name.endswith(f"/{OWN}") for name in files):
        raise UserError(f"{where} holds no {OWN}; only themes that controlfill wrote are opened")
    folder = check_trime(files, where)
    layout = own_layout(files, f"{folder}/{OWN}", where)
    return layout, own_skin(files, f"{folder}/{SKIN}.png", layout.size, where)


CLICKS = {
    "shift": "Shift_L", "delete": "BackSpace", "space": "space", "enter": "Return",
    "numbers": "Keyboard_number", "symbols": "Keyboard_symbols", "language": "Mode_switch",
    "clear": "Escape", "comma": ",", "period": ".", "question": "?",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "Shift_L": {"label": "SHIFT", "send": "Shift_L", "shift_lock": "ascii_long"},
    "BackSpace": {"label": "DEL", "send": "BackSpace", "repeatable": True},
    "Return": {"label": "ENTER", "send": "Return"},
    "space": {"label": "SPACE", "send": "space"},
    "Escape": {"label": "ESC", "send": "Escape"},
    "Mode_switch": {"label": "EN", "send": "Mode_switch", "toggle": "ascii_mode",
                    "states": ["EN", "EN"]},
    "Keyboard_number": {"label": "123", "send": "Eisu_toggle", "select": "number"},
    "Keyboard_symbols": {"label": "#+=", "send": "Eisu_toggle", "select": "symbols"},
    "Keyboard_default": {"label": "ABC", "send": "Eisu_toggle", "select": ".default"},
    "VoidSymbol": {"label": "", "send": "VoidSymbol"},
}  # fmt: skip
# Keyboards that the keys lead to, plain ones in the skin's colours.
OTHERS: dict[str, dict[str, Any]] = {
    "number": {
        "name": "123", "ascii_mode": 1, "width": 20, "key_border": 1,
        "keys": [{"click": click} for click in (
            *"+123", "BackSpace", *"-456", ".", *"*789", ",",
            "Keyboard_default", "0", "space", "/", "Return",
        )],
    },
    "symbols": {
        "name": "#+=", "ascii_mode": 1, "width": 10, "key_border": 1,
        "keys": [
            *({"click": click} for click in "1234567890@#$%&*-+()!\"':;/?~_="),
            {"click": "Keyboard_default", "width": 20}, {"click": "Keyboard_number", "width": 15},
            {"click": "space", "width": 30}, {"click": "BackSpace", "width": 15},
            {"click": "Return", "width": 20},
        ],
    },
}  # fmt: skip

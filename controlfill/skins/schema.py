"""What a theme for Trime and one for fcitx5-android must hold, read from the apps' own sources.

Each check says the first fault of a theme in one line. They know nothing of how themes are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from controlfill.errors import UserError
from controlfill.skins.archive import Files, Text, as_shape, picture_size, read_yaml

FOLDER = "backgrounds"
IMAGES = (".png", ".webp", ".jpg", ".gif")
TALLEST = 2000


@dataclass(frozen=True, kw_only=True)
class TrimeTheme:
    """A theme file of Trime."""

    config_version: str
    name: str
    style: dict[str, Any]
    preset_color_schemes: dict[str, dict[str, str]]
    preset_keys: dict[str, dict[str, Any]]
    preset_keyboards: dict[str, dict[str, Any]]
    author: str = ""


@dataclass(frozen=True, kw_only=True)
class TrimeStyle:
    """The measures of its keyboards, in dp and sp, and the folder of its pictures."""

    background_folder: str
    keyboard_height: int
    keyboard_height_land: int
    candidate_view_height: int
    comment_height: int
    key_height: int
    key_width: float
    key_text_size: float
    key_long_text_size: float
    symbol_text_size: float
    label_text_size: float
    candidate_text_size: float
    comment_text_size: float
    candidate_padding: int
    horizontal_gap: int
    vertical_gap: int
    keyboard_padding: int
    key_border: int
    round_corner: float
    shadow_radius: float


@dataclass(frozen=True, kw_only=True)
class TrimePreset:
    """What a key does, by a name."""

    label: str = ""
    send: str = ""
    select: str = ""
    toggle: str = ""
    states: tuple[str, str] = ("", "")
    commit: str = ""
    text: str = ""
    shift_lock: Literal["", "long", "click", "ascii_long"] = ""
    repeatable: bool = False


@dataclass(frozen=True, kw_only=True)
class TrimeKeyboard:
    """One keyboard; the widths are percents of it."""

    name: str
    keys: list[dict[str, Any]]
    width: float
    ascii_mode: int = 1
    lock: bool = False
    key_border: int = 0


@dataclass(frozen=True, kw_only=True)
class TrimeKey:
    """One key."""

    click: str
    width: float = 0
    height: int = 0
    label: str = ""
    key_text_size: float = 0
    key_text_offset_x: float = 0
    key_text_offset_y: float = 0
    key_text_color: str = ""
    key_back_color: str = ""
    hilited_key_text_color: str = ""
    hilited_key_back_color: str = ""


def check_trime(files: Files, where: Path) -> str:
    """The folder of a theme's pictures. Raises UserError that names the first fault."""
    names = [name for name in files if name.endswith(".trime.yaml") and "/" not in name]
    if len(names) != 1:
        raise UserError(f"{where} holds {len(names)} files NAME.trime.yaml; a theme has one")
    said = f"{where}/{names[0]}"
    theme: TrimeTheme = as_shape(TrimeTheme, read_yaml(files[names[0]], said, Text), said)
    style: TrimeStyle = as_shape(TrimeStyle, theme.style, f"{said}: style")
    check_heights(style, said)
    folder = f"{FOLDER}/{style.background_folder}"
    for part, wanted in (("preset_color_schemes", "default"), ("preset_keyboards", "default")):
        if wanted not in getattr(theme, part):
            raise UserError(f"{said}: {part} has no {wanted!r}, which Trime starts with")
    for name, words in theme.preset_keys.items():
        check_preset(theme, words, f"{said}: preset_keys: {name}")
    for name, words in theme.preset_keyboards.items():
        check_keyboard(theme, words, f"{said}: keyboard {name}")
    for value, at in theme_colours(theme, said):
        check_colour(files, folder, value, at)
    return folder


def check_heights(style: TrimeStyle, said: str) -> None:
    """Raise UserError for a keyboard of no height, or a far too large one."""
    for word in ("keyboard_height", "keyboard_height_land", "candidate_view_height", "key_height"):
        if not 1 <= getattr(style, word) <= TALLEST:
            raise UserError(
                f"{said}: style: {word} is {getattr(style, word)}; it lies between 1 and {TALLEST}"
            )


def theme_colours(theme: TrimeTheme, said: str) -> Iterator[tuple[str, str]]:
    """All colours and pictures that a theme names, each with where it does."""
    for name, scheme in theme.preset_color_schemes.items():
        for word, value in scheme.items():
            if word not in ("name", "author"):
                yield value, f"{said}: colour scheme {name}: {word}"
    for name, keyboard in theme.preset_keyboards.items():
        for number, key in enumerate(keyboard["keys"]):
            for word in key:
                if word.endswith("_color"):
                    yield key[word], f"{said}: keyboard {name}: key {number + 1}: {word}"


def check_colour(files: Files, folder: str, value: str, said: str) -> None:
    """Raise UserError unless `value` is a colour, or names a picture of the theme."""
    if not value.endswith(IMAGES):
        if not re.fullmatch(r"(0x|#)([0-9a-fA-F]{6}|[0-9a-fA-F]{8})", value):
            raise UserError(f"{said}: {value!r} is no colour; 0xRRGGBB or 0xAARRGGBB would be")
        return
    if f"{folder}/{value}" not in files:
        raise UserError(f"{said}: there is no picture {folder}/{value}")
    picture_size(files[f"{folder}/{value}"], f"{said}: {value}")


def check_preset(theme: TrimeTheme, words: dict[str, Any], said: str) -> None:
    """Raise UserError for what no key can do."""
    preset: TrimePreset = as_shape(TrimePreset, words, said)
    if not (preset.send or preset.commit or preset.text):
        raise UserError(f"{said}: it does nothing; send, commit or text say what")
    if preset.select and preset.select[0] != "." and preset.select not in theme.preset_keyboards:
        raise UserError(f"{said}: there is no keyboard {preset.select!r} to select")


def check_keyboard(theme: TrimeTheme, words: dict[str, Any], said: str) -> None:
    """Raise UserError for keys that Trime does not know, and for rows that are not 100 wide."""
    keyboard: TrimeKeyboard = as_shape(TrimeKeyboard, words, said)
    row, number = Decimal(0), 1
    for at, key_words in enumerate(keyboard.keys):
        key: TrimeKey = as_shape(TrimeKey, key_words, f"{said}: key {at + 1}")
        if len(key.click) != 1 and key.click not in theme.preset_keys:
            raise UserError(f"{said}: key {at + 1}: {key.click!r} is no sign and no preset key")
        width = key.width or keyboard.width
        if not 0 < width <= 100 or not 0 <= key.height <= TALLEST:
            raise UserError(f"{said}: key {at + 1}: {width} x {key.height} is no size of a key")
        # As decimals, as they are written: binary fractions would not add up.
        row += Decimal(str(width))
        if row > 100:
            break
        row, number = (Decimal(0), number + 1) if row == 100 else (row, number)
    if row:
        raise UserError(f"{said}: row {number} is {row} wide; each row's widths add up to 100")


COLOURS = (
    "backgroundColor", "barColor", "keyboardColor", "keyBackgroundColor", "keyTextColor",
    "candidateTextColor", "candidateLabelColor", "candidateCommentColor", "altKeyBackgroundColor",
    "altKeyTextColor", "accentKeyBackgroundColor", "accentKeyTextColor", "keyPressHighlightColor",
    "keyShadowColor", "popupBackgroundColor", "popupTextColor", "spaceBarColor", "dividerColor",
    "clipboardEntryColor", "genericActiveBackgroundColor", "genericActiveForegroundColor",
)  # fmt: skip
FIELDS = {"name", "isDark", "backgroundImage", "version", *COLOURS}
# The app has themes of these names and refuses others that are called so.
BUILT_IN = (
    "MaterialLight", "MaterialDark", "PixelLight", "PixelDark", "NordLight", "NordDark",
    "DeepBlue", "Monokai", "AMOLEDBlack",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fcitx5Picture:
    """The picture behind the keys of a theme for fcitx5-android."""

    croppedFilePath: str  # noqa: N815  (the format's own names)
    srcFilePath: str  # noqa: N815
    brightness: int
    cropRect: dict[str, int]  # noqa: N815
    cropRotation: int  # noqa: N815


def check_fcitx5(files: Files, where: Path) -> Fcitx5Picture:
    """What a theme says of its picture. Raises UserError that names the first fault."""
    names = [name for name in files if name.endswith(".json") and "/" not in name]
    if len(names) != 1:
        raise UserError(f"{where} holds {len(names)} files NAME.json; a theme has one")
    said = f"{where}/{names[0]}"
    words = read_json_words(files[names[0]], said)
    check_fields(words, said)
    if f"{words['name']}.json" != names[0] or words["name"] in BUILT_IN:
        raise UserError(f"{said}: name is {words['name']!r}; it is that of the file, and its own")
    if words["backgroundImage"] is None:
        raise UserError(f"{said}: backgroundImage is null; a theme with a picture is expected")
    return check_picture(files, words["backgroundImage"], where, said)


def read_json_words(data: bytes, said: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        words = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{said} is no readable JSON: {error}") from error
    if not isinstance(words, dict):
        raise UserError(f"{said} is no JSON object; names with values are expected")
    return words


def check_fields(words: dict[str, Any], said: str) -> None:
    """Raise UserError unless all fields are there, of their types, and no others."""
    lost, more = sorted(FIELDS - set(words)), sorted(set(words) - FIELDS)
    if lost:
        raise UserError(f"{said}: {lost[0]} is missing")
    if more:
        raise UserError(f"{said}: {more[0]} is no field of a theme; the app refuses it")
    if words["version"] != "2.1":
        raise UserError(f"{said}: version is {words['version']!r}; '2.1' is known here")
    if not isinstance(words["isDark"], bool) or not isinstance(words["name"], str):
        raise UserError(f"{said}: isDark is true or false, and name is a text")
    for colour in COLOURS:
        value = words[colour]
        if type(value) is not int or not -(1 << 31) <= value < 1 << 31:
            raise UserError(f"{said}: {colour} is {value!r}; an ARGB colour of 32 signed bits is")


def check_picture(files: Files, words: Any, where: Path, said: str) -> Fcitx5Picture:
    """The picture that `words` describe. Raises UserError."""
    picture: Fcitx5Picture = as_shape(Fcitx5Picture, words, f"{said}: backgroundImage")
    if not 0 <= picture.brightness <= 100:
        raise UserError(f"{said}: brightness is {picture.brightness}; it lies between 0 and 100")
    for name in (picture.croppedFilePath, picture.srcFilePath):
        if name not in files:
            raise UserError(f"{said}: there is no picture {name}")
    height, width = picture_size(files[picture.srcFilePath], f"{where}: {picture.srcFilePath}")
    rect = picture.cropRect
    if set(rect) != {"left", "top", "right", "bottom"} or not (
        0 <= rect["left"] < rect["right"] <= width and 0 <= rect["top"] < rect["bottom"] <= height
    ):
        raise UserError(f"{said}: cropRect {rect} is no part of the picture of {width}x{height}")
    picture_size(files[picture.croppedFilePath], f"{where}: {picture.croppedFilePath}")
    return picture

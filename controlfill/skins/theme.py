"""Installable themes: `.cskin` of the Yuanshu (Hamster) input method, written and opened again.

Every key's picture is its tile of the skin, up to the middle of the gaps around it, so that tiles
side by side are the skin itself. The layout travels inside, as `controlfill.yaml`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from controlfill.files import write_whole
from controlfill.images import png_bytes
from controlfill.skins.archive import (
    OWN,
    POINTS,
    Files,
    as_hex,
    dump,
    find_rows,
    label_size,
    layout_words,
    open_files,
    own_layout,
    own_skin,
    place_tiles,
    press_keys,
    preview,
    zipped,
)
from controlfill.skins.draw import check_size, readable_on
from controlfill.skins.layout import Box, Layout, Slot

BOARD, SHEET = "keyboard", "sheet"
# Height of what is being typed, in points.
PREEDIT = 25


def export_cskin(image: np.ndarray, layout: Layout, out: Path, labels: bool = True) -> Path:
    """Write a skin (H, W, 3), as large as `layout`, as a theme that Yuanshu installs.

    With `labels` the input method writes them, on a skin without text. Raises UserError for
    layouts with no panel of keys or several.
    """
    check_size(image, layout)
    panel, rows = find_rows(layout)
    tiles = place_tiles(layout, panel, rows)
    bar = Box(0, 0, layout.size[1], panel.box.top)
    files = {"config.yaml": dump(make_config()), OWN: dump(layout_words(layout)),
             "demo.png": png_bytes(preview(image, layout, labels))}  # fmt: skip
    board = dump(make_board(image, layout, panel, rows, labels))
    sheet = png_bytes(np.concatenate([image, press_keys(image, layout)]))
    index = dump(make_index(tiles, bar, layout.size[0]))
    for mode in ("light", "dark"):
        files |= {
            f"{mode}/{BOARD}.yaml": board,
            f"{mode}/resources/{SHEET}.png": sheet,
            f"{mode}/resources/{SHEET}.yaml": index,
        }
    write_whole(out, zipped(files))
    return out


def make_config() -> dict[str, Any]:
    """Which file describes the keyboard on which device."""
    phone = {"portrait": BOARD, "landscape": BOARD}
    devices = {"iPhone": phone, "iPad": {**phone, "floating": BOARD}}
    return {"pinyin": devices, "alphabetic": devices}


def make_index(tiles: dict[str, Box], bar: Box, height: int) -> dict[str, Any]:
    """Where on the sheet each picture is; those of keys held down lie `height` lower."""
    places = {"bar": bar, **tiles}
    lower = {
        f"{name}-pressed": Box(b.left, b.top + height, b.right, b.bottom + height)
        for name, b in tiles.items()
    }
    return {
        name: {"rect": {"x": b.left, "y": b.top, "width": b.size[1], "height": b.size[0]}}
        for name, b in {**places, **lower}.items()
    }


def make_board(
    image: np.ndarray, layout: Layout, panel: Slot, rows: list[list[Slot]], labels: bool
) -> dict[str, Any]:
    """The description of the keyboard: heights, rows, keys and what they do."""
    tiles, scale = place_tiles(layout, panel, rows), POINTS / layout.size[1]
    whole = panel.box.size[0]
    board: dict[str, Any] = {
        "preeditHeight": PREEDIT,
        "toolbarHeight": max(1, round(panel.box.top * scale)),
        "keyboardHeight": round(whole * scale),
        **bars(image, panel),
        "keyboardStyle": {"backgroundStyle": "plainStyle"},
        "keyboardLayout": [
            {"HStack": {"style": f"row{n}", "subviews": [{"Cell": f"{k.name}Key"} for k in row]}}
            for n, row in enumerate(rows)
        ],
    }
    for number, row in enumerate(rows):
        board[f"row{number}"] = {"size": {"height": f"{tiles[row[0].name].size[0]}/{whole}"}}
        for key in row:
            board |= key_picture(key, f"{tiles[key.name].size[1]}/{layout.size[1]}")
            if labels and key.label:
                ink = readable_on(key.box.inset(0.15).of(image))
                board |= key_label(key, tiles[key.name], scale, as_hex(ink))
                board[f"{key.name}Key"]["foregroundStyle"] = f"{key.name}Label"
    return board


def bars(image: np.ndarray, panel: Slot) -> dict[str, Any]:
    """What lies above the keys: what is being typed, and its candidates over the toolbar."""
    above = image[: max(1, panel.box.top)]
    ground, ink = as_hex(np.median(above.reshape(-1, 3), axis=0)), as_hex(readable_on(above))
    texts = ("textColor", "commentColor", "indexColor", "preferredTextColor",
             "preferredCommentColor", "preferredIndexColor")  # fmt: skip
    return {
        "preeditStyle": {"backgroundStyle": "plainStyle", "foregroundStyle": "preeditText"},
        "preeditText": {"fontSize": 14, "textColor": ink},
        "plainStyle": {"buttonStyleType": "geometry", "normalColor": ground,
                       "highlightColor": ground},
        "barStyle": {"buttonStyleType": "fileImage", "normalImage": picture("bar")},
        "toolbarStyle": {"backgroundStyle": "barStyle"},
        "horizontalCandidatesStyle": {"backgroundStyle": "barStyle"},
        "horizontalCandidatesLayout": [
            {"HStack": {"subviews": [{"Cell": "horizontalCandidates"}]}}
        ],
        "horizontalCandidates": {"type": "horizontalCandidates", "maxColumns": 7,
                                 "candidateStyle": "candidate"},
        "verticalCandidatesStyle": {"backgroundStyle": "plainStyle"},
        "verticalCandidatesLayout": [{"HStack": {"subviews": [{"Cell": "verticalCandidates"}]}}],
        "verticalCandidates": {"type": "verticalCandidates", "maxRows": 4, "maxColumns": 5,
                               "candidateStyle": "candidate"},
        "candidate": {"textFontSize": 18, "commentFontSize": 12, "indexFontSize": 12,
                      **dict.fromkeys(texts, ink)},
    }  # fmt: skip


def key_picture(key: Slot, width: str) -> dict[str, Any]:
    """The nodes of one key: what it does and its pictures."""
    name = key.name
    cell: dict[str, Any] = {
        "size": {"width": width}, "action": action_of(key), "backgroundStyle": f"{name}Picture",
    }  # fmt: skip
    if name == "delete":
        cell["repeatAction"] = "backspace"
    if len(name) == 1 and name.isalpha():
        cell["uppercasedStateAction"] = {"character": name.upper()}
    pictures = {
        "buttonStyleType": "fileImage", "normalImage": picture(name),
        "highlightImage": picture(f"{name}-pressed"),
    }  # fmt: skip
    return {f"{name}Key": cell, f"{name}Picture": pictures}


def key_label(key: Slot, tile: Box, scale: float, ink: str) -> dict[str, Any]:
    """The node of a key's label, in the middle of the key within its tile."""
    (height, width), middle = tile.size, key.box.middle
    x, y = (middle[0] - tile.left) / width, (middle[1] - tile.top) / height
    return {
        f"{key.name}Label": {
            "buttonStyleType": "text", "text": key.label, "fontSize": label_size(key, scale),
            "center": {"x": round(x, 4), "y": round(y, 4)}, "normalColor": ink,
            "highlightColor": ink,
        }
    }  # fmt: skip


def picture(name: str) -> dict[str, str]:
    """A picture of the sheet."""
    return {"file": SHEET, "image": name}


def action_of(key: Slot) -> Any:
    """What pressing a key does: by its name, or else it types its name or label."""
    if key.name in ACTIONS:
        return ACTIONS[key.name]
    return {"character": key.name if len(key.name) == 1 else key.label} if key.label else "none"


def open_cskin(file: Path) -> tuple[Layout, np.ndarray]:
    """The layout and the skin (H, W, 3) of a theme that was written here. Raises UserError."""
    return read_cskin(open_files(file), file)


def read_cskin(files: Files, where: Path) -> tuple[Layout, np.ndarray]:
    """The same of the files of a theme."""
    layout = own_layout(files, OWN, where)
    height, width = layout.size
    sheet = own_skin(files, f"light/resources/{SHEET}.png", (2 * height, width), where)
    return layout, sheet[:height]


ACTIONS: dict[str, Any] = {
    "shift": "shift", "delete": "backspace", "space": "space", "enter": "enter",
    "numbers": {"keyboardType": "numeric"}, "symbols": {"keyboardType": "symbolic"},
    "language": {"shortcut": "#中英切换"}, "clear": {"shortcut": "#重输"},
    "comma": {"character": ","}, "period": {"character": "."}, "question": {"character": "?"},
}  # fmt: skip

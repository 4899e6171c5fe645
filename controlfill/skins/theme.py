"""Installable themes: `.cskin` of the Yuanshu (Hamster) input method, written and opened again.

Every key's picture is its tile of the skin, up to the middle of the gaps around it, so that tiles
side by side are the skin itself. The layout travels inside, as `controlfill.yaml`.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from controlfill.errors import UserError
from controlfill.files import write_whole
from controlfill.images import open_image, png_bytes
from controlfill.skins.compose import pressed
from controlfill.skins.draw import check_size, draw_labels, key_masks, readable_on
from controlfill.skins.layout import Box, Layout, Slot, read_layout

OWN = "controlfill.yaml"
BOARD, SHEET = "keyboard", "sheet"
# Width of a phone in the points that the format counts in, and height of what is being typed.
POINTS, PREEDIT = 390, 25
LONGEST = 64 << 20
DATE = (2026, 1, 1, 0, 0, 0)


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
             "demo.png": png_bytes(draw_labels(image, layout) if labels else image)}  # fmt: skip
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


def find_rows(layout: Layout) -> tuple[Slot, list[list[Slot]]]:
    """The region that holds the keys, and those row by row. Raises UserError."""
    keys = [slot for slot in layout.keys if slot.role != "candidate"]
    panels = [
        region
        for region in layout.slots
        if region.role == "region" and any(key.box.inside(region.box) for key in keys)
    ]
    if len(panels) != 1:
        raise UserError(
            f"layout {layout.name} has {len(panels)} panels of keys; a .cskin takes one, as "
            "qwerty-26 and t9 have"
        )
    heights = sorted({key.box.top for key in keys})
    rows = [sorted((k for k in keys if k.box.top == h), key=lambda k: k.box.left) for h in heights]
    return panels[0], rows


def place_tiles(layout: Layout, panel: Slot, rows: list[list[Slot]]) -> dict[str, Box]:
    """The tile of each key: to the middle of gaps, and to the borders of the panel."""
    tiles = {}
    down = between([(row[0].box.top, row[0].box.bottom) for row in rows], panel.box.top,
                   panel.box.bottom)  # fmt: skip
    for row, (top, bottom) in zip(rows, down, strict=True):
        edges = [(key.box.left, key.box.right) for key in row]
        for key, (left, right) in zip(row, between(edges, 0, layout.size[1]), strict=True):
            tiles[key.name] = Box(left, top, right, bottom)
    return tiles


def between(edges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Spans from `start` to `end` that meet in the middle of the gaps of `edges`."""
    cuts = [(a[1] + b[0]) // 2 for a, b in pairwise(edges)]
    return list(zip([start, *cuts], [*cuts, end], strict=True))


def press_keys(image: np.ndarray, layout: Layout) -> np.ndarray:
    """The skin with all keys held down."""
    held = np.any(key_masks(layout.keys, layout.size), axis=0)
    return np.where(held[..., None], pressed(image), image)


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
    size = 0.4 * key.box.size[0] * scale * min(1, 4 / len(key.label))
    return {
        f"{key.name}Label": {
            "buttonStyleType": "text", "text": key.label, "fontSize": round(size, 1),
            "center": {"x": round(x, 4), "y": round(y, 4)}, "normalColor": ink,
            "highlightColor": ink,
        }
    }  # fmt: skip


def as_hex(colour: Any) -> str:
    """An RGB colour as the format writes it."""
    return "#" + bytes(int(value) for value in colour).hex().upper()


def picture(name: str) -> dict[str, str]:
    """A picture of the sheet."""
    return {"file": SHEET, "image": name}


def action_of(key: Slot) -> Any:
    """What pressing a key does: by its name, or else it types its name or label."""
    if key.name in ACTIONS:
        return ACTIONS[key.name]
    return {"character": key.name if len(key.name) == 1 else key.label} if key.label else "none"


def layout_words(layout: Layout) -> dict[str, Any]:
    """The layout as the words of a layout file, every slot with its rectangle."""
    regions = [
        {**slot_words(slot), "name": slot.name} for slot in layout.slots if slot.role == "region"
    ]
    regions[0]["keys"] = [
        {**slot_words(slot), "key": slot.name, "label": slot.label, "role": slot.role}
        for slot in layout.keys
    ]
    return {"name": layout.name, "canvas": list(layout.size[::-1]), "regions": regions}


def slot_words(slot: Slot) -> dict[str, Any]:
    """What regions and keys share."""
    box = asdict(slot.box)
    rect = [box["left"], box["top"], slot.box.size[1], slot.box.size[0]]
    return {"rect": rect, "part": slot.part, "z": slot.z, "fit": slot.fit,
            "insets": list(slot.insets)}  # fmt: skip


def open_cskin(file: Path) -> tuple[Layout, np.ndarray]:
    """The layout and the skin (H, W, 3) of a theme that was written here. Raises UserError."""
    try:
        with zipfile.ZipFile(file) as archive:
            layout = read_layout(yaml.safe_load(read_part(archive, OWN, file)), f"{file}/{OWN}")
            sheet = open_image(read_part(archive, f"light/resources/{SHEET}.png", file)).rgb
    except (OSError, zipfile.BadZipFile, yaml.YAMLError) as error:
        raise UserError(f"{file} is no .cskin: {' '.join(str(error).split())}") from error
    return layout, sheet[: layout.size[0]]


def read_part(archive: zipfile.ZipFile, name: str, file: Path) -> bytes:
    """One file of an archive. Raises UserError where it is missing or far too large."""
    if name not in archive.namelist():
        raise UserError(f"{file} holds no {name}; only themes that controlfill wrote are opened")
    if archive.getinfo(name).file_size > LONGEST:
        raise UserError(f"{file}: {name} is larger than {LONGEST >> 20} MiB")
    return archive.read(name)


def zipped(files: dict[str, bytes]) -> bytes:
    """An archive of `files`; the same ones always give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def dump(words: dict[str, Any]) -> bytes:
    """`words` as YAML without anchors."""
    text = yaml.dump(words, Dumper=Unshared, allow_unicode=True, sort_keys=False)
    return text.encode()


class Unshared(yaml.SafeDumper):
    """A dumper that writes the same thing twice, not a reference to it."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


ACTIONS: dict[str, Any] = {
    "shift": "shift", "delete": "backspace", "space": "space", "enter": "enter",
    "numbers": {"keyboardType": "numeric"}, "symbols": {"keyboardType": "symbolic"},
    "language": {"shortcut": "#中英切换"}, "clear": {"shortcut": "#重输"},
    "comma": {"character": ","}, "period": {"character": "."}, "question": {"character": "?"},
}  # fmt: skip

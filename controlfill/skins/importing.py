"""Foreign parts: pictures of keys, called as others call them, as a folder for `compose`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlfill.errors import UserError
from controlfill.files import check_empty, write_folder, write_whole
from controlfill.images import Photo, as_photo, find_pictures, resize, save_image
from controlfill.skins.archive import dump, layout_words
from controlfill.skins.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What a file name says: of what it is a picture, held down or not, at which density.

    `exact` is the name as it stands, `name` what all its synonyms have in common.
    """

    file: Path
    exact: str
    name: str
    pressed: bool
    density: int
    framed: bool


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Which picture became which part, which became none, and which slots have none."""

    folder: Path
    matched: dict[str, Path]
    spare: list[Path]
    missing: list[str]

    @property
    def reports(self) -> list[str]:
        """The same, a line for each."""
        taken = [f"{name}.png: from {file}" for name, file in self.matched.items()]
        left = [f"{file}: left over" for file in self.spare]
        return taken + left + [f"{name}: no picture is called so" for name in self.missing]


def import_parts(folder: Path, layout: Layout, out: Path) -> Imported:
    """Write the pictures below `folder` that name a part of `layout` to `out`, called as it does.

    Names may differ in case, in words such as btn and normal, and by common synonyms; pictures may
    have any format, a density such as @2x, and the frame of a .9.png, which is cut off. Raises
    UserError when none fits, or when `out` holds something.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one with the element images of a skin")
    check_empty(out, "parts")
    files = [f for f in find_pictures(folder) if not hidden(f.relative_to(folder))]
    names = known_names(layout)
    chosen: dict[str, Guess] = {}
    guesses = map(guess_part, files)
    # Of several pictures of one part that is taken which is named exactly, or else the densest.
    for guess in sorted(guesses, key=lambda g: (g.exact not in names, -g.density, str(g.file))):
        part = names.get(guess.exact) or names.get(guess.name)
        if part:
            chosen.setdefault(f"{part}-pressed" if guess.pressed else part, guess)
    if not chosen:
        wanted = ", ".join(sorted({slot.part for slot in layout.slots}))
        raise UserError(f"{folder} holds no part of layout {layout.name}; it needs {wanted}")
    with write_folder(out) as written:
        for name, guess in sorted(chosen.items()):
            photo = opened(guess, sliced(layout, name))
            save_image(written / f"{name}.png", photo.rgb, photo.alpha)
    taken = {guess.file for guess in chosen.values()}
    return Imported(
        folder=out,
        matched={name: guess.file.relative_to(folder) for name, guess in sorted(chosen.items())},
        spare=[file.relative_to(folder) for file in files if file not in taken],
        missing=[s.name for s in layout.slots if not {s.name, s.part} & set(chosen)],
    )


def write_skin(skin: np.ndarray, layout: Layout, out: Path) -> None:
    """Write a skin (H, W, 3) and its layout to `out`, all or nothing. Raises UserError."""
    check_empty(out, "skin")
    with write_folder(out) as written:
        save_image(written / "skin.png", skin)
        write_whole(written / "layout.yaml", dump(layout_words(layout)))


def hidden(file: Path) -> bool:
    """Whether a file is one that systems leave behind, such as __MACOSX/._q.png."""
    return any(part.startswith((".", "__")) for part in file.parts)


def known_names(layout: Layout) -> dict[str, str]:
    """What the slots and parts of `layout` may be called, and what they are called there.

    Slots come before the parts that they share, names before labels.
    """
    slots = [slot.name for slot in layout.slots]
    own = [*slots, *(slot.part for slot in layout.slots)]
    known = {name.lower(): name for name in reversed(own)}
    for name in own:
        known.setdefault(plain_name(words_of(name)), name)
    for slot in layout.labelled:
        known.setdefault(plain_name(words_of(slot.label)), slot.name)
    keys = [slot for slot in layout.keys if slot.role != "candidate"]
    panels = [
        s for s in layout.slots if s.role == "region" and any(k.box.inside(s.box) for k in keys)
    ]
    if panels:
        known.setdefault("background", panels[0].part)
    known.pop("", None)
    return known


def guess_part(file: Path) -> Guess:
    """What the name of a file says."""
    stem = file.stem
    framed = stem.lower().endswith(".9")
    stem = stem[:-2] if framed else stem
    dense = re.search(r"[@_-](\d)x$", stem, re.IGNORECASE)
    stem = stem[: dense.start()] if dense else stem
    words = words_of(stem)
    return Guess(
        file=file,
        exact=stem.lower().removesuffix("-pressed"),
        name=plain_name([word for word in words if word not in PRESSED]),
        pressed=len(words) > 1 and bool(PRESSED & set(words)),
        density=int(dense[1]) if dense else 1,
        framed=framed,
    )


def words_of(name: str) -> list[str]:
    """The words of a name, however they are joined: keyNormal, key_normal, KEY-NORMAL."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W\d_]+|\d+|[,.?]", apart.lower())


def plain_name(words: list[str]) -> str:
    """The one name that stands for all its synonyms; empty when nothing is said."""
    said = [word for word in words if word not in FILLING]
    telling = [word for word in said if word not in KEYS | GROUNDS]
    if telling:
        name = " ".join(telling)
        return SYNONYMS.get(name, SYNONYMS.get("".join(telling), name))
    if KEYS & set(said):
        return "key"
    return "background" if said else ""


def sliced(layout: Layout, name: str) -> bool:
    """Whether a slot counts the borders of this part in its picture's pixels."""
    part = name.removesuffix("-pressed")
    return any(s.fit == "nine-slice" and part in (s.name, s.part) for s in layout.slots)


def opened(guess: Guess, single: bool) -> Photo:
    """The picture, without its frame; at a `single` density if its pixels are counted."""
    photo = as_photo(guess.file)
    inner = slice(1, -1) if guess.framed and min(photo.size) > 2 else slice(None)
    rgb, alpha = photo.rgb[inner, inner], photo.alpha
    alpha = None if alpha is None else alpha[inner, inner]
    if not single or guess.density < 2:
        return Photo(rgb=rgb, alpha=alpha)
    size = max(1, rgb.shape[0] // guess.density), max(1, rgb.shape[1] // guess.density)
    return Photo(rgb=resize(rgb, size), alpha=None if alpha is None else resize(alpha, size))


# What is said of a key held down; what tells nothing; what means a key; what lies under keys.
PRESSED = {"pressed", "press", "down", "hilited", "highlight", "highlighted", "hl", "hold",
           "active", "按下"}  # fmt: skip
FILLING = {"img", "image", "pic", "picture", "icon", "ic", "skin", "normal", "default", "nor",
           "bar"}  # fmt: skip
KEYS = {"key", "keys", "btn", "button", "buttons", "letter", "letters", "char", "按键", "字母"}
GROUNDS = {"bg", "background", "backdrop", "keyboard", "kb", "board", "panel", "背景"}
SAME = {
    "delete": "backspace del bksp bs 删除 退格",
    "enter": "return ret newline go confirm 回车 换行 确认",
    "space": "spacebar blank 空格",
    "shift": "caps capslock upper 大写",
    "numbers": "number num numeric digits 123 数字",
    "symbols": "symbol sym signs punctuation 符号",
    "language": "lang globe ime switch cnen encn zhen 中英 语言",
    "comma": ", 逗号",
    "period": ". dot fullstop 句号",
    "question": "? questionmark 问号",
    "clear": "clr reset reinput 重输",
    "function": "func fn functional special modifier 功能",
    "candidate": "candidates cand 候选 候选栏",
    "navigation": "nav navi toolbar tool tools menu 导航 工具栏",
}
SYNONYMS = {word: name for name, words in SAME.items() for word in words.split()}

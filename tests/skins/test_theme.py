"""A .cskin holds together, shows the skin it was made of, and opens again to the same layout."""

import os
import subprocess
import sys
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import yaml

from controlfill.cli import run
from controlfill.errors import UserError
from controlfill.images import open_image, save_image
from controlfill.skins.archive import layout_words, open_files, zipped
from controlfill.skins.layout import layouts, open_layout
from controlfill.skins.theme import export_cskin, open_cskin
from controlfill.skins.themes import draw_skin, draw_theme

STYLES = ("backgroundStyle", "foregroundStyle", "candidateStyle", "style", "Cell")


@pytest.fixture(scope="module", params=["qwerty-26", "t9"])
def made(request, tmp_path_factory):
    """A layout, a skin without text, and the theme of both, unpacked."""
    layout = open_layout(request.param).at((480, 768))
    skin = draw_skin(draw_theme(4), layout).bare
    folder = tmp_path_factory.mktemp("theme")
    export_cskin(skin, layout, folder / "a.cskin")
    with zipfile.ZipFile(folder / "a.cskin") as archive:
        archive.extractall(folder / "open")
    return layout, skin, folder


def nodes(value):
    """All mappings in `value`."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from nodes(inner)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_all_that_is_named_is_there(made, mode):
    _, skin, folder = made
    board = yaml.safe_load((folder / "open" / mode / "keyboard.yaml").read_text())
    index = yaml.safe_load((folder / "open" / mode / "resources" / "sheet.yaml").read_text())
    sheet = open_image(folder / "open" / mode / "resources" / "sheet.png").rgb
    for node in nodes(board):
        for word in STYLES:
            if isinstance(node.get(word), str):
                assert node[word] in board, node
        for word in ("normalImage", "highlightImage"):
            if word in node:
                assert node[word]["image"] in index
    for name, entry in index.items():
        r = entry["rect"]
        assert r["x"] + r["width"] <= sheet.shape[1], name
        assert r["y"] + r["height"] <= sheet.shape[0], name
    assert open_image(folder / "open" / "demo.png").size == skin.shape[:2]


def test_tiles_side_by_side_are_the_skin(made):
    layout, skin, folder = made
    board = yaml.safe_load((folder / "open/light/keyboard.yaml").read_text())
    index = yaml.safe_load((folder / "open/light/resources/sheet.yaml").read_text())
    sheet = open_image(folder / "open/light/resources/sheet.png").rgb

    def tile(name):
        r = index[name]["rect"]
        return sheet[r["y"] : r["y"] + r["height"], r["x"] : r["x"] + r["width"]]

    rows, heights = [], 0
    for row in board["keyboardLayout"]:
        cells = [board[entry["Cell"]] for entry in row["HStack"]["subviews"]]
        assert sum(Fraction(cell["size"]["width"]) for cell in cells) == 1
        heights += Fraction(board[row["HStack"]["style"]]["size"]["height"])
        names = [board[cell["backgroundStyle"]]["normalImage"]["image"] for cell in cells]
        rows.append(np.concatenate([tile(name) for name in names], axis=1))
        key = next(slot.box for slot in layout.slots if slot.name == names[0])
        held, free = tile(f"{names[0]}-pressed"), tile(names[0])
        assert held[held.shape[0] // 2, -key.size[1] // 2].sum() < free.astype(int).sum(2).max()
    assert heights == 1
    np.testing.assert_array_equal(np.concatenate([tile("bar"), *rows]), skin)
    points = board["toolbarHeight"] + board["keyboardHeight"]
    assert points == pytest.approx(390 * 480 / 768, abs=2)
    actions = [cell["action"] for name, cell in board.items() if name.endswith("Key")]
    assert "backspace" in actions
    assert "space" in actions


def test_it_opens_again_to_the_same_layout(made):
    layout, skin, folder = made
    again, picture = open_cskin(folder / "a.cskin")
    assert again == layout
    np.testing.assert_array_equal(picture, skin)


def test_a_sheet_of_another_size_is_refused(made, tmp_path):
    files = open_files(made[2] / "a.cskin")
    files["light/resources/sheet.png"] = files["demo.png"]
    (tmp_path / "b.cskin").write_bytes(zipped(files))
    with pytest.raises(UserError, match="sheet.png is 768x480; the layout beside it needs 768x960"):
        open_cskin(tmp_path / "b.cskin")


@pytest.mark.parametrize("name", layouts())
def test_any_layout_can_be_written_and_read(name, tmp_path):
    layout = open_layout(name).at((411, 623))
    (tmp_path / "l.yaml").write_text(yaml.safe_dump(layout_words(layout), allow_unicode=True))
    assert open_layout(str(tmp_path / "l.yaml")) == layout


def test_the_published_validator_accepts_it(made):
    validator = os.environ.get("CSKIN_VALIDATOR")
    if not validator:
        pytest.skip("CSKIN_VALIDATOR names no validate_skin.py of imfuxiao/hamster-skin-skill")
    words = [sys.executable, validator, str(made[2] / "open")]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert " x " not in found.stdout


def test_the_command_and_its_mistakes(tmp_path, capsys):
    layout = open_layout("t9").at((160, 256))
    skin = str(save_image(tmp_path / "s.png", draw_skin(draw_theme(0), layout).image))
    words = ["--layout", "t9", "--size", "256x160"]
    for more in ([], ["--no_labels"]):
        out = tmp_path / f"{len(more)}.cskin"
        assert run(["skin", "export", skin, str(out), *words, *more]) == 0
        with zipfile.ZipFile(out) as archive:
            board = archive.read("light/keyboard.yaml").decode()
        assert ("text: SPACE" in board) == (not more)
    capsys.readouterr()
    assert run(["skin", "export", skin, str(tmp_path / "x.zip"), *words]) == 2
    assert "x.zip is no name of a theme; NAME.cskin" in capsys.readouterr().err
    four = open_layout("keyboard-parts-4")
    with pytest.raises(UserError, match="has 2 panels of keys"):
        export_cskin(np.zeros((*four.size, 3), np.uint8), four, tmp_path / "y.cskin")
    (tmp_path / "bad.cskin").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(UserError, match=r"bad\.cskin is no theme: File is not a zip"):
        open_cskin(tmp_path / "bad.cskin")
    with zipfile.ZipFile(tmp_path / "other.cskin", "w") as archive:
        archive.writestr("config.yaml", "pinyin: {}")
    with pytest.raises(UserError, match=r"holds no controlfill\.yaml"):
        open_cskin(tmp_path / "other.cskin")

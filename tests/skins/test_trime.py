"""A Trime theme says what the app's reader wants; by the app's rules its keys are the skin."""

import io
import re
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from controlfill.errors import UserError
from controlfill.skins.archive import open_files
from controlfill.skins.layout import open_layout
from controlfill.skins.schema import check_trime
from controlfill.skins.themes import draw_skin, draw_theme
from controlfill.skins.trime import export_trime, open_trime

TEXT = "my-skin.trime.yaml"
ODD = """\
name: odd
canvas: [300, 200]
regions:
  - name: panel
    rect: [0, 0, 300, 200]
    gap: 4
    rows:
      - [a, {key: A, label: "", width: 2}, {key: "{", label: "{"}]
      - [{key: go-there, label: GO}, {key: logo, label: ""}, {key: "数", label: ""}]
"""


@pytest.fixture(scope="module", params=["qwerty-26", "t9"])
def made(request, tmp_path_factory):
    """A layout, a skin without text, and the files of the theme of both."""
    layout = open_layout(request.param).at((240, 384))
    skin = draw_skin(draw_theme(4), layout).bare
    out = export_trime(skin, layout, tmp_path_factory.mktemp("theme") / "my skin.trime.zip")
    with zipfile.ZipFile(out) as archive:
        return layout, skin, {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def t9_files(tmp_path_factory):
    """The files of a theme of one colour."""
    layout = open_layout("t9").at((240, 384))
    out = tmp_path_factory.mktemp("theme") / "my-skin.trime.zip"
    return open_files(export_trime(np.zeros((240, 384, 3), np.uint8), layout, out))


def read(files):
    """The theme as the app reads it, all scalars as text, and its pictures by name."""
    theme = yaml.load(files[TEXT], yaml.BaseLoader)
    folder = f"backgrounds/{theme['style']['background_folder']}/"
    pictures = {
        name.removeprefix(folder): np.array(Image.open(io.BytesIO(data)))
        for name, data in files.items()
        if name.endswith(".png")
    }
    return theme, pictures


def app_rows(keyboard, screen):
    """Rows of (key, left, width) on a screen of so many pixels, by the app's rules.

    Widths are cut to whole pixels, a key that has no room begins a row, and one that ends within a
    hundredth of the border reaches it.
    """
    rows, at = [[]], 0
    for key in keyboard["keys"]:
        wide = int(np.float32(key.get("width", keyboard["width"])) * np.float32(screen) / 100)
        if at + wide > screen:
            rows, at = [*rows, []], 0
        wide = screen - at if screen - at - wide <= screen // 100 else wide
        rows[-1].append((key, at, wide))
        at += wide
    return rows


@pytest.mark.parametrize("screen", [720, 1080, 1439])
def test_the_apps_rules_lay_the_skin_out_again(made, screen):
    _, skin, files = made
    theme, pictures = read(files)
    rows = app_rows(theme["preset_keyboards"]["default"], screen)
    for row in rows:
        assert sum(Decimal(key["width"]) for key, _, _ in row) == 100
        assert row[-1][1] + row[-1][2] == screen
        left = 0
        for key, at, wide in row:
            tile = pictures[key["key_back_color"]].shape[1]
            assert at == pytest.approx(left * screen / 384, abs=len(row))
            assert wide == pytest.approx(tile * screen / 384, abs=len(row))
            left += tile
    tiles = [np.concatenate([pictures[k["key_back_color"]] for k, _, _ in row], 1) for row in rows]
    np.testing.assert_array_equal(np.concatenate([pictures["bar.png"], *tiles]), skin)
    heights = [int(row[0][0]["height"]) for row in rows]
    assert heights == [tile.shape[0] for tile in tiles]


def test_keys_do_what_they_are_called_and_darken(made):
    layout, _, files = made
    theme, pictures = read(files)
    keys = theme["preset_keyboards"]["default"]["keys"]
    presets = theme["preset_keys"]
    sent = {presets[key["click"]]["send"] for key in keys if key["click"] in presets}
    assert {"BackSpace", "Return", "space", "Mode_switch", "Eisu_toggle"} <= sent
    assert ("Shift_L" in sent) == (layout.name == "qwerty-26")
    labels = {slot.label for slot in layout.labelled}
    assert {key["label"] for key in keys} == labels
    assert {key["click"] for key in keys} >= set("qwertz" if "Q" in labels else "123456789")
    for key in keys:
        held, free = pictures[key["hilited_key_back_color"]], pictures[key["key_back_color"]]
        assert held.shape == free.shape
        assert held.mean() < 0.95 * free.mean()
    height = int(theme["style"]["keyboard_height"]) + int(theme["style"]["candidate_view_height"])
    assert height == pytest.approx(390 * 240 / 384, abs=2)
    for name, keyboard in theme["preset_keyboards"].items():
        rows = app_rows(keyboard, 1080)
        assert len(rows) == 4, name
        assert {sum(wide for _, _, wide in row) for row in rows} == {1080}, name
    for preset in presets.values():
        assert preset.get("select", ".")[0] == "." or preset["select"] in theme["preset_keyboards"]


def test_backgrounds_are_whole_and_have_no_keys(made):
    layout, skin, files = made
    theme, pictures = read(files)
    scheme = theme["preset_color_schemes"]["default"]
    assert {v for v in scheme.values() if v.endswith(".png")} <= set(pictures)
    ground = pictures[scheme["keyboard_background"]]
    assert ground.shape == skin.shape
    around = np.ones(layout.size, bool)
    for key in layout.keys:
        key.box.of(around)[:] = False
    np.testing.assert_array_equal(ground[around], skin[around])
    keys = ~around
    colour = np.median(skin[around], axis=0)
    assert abs(ground[keys] - colour).mean() < 0.3 * abs(skin[keys] - colour).mean()
    assert pictures["preview.png"].shape == skin.shape
    assert (pictures["preview.png"] != skin).any()


def test_without_labels_the_app_writes_nothing_that_is_seen(made, tmp_path):
    layout, skin, files = made
    assert export_trime(skin, layout, tmp_path / "my-skin", labels=False) == tmp_path / "my-skin"
    bare, pictures = read(open_files(tmp_path / "my-skin"))
    with_labels = read(files)[0]["preset_keyboards"]["default"]["keys"]
    for key, other in zip(bare["preset_keyboards"]["default"]["keys"], with_labels, strict=True):
        assert "label" not in key
        assert key["key_text_color"] == key["hilited_key_text_color"] == "0x00000000"
        assert other["key_text_color"] in ("0x18181C", "0xF5F5F5")
    np.testing.assert_array_equal(pictures["preview.png"], skin)
    again, found = open_trime(tmp_path / "my-skin")
    assert again == layout
    np.testing.assert_array_equal(found, skin)
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        export_trime(skin, layout, tmp_path / "my-skin")
    with pytest.raises(UserError, match=r"a\.yaml is no name of a Trime theme"):
        export_trime(skin, layout, tmp_path / "a.yaml")


def test_the_same_skin_gives_the_same_files(made, tmp_path):
    layout, skin, files = made
    assert open_files(export_trime(skin, layout, tmp_path / "my skin.trime.zip")) == files


def test_odd_keys_keep_their_pictures_and_do_no_harm(tmp_path):
    (tmp_path / "odd.yaml").write_text(ODD)
    layout = open_layout(str(tmp_path / "odd.yaml"))
    skin = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    out = export_trime(skin, layout, tmp_path / "my skin.trime.zip")
    theme, pictures = read(open_files(out))
    keys = theme["preset_keyboards"]["default"]["keys"]
    assert [key["click"] for key in keys[:3]] == ["a", "A", "{"]
    assert theme["preset_keys"][keys[3]["click"]] == {"label": "GO", "commit": "GO"}
    assert [key["click"] for key in keys[4:]] == ["VoidSymbol", "数"]
    named = [key["key_back_color"].lower() for key in keys]
    assert len(set(named)) == 6  # on file systems that know no case too
    assert all(name.isascii() and "/" not in name for name in named)
    assert sum(pictures[name].shape[1] for name in named[:3]) == 300
    assert not any(set("/+=") & set(name) for name in theme["preset_keys"])


BROKEN = [
    (
        r"width: \d+\.\d+",
        "width: 11",
        r"keyboard default: row 1 is 1\d\d(\.\d+)? wide; each row",
    ),
    (r"width: \d+\.\d+", "width: nan", "nan x .* is no size of a key"),
    (r"width: \d+\.\d+", "width: wide", "keyboard default: key 1: width: .*valid number"),
    ("back_color: '0x", "back_color: '0y", "default: back_color: '0y.*' is no colour; 0xRRGGBB"),
    ("key-2.png", "key-two.png", "no picture backgrounds/my-skin/key-two.png"),
    ("key_back_color: key-2.png", "back: key-2.png", "back is no option"),
    ("click: space", "click: spice", "'spice' is no sign and no preset key"),
    ("select: number", "select: nothing", "Keyboard_number: there is no keyboard 'nothing'"),
    ("send: BackSpace", "send: ''", "BackSpace: it does nothing"),
    ("keyboard_height: ", "keyboard_height: 90", "keyboard_height is 90[0-9]+; it lies between"),
    ("keyboard_height: ", "keyboard_size: ", "keyboard_size is no option"),
    ("  default:\n    name: my-skin", "  main:\n    name: my-skin", "preset_keyboards has no 'def"),
    ("preset_keys:\n", "other: &a\n", "other is no option"),
    ("author: controlfill", "author: &a [x]\nmore: *a", r"a reference \(\*name\) is not expected"),
    ("style:\n", "style: [\n", "is no readable YAML"),
    ("style:\n", "config_version: x\nstyle: []\nstile:\n", "style: Input should be a valid dict"),
    ("name: my-skin\nauthor", "author", "'name' is missing"),
]


@pytest.mark.parametrize(("old", "new", "said"), BROKEN)
def test_what_is_broken_is_said_in_one_line(t9_files, old, new, said):
    assert check_trime(t9_files, Path("x.zip")) == "backgrounds/my-skin"
    text = t9_files[TEXT].decode()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    with pytest.raises(UserError, match=said) as told:
        check_trime({**t9_files, TEXT: changed.encode()}, Path("x.zip"))
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400


def test_broken_pictures_and_missing_files_are_said(made, tmp_path):
    files = dict(made[2])
    files["backgrounds/my-skin/key-space.png"] = b"no picture"
    with pytest.raises(UserError, match=r"key-space\.png is no picture"):
        check_trime(files, Path("x.zip"))
    del files[TEXT]
    with pytest.raises(UserError, match=r"holds 0 files NAME\.trime\.yaml"):
        check_trime(files, Path("x.zip"))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.trime.yaml", "config_version: '3.0'")
    with pytest.raises(UserError, match=r"holds no controlfill\.yaml; only themes that"):
        open_trime(tmp_path / "other.zip")

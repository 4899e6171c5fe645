"""A theme for fcitx5-android has just the fields that the app reads, and colours one can read."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlfill.errors import UserError
from controlfill.images import open_image
from controlfill.skins.archive import Tones, ground_of, open_files
from controlfill.skins.fcitx5 import (
    FIRM,
    argb,
    contrast,
    export_fcitx5,
    grounds_of,
    luminance,
    open_fcitx5,
    over,
    picture_id,
    text_on,
    veil_of,
)
from controlfill.skins.layout import open_layout
from controlfill.skins.schema import COLOURS, check_fcitx5
from controlfill.skins.themes import draw_skin, draw_theme

TEXTS = {
    "keyTextColor": "keyBackgroundColor", "altKeyTextColor": "altKeyBackgroundColor",
    "accentKeyTextColor": "accentKeyBackgroundColor", "popupTextColor": "popupBackgroundColor",
    "candidateTextColor": "barColor",
    "genericActiveForegroundColor": "genericActiveBackgroundColor",
}  # fmt: skip


def make(folder, seed=4, name="t9", called="my.fcitx5.zip"):
    layout = open_layout(name).at((160, 256))
    skin = draw_skin(draw_theme(seed), layout).bare
    return layout, skin, export_fcitx5(skin, layout, folder / called)


def split(value):
    """Opacity, red, green, blue of a colour with a sign."""
    return value.to_bytes(4, "big", signed=True)


def relative(rgb):
    """Relative luminance of sRGB (WCAG 2)."""
    part = np.array(list(rgb)) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_the_archive_holds_what_the_app_reads(tmp_path):
    layout, skin, out = make(tmp_path)
    with zipfile.ZipFile(out) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in files if name.endswith(".json")]
    theme = json.loads(files[name])
    picture = theme["backgroundImage"]
    assert name == "my.json"
    assert set(theme) == {"name", "isDark", "backgroundImage", "version", *COLOURS}
    assert len(COLOURS) == 21
    assert theme["version"] == "2.1"
    assert all(type(theme[colour]) is int for colour in COLOURS)
    assert set(files) == {
        "my.json", "controlfill.yaml", "skin.png",
        picture["croppedFilePath"], picture["srcFilePath"],
    }  # fmt: skip
    assert picture["srcFilePath"] == f"{picture_id(skin)}-src.png"
    assert picture["cropRect"] == {"bottom": 160, "left": 0, "right": 256, "top": 0}
    for part in ("croppedFilePath", "srcFilePath"):
        ground = np.array(Image.open(io.BytesIO(files[picture[part]])))
        np.testing.assert_array_equal(ground, ground_of(skin, layout))
    again, found = open_fcitx5(out)
    assert again == layout
    np.testing.assert_array_equal(found, skin)


@pytest.mark.parametrize("seed", range(12))
def test_texts_can_be_read_on_what_lies_under_them(tmp_path, seed):
    theme = json.loads(open_files(make(tmp_path, seed, "qwerty-26")[2])["my.json"])
    ground = split(theme["backgroundColor"])
    for text, word in TEXTS.items():
        ink, veil = split(theme[text]), split(theme[word])
        seen = [
            (v * veil[0] + g * (255 - veil[0])) / 255 for v, g in zip(veil, ground, strict=True)
        ]
        # Keys may have no borders, so that their texts lie on the ground itself.
        for under in (seen, ground) if veil[0] < 255 and text != "candidateTextColor" else (seen,):
            pair = sorted([relative(ink[1:]), relative(under[1:])])
            assert (pair[1] + 0.05) / (pair[0] + 0.05) > 3, (text, under)
        assert ink[0] == 255
    assert theme["isDark"] == (split(theme["keyTextColor"])[1] > 127)


@pytest.mark.parametrize("key", [0, 60, 120, 180, 255])
@pytest.mark.parametrize("ground", [0, 70, 100, 110, 120, 140, 200, 255])
def test_greys_of_any_kind_leave_texts_readable(key, ground):
    key, ground = (key,) * 3, (ground,) * 3
    tones = Tones(key=key, function=key, space=key, enter=key, bar=ground, ground=ground)
    veil = veil_of(tones)
    ink = text_on(*grounds_of(tones, veil))
    for under in (ground, over(key, ground, veil)):
        assert contrast(ink, under) > 2.9
    assert (veil == FIRM) == (
        min(contrast(ink, over(key, ground, FIRM)), contrast(ink, ground)) >= 4
    )
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert luminance((10, 120, 250)) == pytest.approx(relative((10, 120, 250)))


def test_colours_are_the_skins_own(tmp_path):
    layout = open_layout("t9").at((160, 256))
    skin = np.full((160, 256, 3), (10, 20, 30), np.uint8)
    for slot in layout.keys:
        slot.box.of(skin)[:] = (200, 100, 50) if slot.role == "letter" else (0, 0, 255)
    files = open_files(export_fcitx5(skin, layout, tmp_path / "a.zip"))
    theme = json.loads(files["a.json"])
    assert split(theme["popupBackgroundColor"]) == bytes([255, 200, 100, 50])
    assert split(theme["altKeyBackgroundColor"])[1:] == bytes([0, 0, 255])
    assert (
        split(theme["barColor"])[1:] == split(theme["backgroundColor"])[1:] == bytes([10, 20, 30])
    )
    ground = open_image(files[f"{picture_id(skin)}-cropped.png"]).rgb
    assert (ground == (10, 20, 30)).all()
    assert argb((255, 255, 255)) == -1
    assert argb((0, 0, 0), 127) == 127 << 24


def test_the_same_skin_gives_the_same_bytes_and_another_another_name(tmp_path):
    one, two, three = (
        make(tmp_path, seed, called=f"{n}/my.fcitx5.zip") for n, seed in enumerate((4, 4, 5))
    )
    assert one[2].read_bytes() == two[2].read_bytes()
    assert picture_id(one[1]) != picture_id(three[1])
    assert picture_id(one[1].reshape(256, 160, 3)) != picture_id(one[1])


def test_what_the_app_would_refuse_is_refused_here(tmp_path):
    layout, skin, _ = make(tmp_path)
    with pytest.raises(UserError, match="has a theme called PixelDark itself"):
        export_fcitx5(skin, layout, tmp_path / "PixelDark.fcitx5.zip")
    with pytest.raises(UserError, match="writes its own labels"):
        export_fcitx5(skin, layout, tmp_path / "a.fcitx5.zip", labels=False)
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as archive:
        archive.writestr("a.json", "{}")
    with pytest.raises(UserError, match=r"holds a picture but no layout \(controlfill\.yaml\)"):
        open_fcitx5(tmp_path / "foreign.zip")


BROKEN = [
    ('"barColor"', '"barColour"', "barColor is missing"),
    ('"barColor"', '"more": 1, "barColor"', "more is no field of a theme"),
    ('"version": "2.1"', '"version": "3.0"', "version is '3.0'; '2.1' is known here"),
    ('"keyShadowColor": ', '"keyShadowColor": 9999999999, "x": ', "x is no field"),
    ('"keyboardColor": ', '"keyboardColor": 9999', r"keyboardColor is 9999\d+; an ARGB colour"),
    ('"keyboardColor": ', '"keyboardColor": 0.', r"keyboardColor is 0\.\d+; an ARGB colour"),
    ('"isDark": true', '"isDark": 1', "isDark is true or false"),
    ('"name": "my"', '"name": "../my"', r"name is '\.\./my'"),
    ('"brightness": 100', '"brightness": 101', "brightness is 101; it lies between 0 and 100"),
    ('"right": 256', '"right": 257', "is no part of the picture of 256x160"),
    ('"left": 0', '"lift": 0', "cropRect .* is no part"),
    ("-src.png", "-source.png", r"there is no picture .*-source\.png"),
    ('"cropRotation": 0,', "", "'cropRotation' is missing"),
    ("{", "[", "is no readable JSON"),
]


@pytest.mark.parametrize(("old", "new", "said"), BROKEN)
def test_what_is_broken_is_said_in_one_line(tmp_path, old, new, said):
    files = open_files(make(tmp_path)[2])
    assert old in files["my.json"].decode()
    files["my.json"] = files["my.json"].decode().replace(old, new, 1).encode()
    with pytest.raises(UserError, match=said) as told:
        check_fcitx5(files, Path("x.zip"))
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400

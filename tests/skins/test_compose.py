"""Parts become a skin, a skin becomes parts, and those become the same skin again."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from controlfill.cli import run
from controlfill.errors import UserError
from controlfill.images import as_photo, save_image
from controlfill.skins.compose import FITS, compose, write_parts
from controlfill.skins.layout import Box, Slot, open_layout


def parts(folder, layout, seed=0):
    """Element images for every kind of part, at the sizes of the layout."""
    rng = np.random.default_rng(seed)
    for slot in layout.slots:
        height, width = slot.box.size
        base = rng.integers(40, 200, 3)
        noise = rng.integers(0, 40, (height, width, 3))
        alpha = np.full((height, width), 255, np.uint8)
        if slot.role != "region":
            alpha[:4, :4] = 0
        if not (folder / f"{slot.part}.png").exists():
            save_image(folder / f"{slot.part}.png", (base + noise).astype(np.uint8), alpha)
    return folder


@pytest.mark.parametrize("name", ["qwerty-26", "t9", "keyboard-parts-4"])
@pytest.mark.parametrize("size", [None, (300, 480)])
def test_composed_sliced_and_composed_again_is_the_same(tmp_path, name, size):
    layout = open_layout(name)
    (tmp_path / "parts").mkdir()
    parts(tmp_path / "parts", layout)
    layout = layout.at(size) if size else layout
    skin = compose(layout, tmp_path / "parts").image
    written = write_parts(skin, layout, tmp_path / "cut", True)
    assert len(written) == len(layout.slots) + len(layout.keys)
    again = compose(layout, tmp_path / "cut")
    np.testing.assert_array_equal(again.image, skin)
    assert again.reports == []
    letter = as_photo(tmp_path / "cut" / f"{layout.keys[-1].name}.png").rgb.astype(int)
    held = as_photo(tmp_path / "cut" / f"{layout.keys[-1].name}-pressed.png").rgb
    assert held.mean() < 0.85 * letter.mean()


def test_keys_lie_over_panels_and_holes_in_them_show_it(tmp_path):
    layout = open_layout("t9")
    skin = compose(layout, parts(tmp_path, layout)).image
    key = next(slot for slot in layout.slots if slot.name == "5").box
    panel = as_photo(tmp_path / "panel-9.png").rgb
    np.testing.assert_array_equal(skin[key.top, key.left], panel[key.top - 176, key.left])
    np.testing.assert_array_equal(
        skin[key.top + 9, key.left + 9], as_photo(tmp_path / "key.png").rgb[9, 9]
    )


def test_what_misses_is_askew_or_spare_is_reported(tmp_path):
    layout = open_layout("t9")
    parts(tmp_path, layout)
    (tmp_path / "navigation-bar.png").unlink()
    save_image(tmp_path / "candidate-bar.png", np.zeros((50, 50, 3), np.uint8))
    save_image(tmp_path / "logo.png", np.zeros((5, 5, 3), np.uint8))
    reports = "\n".join(compose(layout, tmp_path).reports)
    assert "navigation-bar: neither of navigation-bar.png is in" in reports
    assert "candidate-bar.png: 50x50 is stretched to 1024x96 for candidate-bar" in reports
    assert "logo.png: no slot of layout t9 has that name" in reports
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no part of layout t9; expected .* key, "):
        compose(layout, tmp_path / "none")


def slot(fit, insets=(0, 0, 0, 0)):
    return Slot(name="s", box=Box(0, 0, 40, 20), part="s", fit=fit, insets=insets, line=7)


def test_fits():
    picture = np.full((30, 30, 4), 255, np.uint8)
    picture[:3] = (255, 0, 0, 255)
    assert all(FITS[fit](picture, slot(fit, (3, 3, 3, 3))).shape == (20, 40, 4) for fit in FITS)
    red = {
        fit: ((f := FITS[fit](picture, slot(fit, (3, 3, 3, 3))))[..., 1] < 128) & (f[..., 3] > 128)
        for fit in FITS
    }
    rows = {fit: int(found.any(axis=1).sum()) for fit, found in red.items()}
    assert rows == {"stretch": 2, "cover": 0, "contain": 2, "nine-slice": 3}
    assert red["contain"][:, :10].sum() == 0  # nothing beside the picture
    with pytest.raises(UserError, match="line 7: insets"):
        FITS["nine-slice"](picture, slot("nine-slice", (20, 0, 20, 0)))


NINE = """\
name: nine
canvas: [160, 120]
regions:
  - name: panel
    rect: [0, 0, 160, 120]
    keys: [{key: a, rect: [8, 8, 128, 96], fit: nine-slice, insets: [16, 8, 24, 16]}]
"""


@pytest.mark.parametrize(("height", "width"), [(60, 80), (240, 320), (120, 80), (30, 160)])
def test_a_skin_at_another_size_is_the_skin_at_that_size(tmp_path, height, width):
    (tmp_path / "nine.yaml").write_text(NINE)
    layout = open_layout(str(tmp_path / "nine.yaml"))
    frame = np.full((48, 64, 3), 240, np.uint8)
    frame[8:-16, 16:-24] = 20  # bright borders as wide as the insets, a dark middle
    save_image(tmp_path / "key.png", frame)
    save_image(tmp_path / "panel.png", np.full((9, 9, 3), 120, np.uint8))
    large = compose(layout, tmp_path).image
    assert large[8 + 8, 8 + 16 :].max(axis=1).tolist().index(240) == 128 - 16 - 24
    other = compose(layout.at((height, width)), tmp_path).image
    np.testing.assert_array_equal(other, cv2.resize(large, (width, height), None, 0, 0, 0))
    again = compose(layout.at((height, width)).at((120, 160)), tmp_path).image
    np.testing.assert_array_equal(again, large)


def test_borders_are_drawn_as_wide_as_the_layout_says(tmp_path):
    (tmp_path / "nine.yaml").write_text(NINE.replace("16]}", "16], edges: [8, 4, 12, 0]}"))
    key = open_layout(str(tmp_path / "nine.yaml")).keys[0]
    frame = np.full((48, 64, 4), 240, np.uint8)
    frame[8:-16, 16:-24] = 20
    drawn = FITS["nine-slice"](frame, key)[..., 0] < 128
    assert drawn.shape == (96, 128)
    assert [axis[[0, -1]].tolist() for axis in np.nonzero(drawn)] == [[4, 95], [8, 115]]
    with pytest.raises(
        UserError, match=r"insets \[16, 8, 24, 16\] of a leave nothing between them"
    ):
        FITS["nine-slice"](frame, replace(key, edges=(64, 0, 64, 0)))


def test_the_commands_walk_the_same_road(tmp_path, capsys):
    layout = open_layout("qwerty-26").at((320, 512))
    (tmp_path / "parts").mkdir()
    parts(tmp_path / "parts", layout)
    size = ["--size", "512x320"]
    skin, labelled = str(tmp_path / "skin.png"), str(tmp_path / "labelled.png")
    assert run(["skin", "compose", str(tmp_path / "parts"), skin, *size]) == 0
    assert run(["skin", "render", skin, labelled, *size]) == 0
    assert run(["skin", "slice", skin, str(tmp_path / "cut"), *size, "--no_pressed"]) == 0
    assert len(list((tmp_path / "cut").glob("*.png"))) == len(layout.slots)
    for more in ([], ["--glyphs"]):
        assert run(["skin", "hint", str(tmp_path / "hint.png"), *size, *more]) == 0
    assert as_photo(labelled).size == as_photo(tmp_path / "hint.png").size == (320, 512)
    assert (as_photo(labelled).rgb != as_photo(skin).rgb).any()
    capsys.readouterr()
    assert run(["skin", "slice", skin, str(tmp_path / "cut"), *size]) == 2
    assert run(["skin", "slice", skin, str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "is not empty" in said[0]
    assert "the skin is 512x320; the layout's canvas is 1024x640" in said[1]

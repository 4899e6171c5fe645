"""Pictures that others named become the parts of a layout; what fits nothing is said."""

import numpy as np
import pytest
from PIL import Image

from controlfill.errors import UserError
from controlfill.images import as_photo, save_image
from controlfill.skins.compose import compose, write_parts
from controlfill.skins.importing import guess_part, import_parts
from controlfill.skins.layout import open_layout

NAMES = {
    "Q@2x": "q", "btn_w": "w", "KEY-E-normal": "e", "key_normal": "key", "btn": "key",
    "backspace": "delete", "Del": "delete", "back_space": "delete", "key_delete": "delete",
    "return": "enter", "Enter_Key": "enter", "回车": "enter", "spacebar": "space", "空格": "space",
    "space_bar": "space", "CapsLock": "shift", "keyShift": "shift", "123": "numbers",
    "num": "numbers", "globe": "language", "EN": "language", "func_key": "function-key",
    "key_function@3x": "function-key", "wide key": "wide-key", "bg": "panel-26",
    "keyboard_bg": "panel-26", "Background": "panel-26", "keyboard": "panel-26",
    "panel_26": "panel-26", "cand_bg": "candidate-bar", "toolbar": "navigation-bar",
    "nav-bar": "navigation-bar", "nav_1": "nav-1", "dot": "period", "q_pressed": "q-pressed",
    "key-hl": "key-pressed", "btnSpacePressed": "space-pressed", "key_down@2x": "key-pressed",
    "space-key": "space-key", "candidate-bar": "candidate-bar", "q.9": "q", "btn_ok_2x": None,
    "skin": None, "logo": None, "ä": None, "Thumbs": None,
}  # fmt: skip


def picture(folder, name, size=(8, 8), colour=(9, 9, 9)):
    return save_image(folder / f"{name}.png", np.full((*size, 3), colour, np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_what_others_mean_by_them(tmp_path, name):
    layout = open_layout("qwerty-26")
    picture(tmp_path / "in", name)
    if NAMES[name] is None:
        with pytest.raises(UserError, match="holds no part of layout qwerty-26; it needs "):
            import_parts(tmp_path / "in", layout, tmp_path / "out")
        return
    found = import_parts(tmp_path / "in", layout, tmp_path / "out")
    assert list(found.matched) == [NAMES[name]]
    assert (tmp_path / "out" / f"{NAMES[name]}.png").is_file()
    assert found.spare == []


def test_labels_are_names_too(tmp_path):
    for name in ("abc", "WXYZ", "sym", "clr", "ok"):
        picture(tmp_path / "in", name)
    found = import_parts(tmp_path / "in", open_layout("t9"), tmp_path / "out")
    assert sorted(found.matched) == ["2", "9", "clear", "enter", "symbols"]


def test_any_picture_becomes_a_part_that_compose_takes(tmp_path):
    layout = open_layout("qwerty-26").at((160, 256))
    (tmp_path / "in" / "sub").mkdir(parents=True)
    grey = np.full((9, 11), 200, np.uint8)
    Image.fromarray(grey).save(tmp_path / "in" / "bg.bmp")
    Image.fromarray(grey).convert("P").save(tmp_path / "in" / "Cand.gif")
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "in" / "toolbar.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "in" / "func.tiff")
    rgba = Image.fromarray(np.dstack([grey, grey, grey, grey // 2]))
    rgba.save(tmp_path / "in" / "sub" / "Key@2x.webp", lossless=True)
    rgba.save(tmp_path / "in" / "key.png")  # named so as well, but less dense
    rgba.save(tmp_path / "in" / "btn@3x.png")  # not named so
    (tmp_path / "in" / "readme.txt").write_text("no picture")
    (tmp_path / "in" / "__MACOSX").mkdir()
    (tmp_path / "in" / "__MACOSX" / "._space.png").write_bytes(b"no picture")
    (tmp_path / "in" / "unknown.png").write_bytes(b"never opened")
    found = import_parts(tmp_path / "in", layout, tmp_path / "out")
    assert set(found.matched) == {
        "candidate-bar", "navigation-bar", "panel-26", "key", "function-key",
    }  # fmt: skip
    assert found.matched["key"].as_posix() == "sub/Key@2x.webp"
    assert sorted(map(str, found.spare)) == ["btn@3x.png", "key.png", "unknown.png"]
    assert set(found.missing) == {
        "nav-1", "nav-2", "nav-3", "nav-4", "nav-5", "shift", "delete", "numbers", "space", "enter",
    }  # fmt: skip
    assert found.reports[0] == "candidate-bar.png: from Cand.gif"
    assert "unknown.png: left over" in found.reports
    assert "space: no picture is called so" in found.reports
    composed = compose(layout, found.folder)
    assert {line.split(":")[0] for line in composed.reports if "neither" in line} == set(
        found.missing
    )
    written = as_photo(tmp_path / "out" / "key.png")
    np.testing.assert_array_equal(written.alpha, grey // 2)
    np.testing.assert_array_equal(as_photo(tmp_path / "out" / "function-key.png").rgb[..., 0], grey)


def test_own_parts_come_through_as_they_are(tmp_path):
    layout = open_layout("t9").at((160, 256))
    skin = np.random.default_rng(1).integers(0, 256, (160, 256, 3), np.uint8)
    paths = write_parts(skin, layout, tmp_path / "in", True)
    found = import_parts(tmp_path / "in", layout, tmp_path / "out")
    assert found.missing == found.spare == []
    assert sorted(found.matched) == sorted(path.stem for path in paths)
    np.testing.assert_array_equal(compose(layout, tmp_path / "out").image, skin)


def test_the_denser_picture_is_taken_and_frames_are_cut_off(tmp_path):
    layout = open_layout("qwerty-26")
    for name, size in (("a", 4), ("btn_s", 4), ("btn_s@2x", 8), ("btn_s@3x", 12), ("d.9", 10)):
        picture(tmp_path / "in", name, (size, size))
    found = import_parts(tmp_path / "in", layout, tmp_path / "out")
    assert {name: as_photo(tmp_path / "out" / f"{name}.png").size for name in found.matched} == {
        "a": (4, 4), "s": (12, 12), "d": (8, 8),
    }  # fmt: skip
    assert sorted(map(str, found.spare)) == ["btn_s.png", "btn_s@2x.png"]
    guess = guess_part(tmp_path / "btn_s@3x.png")
    assert (guess.name, guess.density, guess.pressed) == ("s", 3, False)


def test_pictures_whose_pixels_are_counted_are_brought_to_one_density(tmp_path):
    (tmp_path / "l.yaml").write_text(
        "name: l\ncanvas: [40, 40]\nregions:\n  - name: panel\n    rect: [0, 0, 40, 40]\n"
        "    keys: [{key: a, rect: [0, 0, 40, 40], fit: nine-slice, insets: [3, 3, 3, 3]}]\n"
    )
    layout = open_layout(str(tmp_path / "l.yaml"))
    picture(tmp_path / "in", "A@2x", (20, 24))
    import_parts(tmp_path / "in", layout, tmp_path / "out")
    assert as_photo(tmp_path / "out" / "a.png").size == (10, 12)


def test_nothing_is_written_over_and_broken_pictures_are_named(tmp_path):
    layout = open_layout("t9")
    picture(tmp_path / "in", "key")
    picture(tmp_path / "out", "mine")
    with pytest.raises(UserError, match="out is not empty; name a new folder"):
        import_parts(tmp_path / "in", layout, tmp_path / "out")
    with pytest.raises(UserError, match="none is no folder"):
        import_parts(tmp_path / "none", layout, tmp_path / "new")
    (tmp_path / "in" / "Space.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"Space\.png is not a picture"):
        import_parts(tmp_path / "in", layout, tmp_path / "new")
    assert not (tmp_path / "new").exists()

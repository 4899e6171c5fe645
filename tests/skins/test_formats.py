"""What was exported is imported again, bytes and all; what no theme is, is said in one line."""

from dataclasses import replace

import numpy as np
import pytest

from controlfill.errors import UserError
from controlfill.images import png_bytes
from controlfill.skins import archive
from controlfill.skins.archive import find_rows, open_files, preview, theme_name, zipped
from controlfill.skins.formats import EXPORTS, export_theme, import_theme
from controlfill.skins.layout import Box, open_layout

OWN_LAYOUT = """\
name: own
canvas: [240, 160]
regions:
  - {name: bar, rect: [0, 0, 240, 40], fit: nine-slice, insets: [3, 4, 5, 6]}
  - name: keys
    rect: [0, 40, 240, 120]
    gap: 4
    rows:
      - [a, {key: b, label: 乙, fit: nine-slice, insets: [9, 9, 9, 9], edges: [3, 3, 3, 3]}]
      - [{key: enter, label: OK, role: function, width: 2}, {key: c, z: 4, fit: cover}]
"""


def skin_of(layout, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*layout.size, 3), np.uint8)


@pytest.mark.parametrize("suffix", EXPORTS)
@pytest.mark.parametrize(
    ("name", "size"),
    [("qwerty-26", (101, 173)), ("t9", (160, 240)), ("own", (101, 173)), ("own", (160, 240))],
)
def test_what_is_exported_is_imported_again(tmp_path, suffix, name, size):
    (tmp_path / "own.yaml").write_text(OWN_LAYOUT)
    layout = open_layout(str(tmp_path / "own.yaml") if name == "own" else name)
    layout = layout if layout.size == size else layout.at(size)
    skin = skin_of(layout)
    out = export_theme(skin, layout, tmp_path / f"a theme{suffix}")
    again, picture = import_theme(out)
    assert again == layout
    np.testing.assert_array_equal(picture, skin)
    renamed = out.rename(tmp_path / "something.else")  # what is in it counts, not its name
    np.testing.assert_array_equal(import_theme(renamed)[1], skin)


def test_other_names_are_refused_with_those_that_would_be_right(tmp_path):
    layout = open_layout("t9").at((160, 256))
    for name in ("a.zip", "a.trime.yaml", "cskin", ".cskin", "a"):
        with pytest.raises(UserError, match=r"NAME\.cskin, NAME\.trime\.zip or NAME\.fcitx5\.zip"):
            export_theme(skin_of(layout), layout, tmp_path / name)
    assert theme_name(tmp_path / "my/../a b.trime.zip", ".trime.zip") == "a-b"
    assert theme_name(tmp_path / "皮肤.zip", ".trime.zip") == "皮肤"
    assert theme_name(tmp_path / "...zip", ".zip") == "skin"


@pytest.mark.parametrize("suffix", EXPORTS)
def test_layouts_without_rows_of_one_panel_are_refused(tmp_path, suffix):
    out = tmp_path / f"a{suffix}"
    four = open_layout("keyboard-parts-4").at((256, 256))
    t9 = open_layout("t9")
    keys = {slot.name: slot for slot in t9.slots}
    moved = {
        "5": (keys["5"].box.scaled(1, 0.9), "keys 4 and 5 overlap; .* in rows, side by side"),
        "2": (Box(*vars(keys["2"].box).values()).scaled(1.2, 1), "overlap"),
        "1": (Box(9, 60, 60, 130), "key 1 lies outside of panel-9"),
    }
    with pytest.raises(UserError, match="has 2 panels of keys; a theme takes one"):
        export_theme(skin_of(four), four, out)
    for name, (box, said) in moved.items():
        slots = tuple(replace(s, box=box) if s.name == name else s for s in t9.slots)
        with pytest.raises(UserError, match=said):
            find_rows(replace(t9, slots=slots))


def test_labels_that_no_font_has_are_left_out_of_previews():
    layout = open_layout("t9").at((160, 256))
    odd = replace(layout, slots=tuple(replace(s, label="\U000f1234") for s in layout.slots))
    skin = skin_of(layout)
    np.testing.assert_array_equal(preview(skin, odd, True), skin)
    assert (preview(skin, layout, True) != skin).any()


def archive_of(path, files):
    path.write_bytes(zipped({name: b"x" for name in files} if isinstance(files, list) else files))
    return path


@pytest.mark.parametrize("name", ["../a.json", "/etc/a.json", "x/../../a", "C:\\a.json", "C:a"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="which leads out of it; it is not opened"):
        import_theme(archive_of(tmp_path / "a.zip", ["config.yaml", name]))


def test_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LONGEST", 1 << 20)
    monkeypatch.setattr(archive, "MOST", 5)
    with pytest.raises(UserError, match="holds more than 1 MiB; no theme does"):
        import_theme(archive_of(tmp_path / "a.zip", {"config.yaml": bytes(2 << 20)}))
    with pytest.raises(UserError, match="holds 6 files; a theme has at most 5"):
        import_theme(archive_of(tmp_path / "b.zip", list("abcdef")))
    for name in "abcdef":
        (tmp_path / "many" / name).mkdir(parents=True)
        (tmp_path / "many" / name / "a.txt").write_text("a")
    with pytest.raises(UserError, match="holds 6 files"):
        import_theme(tmp_path / "many")


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "theme").mkdir()
    (tmp_path / "theme" / "a.json").symlink_to(tmp_path / "secret.json")
    assert open_files(tmp_path / "theme") == {}


LAYOUT = "controlfill.yaml"
BOMB = b"a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]\n"
FAULTS = {
    "canvas:\n- 173\n": ("canvas:\n- 175\n", "is 173x.*; the layout beside it needs 175x"),
    "canvas:\n": ("canvas: wide\nmore:\n", "more is no option|canvas: "),
    "role: letter": ("role: big", "role: "),
    "regions:\n": ("regions: 5\nrest:\n", "rest is no option|regions: "),
    "rect:\n": ("rows: [5]\n  rect:\n", "describes no layout: 'int' object is not iterable"),
    "key: a\n": ("key: ../../a\n", r"'\.\./\.\./a' can't be the name of a picture"),
    "name: own": ("name: own\nmore: *a", "is no readable YAML: "),
}


@pytest.fixture(scope="module")
def cskin(tmp_path_factory):
    """The files of a theme, small."""
    folder = tmp_path_factory.mktemp("theme")
    (folder / "own.yaml").write_text(OWN_LAYOUT)
    layout = open_layout(str(folder / "own.yaml")).at((101, 173))
    return open_files(export_theme(skin_of(layout), layout, folder / "a.cskin"))


@pytest.mark.parametrize("old", FAULTS)
def test_a_layout_that_is_broken_is_said_in_one_line(tmp_path, cskin, old):
    new, said = FAULTS[old]
    text = cskin[LAYOUT].decode()
    assert old in text
    files = {**cskin, LAYOUT: text.replace(old, new, 1).encode()}
    with pytest.raises(UserError, match=said) as told:
        import_theme(archive_of(tmp_path / "a.cskin", files))
    assert "\n" not in str(told.value)


def test_what_is_no_theme_is_said_in_one_line(tmp_path, cskin):
    sheet = "light/resources/sheet.png"
    wide = png_bytes(np.zeros((1, archive.WIDEST + 1), np.uint8))
    faults = {
        "is no theme: none of config.yaml": {"a.txt": b""},
        "a reference .* is not expected": {**cskin, LAYOUT: BOMB},
        "is no readable YAML": {**cskin, LAYOUT: b"\xff\xfe"},
        "expected `name: value`": {**cskin, LAYOUT: b""},
        "sheet.png is no picture": {**cskin, sheet: b"x"},
        "is 8193x1; at most 8192": {**cskin, sheet: wide},
        "sheet.png: the picture is a broken": {**cskin, sheet: cskin[sheet][:-5000]},
        r"holds no controlfill\.yaml": {name: d for name, d in cskin.items() if name != LAYOUT},
    }
    for number, (said, files) in enumerate(faults.items()):
        with pytest.raises(UserError, match=said) as told:
            import_theme(archive_of(tmp_path / f"{number}.cskin", files))
        assert "\n" not in str(told.value), said
    whole = zipped(cskin)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for data in (b"", b"PK", whole[: len(whole) // 2], bytes(damaged)):
        (tmp_path / "b.cskin").write_bytes(data)
        with pytest.raises(UserError, match=r"b\.cskin is no theme: ") as told:
            import_theme(tmp_path / "b.cskin")
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="is no theme: .*No such file"):
        import_theme(tmp_path / "none.cskin")

"""One file says where keys are; hints, masks and labels follow; mistakes name their lines."""

import numpy as np
import pytest

from controlfill.errors import UserError
from controlfill.skins.draw import (
    HAN,
    draw_labels,
    edge_hint,
    glyph_hint,
    has_sign,
    key_masks,
    label_boxes,
    open_font,
    position_mask,
)
from controlfill.skins.layout import Box, layouts, open_layout
from controlfill.skins.themes import is_installed

GOOD = """\
name: small
canvas: [200, 100]
regions:
  - name: panel
    rect: [0, 0, 200, 100]
    margin: 4
    gap: 4
    rows:
      - [a, {key: wide, label: WIDE, width: 2}]
      - [{space: 1}, b, c]
  - name: extra
    rect: [150, 0, 50, 20]
    z: 2
    keys:
      - {key: corner, rect: [160, 2, 30, 16], z: 3, label: "!"}
"""


def write(folder, text):
    (folder / "layout.yaml").write_text(text)
    return str(folder / "layout.yaml")


def test_rows_share_their_width_and_rects_are_taken_as_they_are(tmp_path):
    layout = open_layout(write(tmp_path, GOOD))
    boxes = {slot.name: slot.box for slot in layout.slots}
    assert layout.size == (100, 200)
    assert boxes["a"] == Box(4, 4, 65, 48)
    assert boxes["wide"] == Box(69, 4, 196, 48)
    assert boxes["b"] == Box(69, 52, 131, 96)
    assert boxes["corner"] == Box(160, 2, 190, 18)
    assert [slot.name for slot in layout.slots][-1] == "corner"  # drawn last
    assert {slot.name: slot.label for slot in layout.labelled} == {
        "a": "A", "wide": "WIDE", "b": "B", "c": "C", "corner": "!",
    }  # fmt: skip


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("size", [None, (320, 512), (512, 512), (333, 777)])
def test_shipped_layouts_fit_any_canvas(name, size):
    layout = open_layout(name)
    layout = layout.at(size) if size else layout
    if name.endswith("-zh") and not any(is_installed(font) for font in HAN):
        pytest.skip("no font with Chinese signs is installed")
    whole = Box(0, 0, layout.size[1], layout.size[0])
    assert all(slot.box.inside(whole) for slot in layout.slots)
    masks = key_masks(layout.keys, layout.size)
    assert masks.sum(axis=0).max() == 1  # keys do not overlap
    edges, glyphs = edge_hint(layout), glyph_hint(layout)
    assert edges.shape == (*layout.size, 3)
    assert set(np.unique(edges)) == {0, 255}
    letters = (glyphs != edges).any(axis=2)
    assert letters.any()
    assert (position_mask(layout)[letters] == 255).mean() > 0.97
    assert (edges[:, :, 0] > 0)[:, 0].all()  # the outline of the regions reaches the border


def test_labels_lie_on_their_keys_and_fit():
    layout = open_layout("qwerty-26")
    slots = {slot.label: slot.box for slot in layout.labelled}
    for text, box in label_boxes(layout):
        assert box.inside(slots[text]), text
    polygon = Box(1, 2, 5, 9).corners()
    assert polygon == [[1, 2], [5, 2], [5, 9], [1, 9]]


def test_labels_are_dark_on_light_keys_and_light_on_dark_ones():
    layout = open_layout("t9")
    for grey in (20, 235):
        skin = np.full((*layout.size, 3), grey, np.uint8)
        ink = draw_labels(skin, layout)[position_mask(layout) > 0].astype(int)
        assert abs(ink - grey).max() > 180
    red = draw_labels(skin, layout, colour=(255, 0, 0))
    assert (red == (255, 0, 0)).all(axis=2).any()


def test_labels_of_one_kind_of_key_are_all_dark_or_all_light():
    layout = open_layout("qwerty-26")
    skin = np.full((*layout.size, 3), 140, np.uint8)
    letters = [slot for slot in layout.labelled if slot.part == "key"]
    for slot in letters[:5]:
        slot.box.of(skin)[:] = 110
    labelled = draw_labels(skin, layout)
    assert all(slot.box.of(labelled).min() < 40 for slot in letters)
    assert all(slot.box.of(labelled).max() < 150 for slot in letters)


def test_signs_that_a_font_lacks_are_named(tmp_path):
    name = write(tmp_path, GOOD.replace('label: "!"', 'label: "\\U000F1234"'))
    with pytest.raises(UserError, match="has no \U000f1234 for the label"):
        glyph_hint(open_layout(name))
    assert has_sign(open_font(None, False, 20), "A")
    with pytest.raises(UserError, match="no font that can be read"):
        open_font(tmp_path / "layout.yaml", False, 20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("canvas: [200, 100]", ""), r"line 1: 'canvas' is missing"),
        (("canvas: [200, 100]", "canvas: wide"), "line 1: canvas: "),
        (("margin: 4", "marge: 4"), "line 4: marge is no option"),
        (("width: 2", "width: two"), "line 9: width: "),
        (("rect: [160, 2, 30, 16]", "rect: [190, 2, 30, 16]"), "line 15: corner reaches from 190"),
        (("rect: [160, 2, 30, 16], ", ""), "line 15: key 'corner' has no rect"),
        (("[{space: 1}, b, c]", "[{space: 1}, b, a]"), "'a' is the name of two slots"),
        (("margin: 4", "margin: 99"), "line 4: a reaches from"),
        (("[{space: 1}, b, c]", "[{space: 1}, b, /]"), "'/' can't be the name of a picture"),
        (("key: corner", "key: ../corner"), "line 15: '../corner' can't be the name of a picture"),
        (("rows:", "rows: ["), "while parsing"),
        (("- [a, ", "- [[a], "), "expected `name: value` lines"),
    ],
)
def test_mistakes_name_their_line(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        open_layout(write(tmp_path, GOOD.replace(*change)))


def test_there_are_other_layouts_to_name():
    with pytest.raises(UserError, match="there are keyboard-parts-4, .*, t9-zh, or a YAML"):
        open_layout("nothing")

"""Legible labels score high, wrong ones and none low, whoever reads them."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from controlfill.errors import UserError
from controlfill.evaluation.adherence import plain_skin
from controlfill.evaluation.texts import (
    Ocr,
    Texts,
    clean_texts,
    edit_distance,
    find_labels,
    glyph_correlation,
    left_out,
    measure_texts,
    open_ocr,
    patch,
    read_labels,
    same,
    score,
    similarity,
)
from controlfill.skins.draw import draw_labels
from controlfill.skins.layout import Box, Layout, Slot, open_layout
from controlfill.skins.themes import draw_skin, draw_theme

LAYOUT = open_layout("qwerty-26").at((320, 512))
CLEAN = draw_labels(plain_skin(LAYOUT), LAYOUT)


def with_labels(layout, change):
    """The layout with other labels: `change` from old to new."""
    slots = tuple(replace(slot, label=change.get(slot.label, slot.label)) for slot in layout.slots)
    return replace(layout, slots=slots)


def stand_in(layout=LAYOUT, name="stand-in"):
    """A reader that compares a box with the label of each key, drawn on that layout."""
    black = np.zeros((*layout.size, 3), np.uint8)
    drawn = draw_labels(black, layout, None, (255, 255, 255))[..., 0]
    glyphs = [(text, box.of(drawn)) for text, box in find_labels(layout)]

    def read(image, boxes, signs):
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        texts = []
        for box in boxes:
            crop = cv2.resize(patch(grey, box, 0), (40, 20)).astype(float)
            if np.ptp(crop) < 20:
                texts.append("")
                continue
            alike = [
                (abs(np.corrcoef(crop.ravel(), cv2.resize(g, (40, 20)).ravel())[0, 1]), text)
                for text, g in glyphs
                if set(text) <= set(signs)
            ]
            texts.append(max(alike)[1])
        return texts

    return Ocr(name=name, read=read)


def test_edit_distance_and_similarity():
    pairs = {("", ""): 0, ("abc", "abc"): 0, ("kitten", "sitting"): 3, ("", "ab"): 2,
             ("ab", "ba"): 2, ("SPACE", "SPAGE"): 1}  # fmt: skip
    for (a, b), distance in pairs.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance
    assert similarity("kitten", "sitting") == 1 - 3 / (7 + 1e-5)
    assert similarity("", "") == 1
    assert 0 < similarity("a", "b") < 1e-4


def test_only_signs_that_look_alike_are_made_one():
    assert same("Cc0oSsVvWwXxZz1-I") == "CCOOSSVVWWXXZZIII"
    assert same("aAbByYlL") == "aAbByYlL"
    assert score(["o", "a"], ["0", "A"])[0] == 0.5
    assert score([], []) == (0.0, 0.0)


def test_the_floor_is_that_of_permuted_labels():
    assert Texts(wanted=["a", "b"], read=["a", "b"]).floor() == (0, pytest.approx(0, abs=1e-4))
    assert Texts(wanted=["a", "a", "b"], read=["a", "a", "b"]).floor()[0] == pytest.approx(1 / 3)
    assert Texts(wanted=["a"], read=["a"]).floor() == (0, 0)


@pytest.mark.parametrize("name", ["qwerty-26", "t9"])
def test_clean_labels_are_read_and_others_are_not(name):
    layout = open_layout(name).at((320, 512))
    reader = stand_in(layout)
    themed = draw_skin(draw_theme(1), layout)
    for image in (draw_labels(plain_skin(layout), layout), themed.image):
        figures, floor, misread = measure_texts(image, layout, None, [reader])
        assert figures["text_accuracy_stand-in"] > 0.95
        assert figures["ned_stand-in"] >= figures["text_accuracy_stand-in"] - 1e-4
        assert figures["glyph_correlation"] > 0.9
        assert floor["text_accuracy_stand-in"] < 0.1
        assert floor["glyph_correlation"] < 0.45
        assert len(misread["stand-in"]) <= 1
    bare, _, misread = measure_texts(themed.bare, layout, None, [reader])
    assert bare["text_accuracy_stand-in"] == 0
    assert bare["glyph_correlation"] < 0.2
    assert set(misread["stand-in"].values()) == {""}


def test_swapped_labels_are_wrong_where_they_are_swapped():
    swapped = draw_labels(plain_skin(LAYOUT), with_labels(LAYOUT, {"Q": "W", "W": "Q"}))
    figures, _, misread = measure_texts(swapped, LAYOUT, None, [stand_in()])
    assert set(misread["stand-in"]) == {"Q", "W"}
    assert figures["text_accuracy_stand-in"] == pytest.approx(1 - 2 / len(LAYOUT.labelled))


def test_glyphs_may_be_dark_or_light_and_a_little_aside():
    own, floor = glyph_correlation(CLEAN, LAYOUT)
    assert glyph_correlation(255 - CLEAN, LAYOUT)[0] == pytest.approx(own, abs=0.02)
    for shift in (1, 3):
        moved = np.roll(CLEAN, (shift, -shift), (0, 1))
        assert glyph_correlation(moved, LAYOUT)[0] == pytest.approx(own, abs=0.03)
    assert glyph_correlation(np.roll(CLEAN, 9, 1), LAYOUT)[0] < own - 0.2
    noise = np.random.default_rng(0).integers(0, 256, CLEAN.shape).astype(np.uint8)
    assert glyph_correlation(noise, LAYOUT)[0] < floor


def test_labels_at_the_border_are_measured_too():
    slot = Slot(name="a", box=Box(0, 0, 30, 12), part="key", label="MMM")
    layout = Layout(name="one", size=(40, 60), slots=(slot,))
    image = draw_labels(np.full((40, 60, 3), 200, np.uint8), layout)
    assert glyph_correlation(image, layout)[0] > 0.9
    assert glyph_correlation(image, layout)[1] == 0
    np.testing.assert_array_equal(
        patch(np.arange(6, dtype=np.uint8).reshape(2, 3), Box(0, 0, 1, 1), 1),
        [[0, 0, 1], [0, 0, 1], [3, 3, 4]],
    )


def test_labels_with_signs_that_a_reader_lacks_are_left_out():
    reader = replace(stand_in(), knows=lambda sign: sign != "Q")
    texts = read_labels(CLEAN, find_labels(LAYOUT), reader)
    assert "Q" not in texts.wanted
    assert len(texts.wanted) == len(LAYOUT.labelled) - 1
    assert left_out(LAYOUT, None, [reader, stand_in()]) == [
        "stand-in has no signs for Q, which are left out"
    ]
    nothing = replace(reader, knows=lambda sign: False)
    assert read_labels(CLEAN, find_labels(LAYOUT), nothing).read == []
    assert "text_accuracy_stand-in" not in measure_texts(CLEAN, LAYOUT, None, [nothing])[0]


def test_the_ceiling_is_measured_once():
    asked = []
    reader = stand_in()
    counted = replace(reader, read=lambda *words: asked.append(1) or reader.read(*words))
    first = clean_texts(LAYOUT, None, (counted,))
    assert clean_texts(LAYOUT, None, (counted,)) is first
    assert len(asked) == 1


def test_layouts_without_labels_are_refused():
    bare = with_labels(LAYOUT, {slot.label: "" for slot in LAYOUT.labelled})
    for call in (find_labels, lambda layout: glyph_correlation(CLEAN, layout)):
        with pytest.raises(UserError, match="layout qwerty-26 has no labels"):
            call(bare)


@pytest.mark.parametrize("name", ["v4", "v6"])
def test_real_readers_read_drawn_labels(name):
    try:
        reader = open_ocr(name)
    except (UserError, ImportError) as error:
        pytest.skip(f"{error}")
    layout = open_layout("t9").at((320, 512))
    labels = [label for label in find_labels(layout) if len(label[0]) > 1][:6]
    texts = read_labels(draw_labels(plain_skin(layout), layout), labels, reader)
    assert texts.accuracy >= 0.8
    assert texts.floor()[0] < 0.1
    assert not reader.knows("\U0001f5dd")

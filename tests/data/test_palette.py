"""Words measured from pictures are those that the pictures were made with."""

import numpy as np
import pytest

from controlfill.data.palette import describe, name_colour, texture
from controlfill.skins.layout import open_layout
from controlfill.skins.themes import draw_skin, draw_theme

LAYOUT = open_layout("qwerty-26").at((320, 512))
SKINS = [draw_skin(draw_theme(seed), LAYOUT) for seed in range(24)]


def ground_of(words):
    return words.split(" keys on ")[1].split()[0]


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((128, 128, 128), "grey"),
        ((60, 60, 62), "charcoal"), ((205, 205, 208), "light grey"), ((230, 30, 30), "red"),
        ((110, 20, 20), "maroon"), ((255, 205, 215), "pastel pink"), ((255, 140, 20), "orange"),
        ((110, 65, 20), "brown"), ((250, 230, 30), "yellow"), ((250, 245, 215), "cream"),
        ((40, 170, 60), "green"), ((190, 240, 205), "mint"), ((30, 150, 150), "teal"),
        ((20, 30, 100), "navy"), ((50, 90, 220), "blue"), ((170, 215, 250), "sky blue"),
        ((130, 60, 220), "violet"), ((215, 195, 250), "lavender"), ((235, 60, 160), "pink"),
        ((120, 125, 145), "greyish blue"),
    ],
)  # fmt: skip
def test_colours_have_their_names(colour, word):
    assert name_colour(np.array(colour, np.float64)) == word


def test_grounds_of_themes_are_told_by_their_texture():
    for layout, least in ((LAYOUT, 1.0), (None, 0.9)):
        found = [(s.theme.ground, ground_of(describe(s.image, layout))) for s in SKINS]
        known = [(truth, word) for truth, word in found if truth != "cloudy"]
        assert {truth for truth, _ in known} == {"plain", "graded", "striped"}
        assert sum(truth == word for truth, word in known) >= least * len(known)
        # Soft blotches that can hardly be seen are plain, but sharp they are never.
        cloudy = {word for truth, word in found if truth == "cloudy"}
        assert "cloudy" in cloudy
        assert not cloudy & {"striped", "patterned"}


def test_keys_are_found_without_a_layout():
    words = [[describe(s.image, layout) for layout in (LAYOUT, None)] for s in SKINS]
    same = sum(a.split(" keys")[0] == b.split(" keys")[0] for a, b in words)
    assert same >= 0.9 * len(SKINS)


def test_brightness_and_contrast():
    def skin(key, ground):
        picture = np.full((*LAYOUT.size, 3), ground, np.uint8)
        for slot in LAYOUT.keys:
            slot.box.of(picture)[:] = key
        return picture

    for layout in (LAYOUT, None):
        assert describe(skin((255, 255, 255), (0, 0, 90)), layout) == (
            "white keys on plain navy ground, bright, bold contrast"
        )
        assert describe(skin((60, 60, 62), (30, 30, 31)), layout) == (
            "charcoal keys on plain black ground, dark"
        )
        assert describe(skin((255, 205, 215), (250, 245, 215)), layout) == (
            "pastel pink keys on plain cream ground, bright, soft contrast"
        )


def test_noise_is_patterned():
    noise = np.random.default_rng(0).normal(50, 9, (60, 60)).astype(np.float32)
    assert texture(noise, np.ones((60, 60), bool)) == "patterned"


@pytest.mark.parametrize("size", [(16, 16), (16, 700), (33, 40)])
def test_any_picture_has_words_and_always_the_same(size):
    rng = np.random.default_rng(1)
    for picture in (np.zeros((*size, 3), np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)):
        words = describe(picture)
        assert " keys on " in words
        assert words == describe(picture.copy())
        assert " keys on " in describe(picture, LAYOUT)

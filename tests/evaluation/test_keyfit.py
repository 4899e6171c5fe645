"""KeyFit tells right layouts from wrong, shifted and incomplete ones; at every contrast."""

import numpy as np
import pytest

from controlfill.evaluation.keyfit import find_reach, key_fit
from controlfill.skins.layout import open_layout
from controlfill.skins.themes import draw_skin, draw_theme

SIZES = [(640, 1024), (320, 512)]


@pytest.fixture(scope="module", params=SIZES)
def skins(request):
    """Twelve themes on two layouts of one size."""
    layouts = [open_layout(name).at(request.param) for name in ("qwerty-26", "t9")]
    return layouts, [[draw_skin(draw_theme(s), la).image for s in range(12)] for la in layouts]


def shares(images, layout):
    return np.array([key_fit(image, layout).share for image in images])


def test_right_layouts_fit_and_wrong_ones_do_not(skins):
    (first, second), (of_first, of_second) = skins
    assert np.median(shares(of_first, first)) == 1
    assert shares([*of_first], first).mean() > 0.95
    assert shares([*of_second], second).mean() > 0.95
    assert shares(of_first, second).mean() < 0.15
    assert shares(of_second, first).mean() < 0.15


def test_two_pixels_are_too_many(skins):
    (layout, _), (images, _) = skins
    for axis in (0, 1):
        moved = [np.roll(image, 2, axis) for image in images]
        assert shares(moved, layout).max() < 0.1


def test_missing_keys_count(skins):
    (layout, _), (images, _) = skins
    image = images[3].copy()  # a plain ground
    for slot in layout.keys[10:13]:
        slot.box.of(image)[:] = image[layout.keys[0].box.top, layout.keys[0].box.left - 2]
    found = key_fit(image, layout)
    assert not any(found.fits[slot.name] for slot in layout.keys[10:13])
    assert found.share == pytest.approx(1 - 3 / len(layout.keys), abs=0.08)


def test_nothing_fits_where_nothing_is():
    layout = open_layout("t9")
    noise = np.random.default_rng(0).integers(0, 256, (*layout.size, 3)).astype(np.uint8)
    for picture in (np.full((*layout.size, 3), 90, np.uint8), noise):
        assert key_fit(picture, layout).share < 0.05
    assert find_reach(layout) == 5

"""Windows fill a hole from what is known, and none is left out."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from controlfill.diffusion.tiles import make_windows
from controlfill.inference.order import ORDERS, by_rows, outward, places_along

sides = st.integers(2, 40)


@given(
    length=st.integers(1, 300), window=st.integers(2, 64), share=st.floats(0, 0.9), data=st.data()
)
def test_an_axis_is_covered_and_neighbours_share_enough(length, window, share, data):
    first = data.draw(st.integers(0, length - 1))
    last = data.draw(st.integers(first + 1, length))
    overlap = min(round(window * share), window - 1)
    places = places_along(length, window, overlap, (first, last))
    assert places == sorted(set(places))
    assert places[0] == 0
    if length > window:
        assert places[-1] == length - window
        assert all(b - a <= window - overlap for a, b in pairwise(places))


@settings(deadline=None)
@given(height=sides, width=sides, side=st.integers(2, 16), seed=st.integers(0, 99), data=st.data())
def test_each_order_fills_every_cell(height, width, side, seed, data):
    rng = np.random.default_rng(seed)
    hole = rng.uniform(size=(height, width)) < data.draw(st.floats(0.01, 0.99))
    hole[rng.integers(height), rng.integers(width)] = False
    windows = make_windows((height, width), side, side // 2)
    for order in ORDERS.values():
        left = hole.copy()
        for top, start in order(hole, windows):
            part = left[top : top + windows.size[0], start : start + windows.size[1]]
            assert part.any() or order is by_rows
            part[:] = False
        assert not left.any()


def test_a_picture_grows_on_all_sides_before_it_grows_further():
    hole = np.ones((48, 48), bool)
    hole[16:32, 16:32] = False
    places = list(outward(hole, make_windows((48, 48), 16, 8)))
    assert len(places) == 24
    reach = [max(abs(top - 16), abs(left - 16)) for top, left in places]
    assert reach == sorted(reach)
    # Sides before corners: a corner is seen when both its neighbours are there.
    for corner in ((8, 8), (8, 24), (24, 8), (24, 24)):
        beside = [(16, corner[1]), (corner[0], 16)]
        assert all(places.index(side) < places.index(corner) for side in beside)


def test_each_window_but_the_first_ring_of_them_sees_what_was_filled_before():
    hole = np.ones((40, 100), bool)
    hole[20:, 30:70] = False
    windows = make_windows((40, 100), 16, 8)
    known = ~hole
    for top, left in outward(hole, windows):
        part = known[top : top + 16, left : left + 16]
        assert part.mean() >= 0.25
        part[:] = True


def test_rows_go_from_top_to_bottom():
    hole = np.zeros((32, 32), bool)
    hole[:, 20:] = True
    places = list(by_rows(hole, make_windows((32, 32), 16, 8)))
    assert places == sorted(places)
    assert all(left >= 8 for _, left in places)

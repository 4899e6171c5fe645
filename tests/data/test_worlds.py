"""The world is endless, seeded, and draws what its captions say."""

import numpy as np
import pytest

from controlfill.data.worlds import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    WORLDS,
    Chance,
    open_world,
    outlines,
    paint,
)
from controlfill.errors import UserError

WORLD = WORLDS["shapes"]


def test_a_seed_is_a_picture():
    first, again, other = WORLD.draw(7), WORLD.draw(7), WORLD.draw(HELD_OUT + 7)
    np.testing.assert_array_equal(first.image, again.image)
    assert first.truth == again.truth
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("seed", range(12))
def test_object_and_ground_have_the_colours_of_the_caption(seed):
    picture = WORLD.draw(seed, (96, 128))
    assert picture.image.shape == (96, 128, 3)
    words = picture.truth.caption.split()
    assert words[:2] == [picture.truth.colour, picture.truth.shape]
    centre = picture.image[picture.object_mask > 0]
    near = np.abs(centre.astype(int) - COLOURS[picture.truth.colour]).max(axis=1) <= 1
    assert near.mean() > 0.7  # the rest is the anti-aliased rim
    assert (picture.object_mask > 0).mean() > 0.03
    edges = (picture.object_mask[[0, -1]], picture.object_mask[:, [0, -1]])
    assert not any(edge.any() for edge in edges)


def test_every_ground_and_shape_can_be_painted_at_any_size():
    for truth in WORLDS["shapes-full"].truths():
        if truth.colour == "red":
            picture = paint(truth, Chance(np.random.default_rng(1), 0), (40, 56))
            assert picture.image.std() > 5
            assert picture.truth.caption.endswith("background")


def test_captions_read_like_captions():
    captions = {WORLD.draw(seed).truth.caption for seed in range(400)}
    assert any(" on plain " in c and " and " not in c for c in captions)
    assert any(" on striped " in c and " and " in c for c in captions)
    assert len(captions) > 300
    words = set(WORLD.words())
    assert all(set(c.split()) <= words for c in captions)


def test_rings_have_a_hole():
    (outer, solid), (inner, hollow) = outlines("ring", 10, 0)
    assert (solid, hollow) == (1, 0)
    assert np.abs(inner).max() < np.abs(outer).max()
    assert all(outlines(shape, 10, 0.1) for shape in SHAPES)


def test_on_a_grid_lengths_are_multiples_and_nothing_turns():
    on, free = (Chance(np.random.default_rng(0), grid) for grid in (4, 0))
    assert {on.length(7, 18) for _ in range(50)} == {8.0, 12.0, 16.0}
    assert on.length(5, 6) == 8.0  # where no multiple fits, the next one
    assert on.turn(1.0) == 0
    assert {on.angle(4) for _ in range(50)} == {0.0, np.pi / 2}
    assert len({free.length(7, 18) for _ in range(50)}) == 50
    assert len({free.angle(4) for _ in range(50)}) == 4
    assert 0 < abs(free.turn(1.0)) <= 1


@pytest.mark.parametrize("world", ["shapes", "shapes-full", "shapes-bare"])
def test_a_margin_is_more_of_the_same_ground(world):
    for seed in range(40):
        world_ = open_world(world)
        picture, wide = world_.draw(seed, (64, 80)), world_.draw(seed, (64, 80), margin=24)
        assert wide.image.shape == (112, 128, 3)
        np.testing.assert_array_equal(wide.image[24:-24, 24:-24], picture.image)
        np.testing.assert_array_equal(wide.object_mask[24:-24, 24:-24], picture.object_mask)
        assert wide.object_mask.sum() == picture.object_mask.sum()
        beyond = {tuple(colour) for colour in wide.image[:20].reshape(-1, 3)}
        if picture.truth.ground != "graded" and world != "shapes-full":
            ends = {COLOURS[name] for name in picture.truth.ground_colours}
            assert ends <= beyond


def test_bare_pictures_are_grounds_without_an_object():
    bare, full = open_world("shapes-bare"), open_world("shapes")
    drawn = [(bare.draw(seed), full.draw(seed)) for seed in range(300)]
    without = [(a, b) for a, b in drawn if a.truth.bare]
    assert 60 < len(without) < 120
    for a, b in without:
        assert not a.object_mask.any()
        assert a.truth.caption == b.truth.scenery
        assert b.truth.caption.endswith(f" on {a.truth.caption}")
        np.testing.assert_array_equal(a.image[b.object_mask == 0], b.image[b.object_mask == 0])
    for a, b in drawn:
        if not a.truth.bare:
            np.testing.assert_array_equal(a.image, b.image)


def test_unknown_worlds_are_refused():
    with pytest.raises(UserError, match="no world is called 'moon'; there are: shapes"):
        open_world("moon")

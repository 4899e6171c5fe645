"""Masks: bounded, reproducible, of every kind, at every size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlfill.data import masks
from controlfill.errors import UserError
from controlfill.options import MaskOptions

SIZES = st.tuples(st.integers(8, 160), st.integers(8, 160))
KINDS = sorted(masks.KINDS)


@settings(deadline=None)
@given(st.sampled_from(KINDS), SIZES, st.integers(0, 2**31), st.floats(0.05, 0.4))
def test_every_kind_keeps_to_its_area(kind, size, seed, low):
    area = (low, low + 0.2)
    mask = masks.draw_mask(kind, size, np.random.default_rng(seed), area)
    assert mask.shape == size
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 255}
    if not (kind in ("full", "glid") and mask.all()):
        pixel = 1 / mask.size
        assert low - pixel <= masks.area_of(mask) <= low + 0.2 + pixel


@given(st.sampled_from(KINDS), SIZES, st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_a_mask_is_a_function_of_its_rng(kind, size, seed):
    first, second = (masks.draw_mask(kind, size, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_draw_other_masks(kind):
    drawn = [masks.draw_mask(kind, (64, 64), np.random.default_rng(i)).tobytes() for i in range(8)]
    assert len(set(drawn)) >= {"full": 1, "glid": 5}.get(kind, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (40, 900)])
def test_tiny_and_long_pictures_get_masks_too(kind, size):
    mask = masks.draw_mask(kind, size, np.random.default_rng(0))
    assert mask.shape == size
    assert mask.any()


def test_full_covers_all_and_border_touches_the_border():
    rng = np.random.default_rng(0)
    assert masks.draw_mask("full", (16, 16), rng).all()
    for _ in range(20):
        mask = masks.border((40, 60), rng) > 0
        assert any(edge.all() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
        assert not mask.all()


def test_glid_is_full_in_a_fifth_of_cases():
    drawn = [masks.draw_mask("glid", (32, 32), np.random.default_rng(i)).all() for i in range(400)]
    assert 0.13 < np.mean(drawn) < 0.27


def test_each_rectangle_is_at_most_half_the_picture(monkeypatch):
    shares = []
    monkeypatch.setattr(masks, "_box", lambda mask, rng, h, w: shares.append(h * w / mask.size))
    for seed in range(200):
        masks.rectangles((50, 80), np.random.default_rng(seed))
    assert 0.45 < max(shares) < 0.52  # sides are whole pixels
    assert len(shares) > 400


def test_object_masks_cover_an_object_and_a_rim():
    thing = np.zeros((100, 100), np.uint8)
    thing[40:70, 30:60] = 255
    tiny = np.zeros((100, 100), np.uint8)
    tiny[0, 0] = 255
    huge = np.full((100, 100), 255, np.uint8)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mask = masks.draw_mask("object", (100, 100), rng, (0.05, 0.5), lambda: [tiny, thing, huge])
        assert (mask[thing > 0] == 255).all()
        assert masks.area_of(mask) > masks.area_of(thing)
        assert mask[0, 0] == 0


def test_object_boxes_tell_no_outline():
    thing = np.zeros((100, 100), np.uint8)
    thing[20:60, 40:50] = 255
    thing[55:60, 20:50] = 255
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mask = masks.draw_mask("object-box", (100, 100), rng, (0.05, 0.5), lambda: [thing])
        rows, columns = np.nonzero(mask)
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        assert mask[thing > 0].all()
    np.testing.assert_array_equal(np.nonzero(masks.box_around(thing, 3).any(0))[0], range(17, 53))


def test_without_a_fitting_object_strokes_are_drawn():
    rngs = [np.random.default_rng(5) for _ in range(2)]
    strokes = masks.draw_mask("strokes", (64, 64), rngs[0])
    np.testing.assert_array_equal(masks.draw_mask("object", (64, 64), rngs[1]), strokes)


def test_weights_choose_the_kinds():
    recipe = masks.make_recipe(("full=3", "circle=1"), (0.1, 0.3))
    drawn = [recipe.draw((32, 32), np.random.default_rng(i)).all() for i in range(300)]
    assert 0.68 < np.mean(drawn) < 0.82
    never = masks.make_recipe(("full=0", "circle"), (0.1, 0.3))
    assert not any(never.draw((32, 32), np.random.default_rng(i)).all() for i in range(50))


@pytest.mark.parametrize(
    ("kinds", "area", "words"),
    [
        (("blob",), (0.1, 0.3), "no mask kind is called 'blob'"),
        (("strokes=much",), (0.1, 0.3), "must be a number"),
        (("strokes=-1",), (0.1, 0.3), "never negative"),
        (("strokes=0",), (0.1, 0.3), "weight 0"),
        (("strokes",), (0.4, 0.3), "no range"),
        (("strokes",), (0.0, 0.3), "no range"),
    ],
)
def test_impossible_recipes_are_refused(kinds, area, words):
    with pytest.raises(UserError, match=words):
        masks.make_recipe(kinds, area)


def test_masks_for_people(tmp_path):
    text = masks.make_test_mask(MaskOptions(out=tmp_path, kind="text", text="HOLE", size="200x80"))
    assert text.shape == (80, 200)
    assert 0.1 < masks.area_of(text) < 0.7
    assert not text[[0, -1]].any()
    circle = masks.make_test_mask(MaskOptions(out=tmp_path, kind="circle", area=(0.2, 0.2001)))
    assert abs(masks.area_of(circle) - 0.2) < 0.001
    for options, words in [
        (MaskOptions(out=tmp_path, size="12"), "is no size"),
        (MaskOptions(out=tmp_path, size="0x5"), "is no size"),
        (MaskOptions(out=tmp_path, kind="blob"), "no mask kind"),
        (MaskOptions(out=tmp_path, area=(0.5, 0.1)), "no range"),
    ]:
        with pytest.raises(UserError, match=words):
            masks.make_test_mask(options)


@pytest.mark.parametrize("name", sorted(masks.MIXTURES))
def test_mixtures_draw_each_of_their_parts(name, monkeypatch):
    drawn = []
    for part in masks.MIXTURES[name]:
        painter = masks.MASKS[part]
        monkeypatch.setitem(
            masks.MASKS,
            part,
            lambda s, r, part=part, painter=painter: drawn.append(part) or painter(s, r),
        )
    for seed in range(60):
        masks.draw_mask(name, (64, 64), np.random.default_rng(seed), (0.0, 1.0))
    counts = {part: drawn.count(part) / 60 for part in masks.MIXTURES[name]}
    assert all(abs(counts[p] - share) < 0.2 for p, share in masks.MIXTURES[name].items())

"""Procedural skins are pictures with exact truth: hint, labels and words belong together."""

import numpy as np
import pytest

from controlfill.data.skin_world import CANVAS, SKIN_WORLDS, SkinSource
from controlfill.data.sources import open_source
from controlfill.data.worlds import HELD_OUT
from controlfill.evaluation.keyfit import key_fit
from controlfill.options import DataOptions
from controlfill.skins.draw import edge_hint
from controlfill.skins.themes import draw_theme, fonts, is_installed


def open_world(name, held_out=False):
    return open_source(f"world:{name}", DataOptions(max_train_samples=20), held_out=held_out)


def test_a_seed_is_always_the_same_skin_and_each_another():
    source = open_world("skins")
    one, again, other = source[3], source[3], source[4]
    assert np.array_equal(one.image, again.image)
    assert one.prompt == again.prompt
    assert not np.array_equal(one.image, other.image)
    assert one.image.shape[:2] == one.hint.shape[:2] == CANVAS
    assert (source.sizes() == CANVAS).all()


@pytest.mark.parametrize("index", range(6))
def test_hint_and_labels_lie_where_the_picture_has_them(index):
    source = SkinSource(SKIN_WORLDS["skins"], 0, 10)
    sample, layout = source[index], source.layout_of(index)
    assert key_fit(sample.image, layout).share == 1
    strokes = sample.hint.max(axis=2) > edge_hint(layout).max(axis=2)
    inside = np.zeros(CANVAS, bool)
    for label in sample.labels:
        assert strokes[label.box.top : label.box.bottom, label.box.left : label.box.right].any()
        label.box.of(inside)[:] = True
    assert not strokes[~inside].any()
    assert {label.text for label in sample.labels} == {s.label for s in layout.labelled}
    assert set("".join(label.text for label in sample.labels)) <= set(source.signs)


def test_bare_skins_say_so_in_the_hint_and_mixed_ones_are_both():
    bare = open_world("skins-bare")
    assert bare.signs == ""
    assert np.array_equal(bare[0].hint, edge_hint(bare.source.layout_of(0)))
    mixed = [open_world("skins-mixed")[i] for i in range(20)]
    assert 2 <= sum(not sample.labels for sample in mixed) <= 12
    edges = open_world("skins-edges")
    assert edges[0].labels
    assert np.array_equal(edges[0].hint, edge_hint(edges.source.layout_of(0)))


def test_what_is_held_out_has_words_of_its_own():
    learned = {draw_theme(seed).caption for seed in range(3000)}
    kept = {draw_theme(HELD_OUT + seed, held_out=True).caption for seed in range(300)}
    assert not learned & kept
    assert len(kept) > 150
    assert open_world("skins", held_out=True)[0].prompt in kept


def test_fonts_are_those_that_are_there(monkeypatch):
    assert all(is_installed(str(name)) for name in fonts())
    assert not is_installed("no-such-font.ttf")
    monkeypatch.setattr("controlfill.skins.themes.FONTS", ("no-such-font.ttf",))
    fonts.cache_clear()
    try:
        assert SkinSource(SKIN_WORLDS["skins"], 0, 4)[0].labels
    finally:
        fonts.cache_clear()


def test_chinese_labels_are_drawn_where_a_font_has_them():
    from controlfill.skins.draw import HAN

    if not any(is_installed(name) for name in HAN):
        pytest.skip("no font with Chinese signs is installed")
    sample = open_world("skins-zh")[0]
    assert {"删除", "空格", "ABC"} <= {label.text for label in sample.labels}

"""Themes are functions of their seed, and their part sets make the skins they describe."""

import numpy as np
import pytest

from controlfill.cli import run
from controlfill.images import as_photo
from controlfill.skins.compose import compose
from controlfill.skins.layout import open_layout
from controlfill.skins.themes import CONTRASTS, GROUNDS, HUES, SHAPES, draw_skin, draw_theme


def test_a_seed_is_a_theme_and_all_of_them_are_drawn():
    themes = [draw_theme(seed) for seed in range(150)]
    assert themes[7] == draw_theme(7)
    assert {t.ground for t in themes} == set(GROUNDS)
    assert {t.hue for t in themes} == {t.key_hue for t in themes} == set(HUES)
    assert {t.shape for t in themes} == set(SHAPES)
    assert {t.contrast for t in themes} == set(CONTRASTS)
    assert {t.dark for t in themes} == {True, False}
    assert len({t.caption for t in themes}) > 140
    layout = open_layout("t9").at((160, 256))
    again = [draw_skin(themes[3], layout).image for _ in range(2)]
    np.testing.assert_array_equal(*again)


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_all_that_bare_skins_lack(seed):
    layout = open_layout("qwerty-26").at((320, 512))
    skin = draw_skin(draw_theme(seed), layout)
    changed = (skin.image != skin.bare).any(axis=2)
    assert 0.01 < changed.mean() < 0.15


def test_part_sets_compose_without_complaint(tmp_path, capsys):
    layout = open_layout("qwerty-26")
    assert run(["skin", "themes", str(tmp_path / "t"), "--count", "3", "--seed", "5"]) == 0
    for number in range(3):
        folder = tmp_path / "t" / f"theme_{number:03}"
        composed = compose(layout, folder)
        assert composed.reports == []
        theme = draw_theme(5 + number)
        assert (folder / "caption.txt").read_text().strip() == theme.caption
        bare = draw_skin(theme, layout).bare.astype(int)
        key = next(slot.box for slot in layout.slots if slot.name == "q")
        np.testing.assert_allclose(key.of(composed.image), key.of(bare), atol=12)
    skin = tmp_path / "skin.png"
    assert run(["skin", "compose", str(tmp_path / "t" / "theme_000"), str(skin)]) == 0
    capsys.readouterr()
    assert run(["skin", "check", str(skin)]) == 0
    assert "KeyFit 1.00: 0 of 39 keys" in capsys.readouterr().out
    assert run(["skin", "check", str(skin), "--layout", "t9"]) == 0
    said = capsys.readouterr().out
    assert "not in place: " in said
    assert "KeyFit 0." in said
    assert as_photo(skin).size == (640, 1024)
    assert run(["skin", "themes", str(tmp_path / "t")]) == 2

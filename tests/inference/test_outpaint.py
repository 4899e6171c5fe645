"""Outpainting gives the size asked for and leaves the old picture's bytes alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from controlfill.cli import run
from controlfill.errors import UserError
from controlfill.images import Photo
from controlfill.inference.outpaint import Sides, choose_sides, enlarge, outpaint
from controlfill.options import GrowOptions

FAST = {"num_inference_steps": 1}
SIDE = st.integers(0, 1000)


@settings(max_examples=100, deadline=None)
@given(left=SIDE, right=SIDE, top=SIDE, bottom=SIDE)
def test_the_canvas_is_as_asked(left, right, top, bottom):
    image = np.full((5, 7, 3), 200, np.uint8)
    sides = Sides(left=left, right=right, top=top, bottom=bottom)
    photo, hole = enlarge(Photo(rgb=image), sides)
    assert photo.size == hole.shape == (5 + top + bottom, 7 + left + right)
    np.testing.assert_array_equal(photo.rgb[top : top + 5, left : left + 7], image)
    assert int((hole == 0).sum()) == 35
    assert not hole[top : top + 5, left : left + 7].any()


@pytest.mark.parametrize(
    "sides", [{"left": 1}, {"top": 3, "right": 50}, {"bottom": 1000}, {"left": 130, "top": 97}]
)
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "unipc", "dpm++2m", "euler"])
def test_sizes_are_exact_and_known_bytes_stay(pipe, photo, sides, scheduler):
    options = GrowOptions(**sides, **FAST, scheduler=scheduler)
    result = outpaint(pipe, photo, options)
    top, left = sides.get("top", 0), sides.get("left", 0)
    wanted = (45 + top + sides.get("bottom", 0), 70 + left + sides.get("right", 0), 3)
    assert result.image.shape == wanted
    np.testing.assert_array_equal(result.image[top : top + 45, left : left + 70], photo)


def test_a_feather_stays_within_its_pixels(pipe, photo):
    result = outpaint(pipe, photo, GrowOptions(left=20, feather=6, **FAST))
    np.testing.assert_array_equal(result.image[:, 26:], photo[:, 6:])
    assert not np.array_equal(result.image[:, 20:26], photo[:, :6])


def test_a_canvas_grown_later_has_the_same_noise(pipe, photo):
    """With one window and no step that mixes places, equal cells see equal noise."""
    from controlfill.inference import generate as room

    seen = []
    draw = room.draw_noise
    room.draw_noise = lambda *args: seen.append(draw(*args)) or seen[-1]
    try:
        outpaint(pipe, photo, GrowOptions(right=10, **FAST))
        outpaint(pipe, photo, GrowOptions(right=10, left=9, top=4, **FAST))
    finally:
        room.draw_noise = draw
    first, later = seen
    assert later.shape[-1] > first.shape[-1]
    np.testing.assert_array_equal(later[0, :, 1:12, 3:20], first[0, :, :11, :17])


def test_alpha_of_what_is_new_is_opaque(pipe, photo):
    alpha = np.full(photo.shape[:2], 7, np.uint8)
    result = outpaint(pipe, Photo(rgb=photo, alpha=alpha), GrowOptions(left=5, **FAST))
    assert result.alpha is not None
    assert set(result.alpha[:, :5].ravel()) == {255}
    assert set(result.alpha[:, 5:].ravel()) == {7}


def sides_of(**options):
    return choose_sides((40, 60), GrowOptions(**options))


def test_ways_to_say_how_large():
    assert sides_of(left=3, bottom=4) == Sides(left=3, bottom=4)
    assert sides_of(expand="50%") == Sides(left=30, right=30, top=20, bottom=20)
    assert sides_of(expand="0.25") == Sides(left=15, right=15, top=10, bottom=10)
    assert sides_of(to="100x80") == Sides(left=20, right=20, top=20, bottom=20)
    assert sides_of(to="101x40") == Sides(left=20, right=21)
    assert sides_of(to="100x80", anchor="top-left") == Sides(right=40, bottom=40)
    assert sides_of(to="100x80", anchor="bottom") == Sides(left=20, right=20, top=40)
    assert sides_of(to="100x80", anchor="right") == Sides(left=40, top=20, bottom=20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "in one way"),
        ({"left": 3, "expand": "10%"}, "in one way"),
        ({"expand": "10%", "to": "99x99"}, "in one way"),
        ({"expand": "much"}, "--expand 'much' is no share"),
        ({"expand": "0"}, "is no share"),
        ({"to": "large"}, "--to 'large' is no size"),
        ({"to": "60x40"}, "not larger than the picture, which is 60x40"),
        ({"to": "59x400"}, "never shrinks"),
    ],
)
def test_mistakes_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        sides_of(**options)


def test_the_command(photo, tmp_path, capsys):
    Image.fromarray(photo).save(tmp_path / "i.png")
    words = ["outpaint", str(tmp_path / "i.png"), "--num_inference_steps", "1", "--device", "cpu"]
    assert (
        run([*words, "--output_dir", str(tmp_path / "o"), "--to", "99x50", "--anchor", "left"]) == 0
    )
    with Image.open(tmp_path / "o" / "outpainted.png") as made:
        assert made.size == (99, 50)
        np.testing.assert_array_equal(np.asarray(made)[2:47, :70], photo)
    assert run([*words, "--left", "-3"]) == 2
    assert "--left is -3; at least 0 is needed" in capsys.readouterr().err


def test_the_python_way_in(pipe, photo):
    result = pipe.outpaint(photo, "a red star", left=8, num_inference_steps=1, seed=3)
    assert result.image.shape == (45, 78, 3)
    assert result.settings["left"] == 8
    assert result.settings["prompt"] == "a red star"

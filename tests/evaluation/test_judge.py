"""The judge says yes to the truth and no to everything else."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from controlfill.data.masks import box_around
from controlfill.data.worlds import COLOURS, HELD_OUT, WORLDS
from controlfill.evaluation.judge import judge

WORLD = WORLDS["shapes"]
PICTURES = [WORLD.draw(HELD_OUT + 900_000 + i) for i in range(150)]


def verdicts(change=lambda picture: (picture.image, picture.truth)):
    return np.array(
        [
            (v.colour, v.shape)
            for p in PICTURES
            for image, truth in [change(p)]
            for v in [judge(image, box_around(p.object_mask, 3), truth, WORLD)]
        ]
    )


def test_yes_to_the_truth():
    assert verdicts().mean(axis=0).min() >= 0.99


def test_yes_to_the_truth_after_noise_and_blur():
    rng = np.random.default_rng(0)

    def worn(picture):
        noisy = picture.image + rng.normal(0, 8, picture.image.shape)
        return cv2.GaussianBlur(noisy.clip(0, 255).astype(np.uint8), (3, 3), 0.7), picture.truth

    assert verdicts(worn)[:, 1].mean() >= 0.95


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_no_to_another_shape(shift):
    def other(picture):
        place = (WORLD.shapes.index(picture.truth.shape) + shift) % len(WORLD.shapes)
        return picture.image, replace(picture.truth, shape=WORLD.shapes[place])

    result = verdicts(other)
    assert result[:, 0].mean() >= 0.99  # the colour is still right
    assert result[:, 1].mean() <= 0.01


def test_no_to_another_colour():
    def other(picture):
        taken = {picture.truth.colour, *picture.truth.ground_colours}
        colour = next(c for c in WORLD.colours if c not in taken)
        return picture.image, replace(picture.truth, colour=colour)

    assert verdicts(other).mean() <= 0.01


def test_no_to_an_empty_ground():
    def erased(picture):
        ground = np.array(COLOURS[picture.truth.ground_colours[0]], np.uint8)
        return np.broadcast_to(ground, picture.image.shape).copy(), picture.truth

    assert verdicts(erased).mean() <= 0.01


def test_no_to_half_an_object():
    def halved(picture):
        image = picture.image.copy()
        columns = np.nonzero(picture.object_mask.any(axis=0))[0]
        middle = int(columns.mean())
        image[:, middle:] = COLOURS[picture.truth.ground_colours[0]]
        return image, picture.truth

    assert verdicts(halved)[:, 1].mean() <= 0.1


def test_no_to_noise_in_the_right_colour():
    rng = np.random.default_rng(0)

    def speckled(picture):
        image = np.broadcast_to(
            np.array(COLOURS[picture.truth.ground_colours[0]], np.uint8), picture.image.shape
        ).copy()
        image[rng.uniform(size=image.shape[:2]) < 0.5] = COLOURS[picture.truth.colour]
        return image, picture.truth

    assert verdicts(speckled)[:, 1].mean() <= 0.01


def test_an_object_outside_the_hole_does_not_count():
    for picture in PICTURES[:20]:
        elsewhere = 255 - box_around(picture.object_mask, 3)
        assert not judge(picture.image, elsewhere, picture.truth, WORLD).shape

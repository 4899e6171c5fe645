"""Masks mean what their giver says, and only what is needed is looked at."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from controlfill.errors import UserError
from controlfill.evaluation.metrics import rim_steps
from controlfill.images import Photo
from controlfill.inference import complete as room
from controlfill.inference.complete import inpaint
from controlfill.inference.fill import FILLS, fill_with
from controlfill.inference.holes import Box, choose_boxes, fit_colours, open_hole, repair_seams
from controlfill.options import HoleOptions

FAST = {"num_inference_steps": 2}


def opened(mask, photo, **options):
    return open_hole(mask, Photo(rgb=photo), HoleOptions(**options))


def test_polarities_say_the_same_hole(photo, hole):
    alpha = np.dstack([np.zeros_like(photo), 255 - hole])
    np.testing.assert_array_equal(opened(hole, photo), hole)
    np.testing.assert_array_equal(opened(255 - hole, photo, mask_polarity="black"), hole)
    np.testing.assert_array_equal(opened(alpha, photo, mask_polarity="transparent"), hole)
    np.testing.assert_array_equal(opened(255 - hole, photo, invert_mask=True), hole)
    np.testing.assert_array_equal(opened(hole // 255, photo), hole)
    with pytest.raises(UserError, match="no transparency; save it as RGBA"):
        opened(hole, photo, mask_polarity="transparent")
    with pytest.raises(UserError, match="all black"):
        opened(hole, photo, grow_mask=-40)
    with pytest.raises(UserError, match="the mask is 69x45 but the picture is 70x45"):
        opened(255 - hole[:, 1:], photo, mask_polarity="black")


def test_a_hole_grows_and_shrinks(photo, hole):
    grown, shrunk = (opened(hole, photo, grow_mask=n) for n in (3, -3))
    assert (grown[hole > 0] == 255).all()
    assert (grown[7:33, 20:50] == 255).all()
    assert not grown[:7].any()
    np.testing.assert_array_equal(shrunk[13:27, 23:47], 255)
    assert (shrunk > 0).sum() == 14 * 24


def test_greys_are_kept_only_when_asked(photo, hole):
    grey = hole.copy()
    grey[:, :35] //= 4
    assert set(np.unique(opened(grey, photo))) == {0, 255}
    np.testing.assert_array_equal(opened(grey, photo, soft_mask=True), grey)


def test_boxes_surround_the_hole():
    hole = np.zeros((400, 600), np.uint8)
    hole[100:140, 500:580] = 255
    (whole,) = choose_boxes(hole, 64, HoleOptions())
    assert whole == Box(top=0, left=0, height=400, width=600)
    (near,) = choose_boxes(hole, 64, HoleOptions(only_masked=True))
    assert near == Box(top=68, left=456, height=104, width=144)
    (wide,) = choose_boxes(hole, 64, HoleOptions(only_masked=True, context=3))
    assert wide == Box(top=60, left=360, height=120, width=240)
    (native,) = choose_boxes(hole, 512, HoleOptions(only_masked=True))
    assert native == Box(top=0, left=88, height=400, width=512)


def test_a_box_of_ones_own(photo, hole):
    box = (10, 5, 50, 40)
    assert choose_boxes(hole, 64, HoleOptions(context_box=box)) == [
        Box(top=5, left=10, height=40, width=50)
    ]
    for bad in ((25, 5, 40, 40), (10, 5, 61, 40), (-1, 5, 50, 40)):
        with pytest.raises(UserError, match=r"around the hole, whose box is 20 10 30 20"):
            choose_boxes(hole, 64, HoleOptions(context_box=bad))


def test_holes_apart_have_boxes_apart_and_close_ones_share():
    hole = np.zeros((300, 900), np.uint8)
    for left in (20, 60, 700):
        hole[100:120, left : left + 20] = 255
    boxes = choose_boxes(hole, 64, HoleOptions(separate_holes=True))
    assert len(boxes) == 2
    assert not boxes[0].touches(boxes[1])
    assert sum(int((b.of(hole) > 0).sum()) for b in boxes) == int((hole > 0).sum())


@pytest.mark.parametrize(
    "options",
    [{"only_masked": True}, {"context_box": (10, 5, 50, 40)}, {"separate_holes": True},
     {"soft_mask": True}, {"strength": 0.5}, {"fill": "mirror", "strength": 0.0},
     {"match_colours": True}, {"grow_mask": 4}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_known_bytes_stay_whatever_is_asked(pipe, photo, hole, options):
    mask = hole.copy()
    mask[:, :30] //= 2
    if "context_box" not in options:
        mask[40:44, 2:6] = 255
    asked = HoleOptions(**options, **FAST)
    result = inpaint(pipe, photo, mask, asked)
    kept = open_hole(mask, Photo(rgb=photo), asked) == 0
    np.testing.assert_array_equal(result.image[kept], photo[kept])
    assert not np.array_equal(result.image[~kept], photo[~kept])


def test_the_networks_see_only_the_box(pipe, photo, monkeypatch):
    sizes, told = [], []
    generate = room.generate_batch

    def watched(pipeline, batch, *rest):
        sizes.append(tuple(batch.image.shape[2:]))
        return generate(pipeline, batch, *rest)

    monkeypatch.setattr(room, "generate_batch", watched)
    large = np.tile(photo, (10, 10, 1))
    mask = np.zeros(large.shape[:2], np.uint8)
    mask[30:40, 30:40] = mask[300:320, 600:610] = 255
    options = HoleOptions(separate_holes=True, **FAST)
    result = inpaint(pipe, large, mask, options, lambda *at: told.append(at))
    assert sizes == [(80, 80), (96, 80)]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (result.image[mask > 0] != large[mask > 0]).any(axis=1).mean() > 0.9


def test_little_strength_changes_little(pipe, photo, hole):
    def change(**options):
        made = inpaint(pipe, photo, hole, HoleOptions(num_inference_steps=10, **options)).image
        return float(np.abs(made[hole > 0].astype(int) - photo[hole > 0]).mean())

    assert change(strength=0.1) < change(strength=0.6) < change()
    told = []
    options = HoleOptions(num_inference_steps=10, strength=0.3)
    inpaint(pipe, photo, hole, options, lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "unipc", "dpm++2m", "euler"])
def test_strength_on_every_scheduler(pipe, photo, hole, scheduler):
    options = {"num_inference_steps": 8, "scheduler": scheduler}
    near, far = (
        inpaint(pipe, photo, hole, HoleOptions(**options, strength=s)).image for s in (0.15, 0.9)
    )
    distances = [np.abs(m[hole > 0].astype(int) - photo[hole > 0]).mean() for m in (near, far)]
    assert distances[0] < distances[1]


def test_greys_say_how_much_changes(pipe, photo, hole):
    def change(grey):
        mask = np.where(hole > 0, grey, 0).astype(np.uint8)
        options = HoleOptions(num_inference_steps=10, soft_mask=True)
        made = inpaint(pipe, photo, mask, options).image
        return float(np.abs(made[hole > 0].astype(int) - photo[hole > 0]).mean())

    assert change(40) < change(140) < change(255)


def test_a_fill_is_what_sampling_starts_from(pipe, photo, hole):
    filled = fill_with("mean", photo, hole)
    alone = inpaint(pipe, photo, hole, HoleOptions(fill="mean", strength=0.0))
    np.testing.assert_array_equal(alone.image, filled)
    some = {"num_inference_steps": 10, "strength": 0.2}
    from_mean = inpaint(pipe, photo, hole, HoleOptions(fill="mean", **some)).image
    from_old = inpaint(pipe, photo, hole, HoleOptions(**some)).image
    inside, made = filled[hole > 0].astype(int), (from_mean[hole > 0], from_old[hole > 0])
    assert np.abs(made[0] - inside).mean() < np.abs(made[1] - inside).mean()


@pytest.mark.parametrize("name", sorted(FILLS))
def test_fills_keep_what_is_known_and_use_its_colours(name, photo, hole):
    filled = fill_with(name, photo, hole)
    np.testing.assert_array_equal(filled[hole == 0], photo[hole == 0])
    again = fill_with(name, photo, hole)
    np.testing.assert_array_equal(filled, again)
    low, high = (getattr(photo[hole == 0], end)(axis=0).astype(int) for end in ("min", "max"))
    inside = filled[hole > 0].astype(int)
    assert (inside >= low - 40).all()
    assert (inside <= high + 40).all()
    blind = fill_with(name, np.where(hole[..., None] > 0, np.uint8(255), photo), hole)
    np.testing.assert_array_equal(filled, blind)


def test_mirrors_mirror_and_edges_repeat():
    image = np.arange(10, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2) * 20
    hole = np.zeros((8, 10), np.uint8)
    hole[:, 6:] = 255
    assert fill_with("edge", image, hole)[4, :, 0].tolist() == [0, 20, 40, 60, 80, 100] + [100] * 4
    mirrored = fill_with("mirror", image, hole)[4, :, 0].tolist()
    assert mirrored == [0, 20, 40, 60, 80, 100, 80, 60, 40, 20]
    assert set(fill_with("mean", image, hole)[4, 6:, 0]) == {50}


def test_a_mosaic_is_the_reflection_in_tiles():
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    hole = np.zeros((48, 48), np.uint8)
    hole[:, 24:] = 255
    made = fill_with("mosaic", image, hole)[:, 24:].astype(int)
    tiles = made.reshape(24, 2, 12, 2, 3)
    assert (tiles == tiles[:, :1, :, :1]).all()
    mirrored = fill_with("mirror", image, hole)[:, 24:].reshape(24, 2, 12, 2, 3).mean(axis=(1, 3))
    assert np.abs(tiles[:, 0, :, 0] - mirrored).max() <= 1


def test_noise_has_the_colours_of_the_picture():
    rng = np.random.default_rng(0)
    image = rng.choice([10, 200], (64, 64, 1), p=[0.7, 0.3]).repeat(3, 2).astype(np.uint8)
    hole = np.zeros((64, 64), np.uint8)
    hole[:, 32:] = 255
    made = fill_with("noise", image, hole)[hole > 0][:, 0]
    assert abs(float((made > 100).mean()) - 0.3) < 0.03


def test_lost_colours_are_given_back(photo, hole):
    darker = (photo * 0.8).astype(np.uint8)
    fitted = fit_colours(darker, photo, hole)
    before, after = (np.abs(p.astype(int) - photo).mean() for p in (darker, fitted))
    assert after < before / 3
    everything = np.full_like(hole, 255)
    np.testing.assert_array_equal(fit_colours(darker, photo, everything), darker)


def test_a_membrane_takes_away_an_even_error_and_leaves_the_texture(photo, hole):
    """What is the same everywhere is no texture but a loss; repaired, nothing of it is left."""
    rng = np.random.default_rng(0)
    truth = np.clip(photo.astype(int) // 2 + rng.integers(0, 40, photo.shape) + 40, 0, 255)
    truth = truth.astype(np.uint8)
    rows = np.linspace(-20, 20, 45).round().astype(int)[:, None, None]
    darker = (truth + rows).astype(np.uint8)
    repaired = repair_seams(darker, truth, hole > 0, 1000).astype(int)
    before, after = (np.abs(m.astype(int) - truth)[hole > 0].mean() for m in (darker, repaired))
    assert after < before / 4
    near = repair_seams(darker, truth, hole > 0, 2).astype(int)
    assert (near[20, 35] == darker[20, 35]).all()
    rim = near[10, 20:50] - truth[10, 20:50].astype(int)
    assert np.abs(rim).mean() < 2
    assert (repair_seams(darker, truth, np.ones_like(hole) > 0, 8) == darker).all()


@pytest.mark.parametrize("feather", [0, 5])
def test_seams_are_repaired_unless_told_otherwise(pipe, photo, hole, feather):
    asked = HoleOptions(num_inference_steps=2, feather=feather)
    with_, without = (
        inpaint(pipe, photo, hole, replace(asked, repair_seams=on)).image for on in (True, False)
    )
    # A feather hides most of the step already.
    most = 0.95 if feather else 0.8
    assert rim_steps(with_, hole > 0) < most * rim_steps(without, hole > 0)
    far = cv2.distanceTransform((hole == 0).astype(np.uint8), cv2.DIST_L2, 5) > feather + 1
    assert (with_[far] == photo[far]).all()

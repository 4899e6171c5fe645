"""Each measure tells right layouts from wrong ones, and what is wrong from what is merely soft."""

import cv2
import numpy as np
import pytest

from controlfill.evaluation.adherence import (
    adherence,
    edge_recall,
    key_ious,
    key_outlines,
    label_areas,
    normalised,
    plain_skin,
    shuffled_layout,
)
from controlfill.skins.draw import edge_hint
from controlfill.skins.layout import Layout, open_layout
from controlfill.skins.themes import draw_skin, draw_theme

NAMES = ("qwerty-26", "t9")


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A layout, the other one, and six themes on it."""
    other = next(name for name in NAMES if name != request.param)
    layouts = [open_layout(name).at((320, 512)) for name in (request.param, other)]
    return *layouts, [draw_skin(draw_theme(seed), layouts[0]).image for seed in range(6)]


def test_a_clean_drawing_is_perfect(case):
    found = adherence(plain_skin(case[0]), case[0]).figures()
    assert found == pytest.approx(
        {"key_fit": 1, "edge_recall": 1, "key_iou": 1, "sides_found": 1, "offset_median": 0,
         "offset_p95": 0}, abs=0.005,
    )  # fmt: skip


def test_right_layouts_score_high_and_wrong_ones_low(case):
    layout, other, images = case
    wrong = (other, shuffled_layout(layout, 0), shuffled_layout(layout, 1))
    right = [adherence(image, layout).figures() for image in images]
    assert min(found["key_iou"] for found in right) > 0.8
    assert np.mean([found["edge_recall"] for found in right]) > 0.9
    for another in wrong:
        found = [adherence(image, another, layout).figures() for image in images]
        assert max(f["key_iou"] for f in found) < 0.7
        assert np.mean([f["edge_recall"] for f in found]) < 0.8
        assert max(f["key_fit"] for f in found) < 0.3


def test_normalised_recall_is_not_deceived_by_edges_everywhere(case):
    layout, _, images = case
    noise = np.random.default_rng(0).integers(0, 256, images[0].shape).astype(np.uint8)
    shuffled = shuffled_layout(layout)

    def place(image):
        hidden = label_areas(layout)
        scores = [edge_recall(image, found, hidden) for found in (layout, shuffled)]
        return normalised(*scores, ceiling=1)

    assert edge_recall(noise, layout) > 0.9
    assert place(noise) < 0.1
    assert np.mean([place(image) for image in images]) > 0.8
    assert place(plain_skin(shuffled)) == 0


def test_on_the_way_from_floor_to_ceiling():
    assert normalised(0.75, 0.5, 1) == 0.5
    assert normalised(0.2, 0.9, 1) == -1
    assert normalised(1, 0.99, 1) == 0
    assert normalised(1, 1, 1) == 0
    assert normalised(0.9, 0.9, 0.8) == 0


def test_labels_are_looked_away_from(case):
    layout, _, _ = case
    clean = plain_skin(layout)
    written = draw_skin(draw_theme(0), layout)
    hidden = label_areas(layout)
    assert not (written.image != written.bare).any(axis=2)[~hidden].any()
    assert not (key_outlines(layout) & hidden).any()
    inner = cv2.erode(hidden.astype(np.uint8), np.ones((7, 7))) > 0
    striped = np.where(inner[..., None], (np.arange(512) % 8 < 4)[None, :, None] * 255, clean)
    shuffled = shuffled_layout(layout)
    pictures = [clean, striped.astype(np.uint8)]
    looked = [edge_recall(p, shuffled) for p in pictures]
    away = [edge_recall(p, shuffled, hidden) for p in pictures]
    assert looked[1] > looked[0] + 0.05
    assert away[1] == pytest.approx(away[0], abs=0.03)


def test_missing_and_shifted_keys_are_measured(case):
    layout, _, _ = case
    image = plain_skin(layout)
    gone = [slot.name for slot in layout.keys[3:6]]
    for slot in layout.keys[3:6]:
        slot.box.of(image)[:] = 110
    ious = key_ious(image, layout)
    assert {name for name, iou in ious.items() if iou < 0.5} == set(gone)
    moved = np.roll(plain_skin(layout), (2, 2), (0, 1))
    found = adherence(moved, layout).figures()
    assert found["offset_median"] == 2
    assert found["key_fit"] == 0
    assert 0.7 < found["key_iou"] < 0.97


def test_where_nothing_is_nothing_is_found(case):
    layout, _, _ = case
    found = adherence(np.full((*layout.size, 3), 99, np.uint8), layout).figures()
    assert found == {"key_fit": 0, "edge_recall": 0, "key_iou": 0, "sides_found": 0}


@pytest.mark.parametrize("name", [*NAMES, "keyboard-parts-4"])
@pytest.mark.parametrize("size", [(640, 1024), (320, 512), (80, 128)])
def test_shuffled_layouts_have_the_same_keys_at_other_places(name, size):
    layout = open_layout(name).at(size)
    first, again, other = (shuffled_layout(layout, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [(s.name, s.label, s.role) for s in first.slots] == [
        (s.name, s.label, s.role) for s in layout.slots
    ]
    taken = np.zeros(size, int)
    for key in first.keys:
        assert min(key.box.size) >= 3
        key.box.of(taken)[:] += 1
    kept = [a.box == b.box for a, b in zip(first.keys, layout.keys, strict=True)]
    assert np.mean(kept) < 0.1
    if size != (80, 128):  # where keys are as large as need be, they don't touch
        assert taken.max() == 1
    assert (edge_hint(first) != edge_hint(layout)).any()


def test_a_layout_without_keys_has_no_score():
    layout = Layout(name="bare", size=(64, 64), slots=())
    found = adherence(plain_skin(layout), layout).figures()
    assert found == {"key_fit": 0, "edge_recall": 0, "key_iou": 0, "sides_found": 0}
    assert shuffled_layout(layout).slots == ()

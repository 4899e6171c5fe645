"""Aspect-ratio buckets: areas bounded, shapes near the pictures' own, every picture once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlfill.data.buckets import (
    batches_per_epoch,
    bucket_sizes,
    epoch_of_buckets,
    make_buckets,
)
from controlfill.data.masks import make_recipe
from controlfill.data.sample import Preparation, PreparedSource, Sample
from controlfill.errors import UserError
from controlfill.training.batches import Bucketed, Places


@pytest.mark.parametrize(("side", "multiple"), [(512, 64), (64, 16), (1024, 64), (256, 8)])
def test_sizes_keep_to_the_area_and_the_multiple(side, multiple):
    sizes = bucket_sizes(side, multiple)
    assert (side, side) in sizes
    assert all(h % multiple == 0 == w % multiple for h, w in sizes)
    assert all(h * w <= side * side for h, w in sizes)
    assert all(0.5 <= h / w <= 2 for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)


def test_pictures_go_where_their_shape_is_nearest():
    buckets = make_buckets(np.array([(480, 640), (640, 480), (500, 500), (10, 5000)]), 512, 64)
    assert buckets.size_of(0) == (448, 576)
    assert buckets.size_of(1) == (576, 448)
    assert buckets.size_of(2) == (512, 512)
    assert buckets.size_of(3) == (384, 640)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 9))
def test_every_picture_comes_once_and_batches_are_of_one_bucket(of, size, seed):
    of = np.array(of)
    batches = list(epoch_of_buckets(of, size, np.random.default_rng(seed)))
    assert len(batches) == batches_per_epoch(of, size)
    assert all(len(batch) == size and len(set(of[batch])) == 1 for batch in batches)
    assert set(np.concatenate(batches).tolist()) == set(range(len(of)))


def test_ranks_share_the_batches_and_epochs_differ():
    order = Bucketed(np.array([0] * 7 + [1] * 9), 2, seed=3)
    assert order.batches_per_epoch() == 9
    ranks = [list(Places(order, rank, 3).between(0, 3)) for rank in range(3)]
    batches = [batch for rank in ranks for batch in rank]
    assert {index for batch in batches for _, index in batch} == set(range(16))
    assert [index for _, index in order.batch(0)] != [index for _, index in order.batch(9)]


class Wide:
    """Pictures of two shapes whose brightness tells where a pixel lay; one is broken."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 2:
            raise UserError("picture 2 is broken")
        size = (40, 80) if index % 2 == 0 else (60, 60)
        ramp = np.linspace(0, 255, size[1]).astype(np.uint8)
        image = np.repeat(np.broadcast_to(ramp, size)[..., None], 3, axis=2).copy()
        return Sample(image=image, hint=image.copy(), prompt=str(index))

    def sizes(self):
        return np.array([(40, 80), (60, 60)] * 3)


def test_image_mask_and_hint_are_cut_alike_and_broken_ones_stay_in_their_bucket():
    buckets = make_buckets(Wide().sizes(), 48, 8)
    recipe = make_recipe(("rectangles",), (0.1, 0.3))
    preparation = Preparation(side=48, recipe=recipe, random_flip=True)
    data = PreparedSource(Wide(), preparation, 0, buckets)
    sizes = set()
    for place in range(6):
        sample, skipped = data[0, place]
        assert sample.image.shape[:2] == buckets.size_of(place) == sample.mask.shape
        np.testing.assert_array_equal(sample.image, sample.hint)
        sizes.add(sample.image.shape[:2])
        assert (place == 2) == bool(skipped)
    assert len(sizes) == 2
    assert data[0, 2][0].prompt == "4"

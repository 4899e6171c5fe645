"""Samples become squares and batches the same way whoever draws them."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from controlfill.data.geometry import Label, draw_geometry
from controlfill.data.hints import open_spec
from controlfill.data.masks import make_recipe
from controlfill.data.sample import Preparation, PreparedSource, Sample, collate
from controlfill.data.sources import WorldSource
from controlfill.data.worlds import open_world
from controlfill.errors import UserError
from controlfill.options import MASK_KINDS
from controlfill.skins.layout import Box
from controlfill.training.batches import calm_worker, collate_prepared

SPEC = open_spec("masked-image")


def preparation(**changes) -> Preparation:
    return Preparation(side=32, recipe=make_recipe(MASK_KINDS, (0.1, 0.3)), **changes)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_masks_are_the_same_for_0_and_4_workers():
    data = PreparedSource(WorldSource(open_world("shapes"), 32), preparation(), seed=3)
    places = [[(epoch, 4 * i + j) for j in range(4)] for epoch in (0, 1) for i in range(4)]

    def masks(workers: int) -> torch.Tensor:
        loader = DataLoader(
            data,
            batch_sampler=places,
            num_workers=workers,
            collate_fn=functools.partial(collate_prepared, spec=SPEC),
            worker_init_fn=calm_worker,
        )
        return torch.stack(
            [torch.cat([b.mask, b.hint], dim=1) for b in (s.to("cpu") for s in loader)]
        )

    assert torch.equal(masks(0), masks(4))


def test_epochs_and_seeds_draw_other_masks():
    source = WorldSource(open_world("shapes"), 32)
    data, other = (PreparedSource(source, preparation(), seed) for seed in (1, 2))
    one = data[0, 5][0]
    assert np.array_equal(one.mask, data[0, 5][0].mask)
    assert not np.array_equal(one.mask, data[1, 5][0].mask)
    assert not np.array_equal(one.mask, other[0, 5][0].mask)


@pytest.mark.parametrize("size", [(32, 32), (32, 90), (77, 33), (500, 400), (1, 1), (8, 200)])
def test_any_size_becomes_the_square(size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    given = np.zeros(size, np.uint8)
    given[0, 0] = 255
    sample = Sample(image=image, mask=given, prompt="x")
    cut = preparation(crop="center")(sample, np.random.default_rng(0))
    assert cut.image.shape == (32, 32, 3)
    assert cut.mask.shape == (32, 32)


def test_crop_and_flip_move_image_mask_and_objects_together():
    image = np.zeros((40, 80, 3), np.uint8)
    image[10:20, 50:70] = 255
    mask = np.where(image[..., 0] > 0, 255, 0).astype(np.uint8)
    flips = set()
    for seed in range(12):
        geometry = draw_geometry((40, 40), np.random.default_rng(seed), random_flip=True)
        flips.add(geometry.flip)
        np.testing.assert_array_equal(geometry.of_image(image)[..., 0], geometry.of_mask(mask))
        larger = geometry.of_mask(np.kron(mask, np.ones((3, 3), np.uint8)))
        assert (larger != geometry.of_mask(mask)).mean() < 0.05  # rims may differ by a pixel
    assert flips == {True, False}


def test_centre_crops_are_centred_and_random_ones_move():
    rngs = [np.random.default_rng(i) for i in range(8)]
    assert {draw_geometry((40, 40), rng, "center").place for rng in rngs} == {(0.5, 0.5)}
    assert len({draw_geometry((40, 40), rng).place for rng in rngs}) == 8


def test_given_masks_are_never_cut_out():
    mask = np.zeros((32, 320), np.uint8)
    mask[5:9, 300:303] = 1  # masks of 0 and 1 count as white too
    sample = Sample(image=np.zeros((32, 320, 3), np.uint8), mask=mask)
    for seed in range(20):
        cut = preparation()(sample, np.random.default_rng(seed))
        assert set(np.unique(cut.mask)) == {0, 255}


def test_a_strip_needs_little_memory():
    sample = Sample(image=np.zeros((1, 5000, 3), np.uint8))
    cut = replace(preparation(), side=512)(sample, np.random.default_rng(0))
    assert cut.image.shape == (512, 512, 3)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(image=np.zeros((8, 8, 3), np.float32)),
        Sample(image=np.zeros((8, 8), np.uint8)),
        Sample(image=np.zeros((8, 8, 4), np.uint8)),
        Sample(image=[1, 2]),
        Sample(image=np.zeros((8, 8, 3), np.uint8), mask=np.ones((9, 8), np.uint8)),
        Sample(image=np.zeros((8, 8, 3), np.uint8), mask=np.zeros((8, 8), np.uint8)),
    ],
)
def test_samples_that_break_the_interface_are_no_skip(sample):
    with pytest.raises(TypeError, match=r"Sample\.(image|mask) must be"):
        preparation()(sample, np.random.default_rng(0))


def test_one_of_several_prompts_is_drawn():
    sample = Sample(image=np.zeros((32, 32, 3), np.uint8), prompts=("one", "two"))
    drawn = {preparation()(sample, np.random.default_rng(i)).prompt for i in range(12)}
    assert drawn == {"one", "two"}


class Some:
    """A user's own source: two broken pictures of four."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index in (1, 2):
            raise UserError(f"picture {index} is broken")
        return Sample(image=np.full((32, 32, 3), index, np.uint8), prompt=str(index))


def test_broken_pictures_are_replaced_and_named():
    data = PreparedSource(Some(), preparation(), 0)
    sample, skipped = data[0, 1]
    assert sample.prompt == "3"
    assert skipped == ["picture 1 is broken", "picture 2 is broken"]
    assert data[0, 0][1] == []


def test_only_broken_pictures_are_an_error():
    data = PreparedSource(Some(), preparation(), 0)
    data.source = type("None_", (Some,), {"__getitem__": lambda s, i: Some()[1]})()
    with pytest.raises(UserError, match="none of the 4 pictures can be used: picture 1 is broken"):
        data[0, 0]


def test_a_batch_has_the_promised_ranges():
    data = PreparedSource(WorldSource(open_world("shapes"), 32), preparation(), 0)
    batch = collate([data[0, i][0] for i in range(3)], SPEC)
    assert batch.image.shape == (3, 3, 32, 32)
    assert batch.mask.shape == (3, 1, 32, 32)
    assert batch.hint.shape == (3, 3, 32, 32)
    assert 0 <= batch.image.min() <= batch.image.max() <= 1
    assert set(batch.mask.unique().tolist()) == {0.0, 1.0}
    assert batch.hint.min() == -1


@pytest.mark.parametrize("crop", ["random", "patch"])
@pytest.mark.parametrize("seed", range(20))
def test_labels_stay_on_what_they_name(crop, seed):
    # A white box on black, at an even place, so that every cut shows it where the label says.
    image = np.zeros((96, 160, 3), np.uint8)
    box = Box(64, 32, 96, 64)
    box.of(image)[:] = 255
    unknown = Label(text=None, box=box)
    cut = draw_geometry((48, 48), np.random.default_rng(seed), crop, random_flip=seed % 2 == 1)
    small = cut.of_image(image)
    for label in cut.of_labels([unknown], (96, 160)):
        inside = np.zeros((48, 48), bool)
        label.box.of(inside)[:] = True
        assert small[inside].min() > 100
        assert small[~inside].max() < 160
    if not cut.of_labels([unknown], (96, 160)):
        assert small.max() < 160
    for label in cut.of_labels([Label(text="A", box=box)], (96, 160)):
        assert label.text == "A"
        assert not cut.flip
        assert min(label.box.size) == (32 if crop == "patch" else 16)


def test_a_patch_keeps_the_scale_and_comes_from_everywhere():
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    cuts = [draw_geometry((32, 32), np.random.default_rng(s), "patch") for s in range(30)]
    found = {(round(c.place[0] * 28), round(c.place[1] * 58)) for c in cuts}
    for cut, (top, left) in ((c, (round(c.place[0] * 28), round(c.place[1] * 58))) for c in cuts):
        assert np.array_equal(cut.of_image(image), image[top : top + 32, left : left + 32])
    assert len({top for top, _ in found}) > 10
    assert len({left for _, left in found}) > 10
    small = draw_geometry((32, 32), np.random.default_rng(0), "patch")
    assert small.of_image(image[:20]).shape == (32, 32, 3)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("crop", ["random", "patch"])
def test_framing_is_where_the_cut_lies(crop, seed):
    """The cut equals the same window of the mirrored picture, resized as a whole."""
    image = np.zeros((96, 160, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(96)[:, None], np.arange(160)
    cut = draw_geometry((48, 48), np.random.default_rng(seed), crop, random_flip=seed % 2 == 1)
    *whole, top, left, height, width = cut.framing((96, 160))
    assert (whole, height, width) == ([96, 160], 48, 48)
    scale = 1 if crop == "patch" else 2
    seen = image[:, ::-1] if cut.flip else image
    window = seen[scale * top : scale * (top + 48), scale * left : scale * (left + 48)]
    assert np.abs(cut.of_image(image).astype(int) - window[::scale, ::scale]).max() <= 2
    made = preparation(crop="center")(Sample(image=image), np.random.default_rng(0))
    assert collate([made], SPEC).framing().tolist() == [[96, 160, 0, 11, 32, 32]]

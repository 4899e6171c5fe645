"""Validation compares between steps; its pictures come from fixed seeds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import finish
from PIL import Image
from test_engines import read_scalars

from controlfill.diffusion.objective import Measured
from controlfill.errors import UserError
from controlfill.training.start import split
from controlfill.training.validate import Tally, averaged


def test_the_split_is_a_share_and_the_same_for_every_seed():
    learn, keep = split(100, 0.05)
    assert (len(learn), len(keep)) == (95, 5)
    assert not set(learn) & set(keep)
    assert np.array_equal(keep, split(100, 0.05)[1])
    assert [len(part) for part in split(10, 0.0)] == [10, 0]
    assert [len(part) for part in split(2, 0.9)] == [1, 1]


def test_means_are_over_pictures_and_parts_that_are_there():
    tally = Tally(1000)
    nan = float("nan")
    measured = Measured(
        loss=torch.tensor([1.0, 3.0]), hole=torch.tensor([4.0, nan]),
        known=torch.tensor([1.0, 2.0]), timesteps=torch.tensor([10, 990]),
    )  # fmt: skip
    tally.add(measured)
    assert tally.means(tally.sums) == {
        "val/loss": 2, "val/loss_hole": 4, "val/loss_known": 1.5, "val/loss_t000-249": 1,
        "val/loss_t750-999": 3,
    }  # fmt: skip


def test_the_average_stands_in_and_goes_again():
    network = torch.nn.Linear(2, 1)
    own = network.weight.detach().clone()
    with averaged(network, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}):
        assert network(torch.ones(1, 2)).item() == 2
        assert not network.training
    assert torch.equal(network.weight, own)
    assert network.training


def test_validation_numbers_compare_between_steps_and_seeds(small_run):
    frozen = replace(
        small_run, learning_rate=0.0, val_split=0.4, max_train_samples=15, validation_steps=2
    )
    finish(frozen)
    (run,) = small_run.output_dir.iterdir()
    scalars = read_scalars(run)
    (_, first), (_, again) = scalars["val/loss"]
    assert first == again
    assert [step for step, _ in scalars["val/loss_hole"]] == [2, 4]
    bins = [values[0][1] for name, values in scalars.items() if name.startswith("val/loss_t")]
    assert len(bins) == 4
    assert min(bins) < first < max(bins)


def test_validation_pictures_are_drawn_in_fixed_seeds(small_run, tmp_path, photo, hole):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(hole).save(tmp_path / "hole.png")
    asked = replace(
        small_run, learning_rate=0.0, validation_steps=2, num_validation_images=2,
        validation_image=(tmp_path / "photo.png",), validation_mask=(tmp_path / "hole.png",),
        validation_prompt=("a red circle",),
    )  # fmt: skip
    finish(asked)
    (run,) = small_run.output_dir.iterdir()
    first, again = (np.asarray(Image.open(run / "logs" / f"validation-{n}.png")) for n in (2, 4))
    assert first.shape == (256 + 8, 4 * 260 + 4, 3)
    assert np.array_equal(first, again)
    seeds = first[:, 2 * 260 + 4 : 3 * 260], first[:, 3 * 260 + 4 : 4 * 260]
    assert not np.array_equal(*seeds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation_mask": ()}, "1 --validation_image and 0 --validation_mask.*should be 1"),
        ({"validation_prompt": ("a", "b")}, "2 --validation_prompt for 1 --validation_image"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_requests_that_dont_belong_together_are_refused(small_run, tmp_path, change, words):
    picture = tmp_path / "photo.png"
    asked = replace(small_run, validation_image=(picture,), validation_mask=(picture,))
    with pytest.raises(UserError, match=words):
        finish(replace(asked, **change))

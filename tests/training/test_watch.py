"""What is watched: numbers, skipped pictures, panels."""

import logging

import pytest
import torch

from controlfill.errors import UserError
from controlfill.training import watch
from controlfill.training.step import Step


def step(index, loss=1.0, skipped=(), total=10):
    return Step(
        index=index, total=total, loss=torch.tensor(loss), grad_norm=torch.tensor(2.0),
        learning_rate=0.5, images=4, skipped=list(skipped),
    )  # fmt: skip


def test_every_n_steps_and_at_the_end():
    seen = []
    do = watch.every(4, lambda s: seen.append(s.index))
    for index in range(1, 11):
        do(step(index))
    assert seen == [4, 8, 10]
    never = watch.every(0, lambda s: pytest.fail("called"))
    never(step(10))


def test_the_meter_means_since_its_last_reading():
    meter = watch.Meter()
    for index, loss in enumerate((1.0, 3.0), 1):
        meter.add(step(index, loss))
    values = meter.read()
    assert values["train/loss"] == 2
    assert values["train/grad_norm"] == 2
    assert values["train/lr"] == 0.5
    assert values["train/images_per_second"] > 0
    meter.add(step(3, 7.0))
    assert meter.read()["train/loss"] == 7


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(loss):
    meter = watch.Meter()
    meter.add(step(1, 1.0))
    meter.add(step(2, loss))
    with pytest.raises(UserError, match=r"at or before step 2; lower --learning_rate"):
        meter.read()


def test_skipped_pictures_are_named_once(caplog):
    skipped = watch.Skipped()
    with caplog.at_level(logging.WARNING):
        skipped.add(step(1, skipped=["a is broken"]))
        skipped.add(step(2, skipped=["a is broken", "b is broken"]))
    assert [r.getMessage() for r in caplog.records] == [
        "skipped: a is broken", "skipped: b is broken",
    ]  # fmt: skip
    assert len(skipped.reasons) == 2

"""The learning rate is a function; averages follow the weights."""

import pytest
import torch

from controlfill.errors import UserError
from controlfill.options import FinetuneOptions, TrainOptions
from controlfill.training.optim import (
    Average,
    learning_rate,
    make_optimizer,
    renew,
    set_learning_rate,
)


def rates(course, warmup=0, total=10):
    options = TrainOptions(
        image_dir="x", learning_rate=1.0, lr_scheduler=course, lr_warmup_steps=warmup
    )
    return [learning_rate(step, total, options) for step in range(total + 1)]


def test_courses():
    assert rates("constant") == [1.0] * 11
    assert rates("linear")[5] == 0.5
    assert rates("linear")[10] == 0
    cosine = rates("cosine")
    assert cosine[0] == 1
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0)
    assert sorted(cosine, reverse=True) == cosine


@pytest.mark.parametrize("course", ["constant", "linear", "cosine"])
def test_warm_up_rises_then_follows_the_course(course):
    warm = rates(course, warmup=4)
    assert warm[:4] == sorted(warm[:4])
    assert 0 < warm[0] < 0.5
    assert warm[4] == 1


def test_the_course_equals_diffusers_after_warm_up():
    from diffusers.optimization import get_scheduler

    for course in ("constant", "linear", "cosine"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        name = {"constant": "constant_with_warmup"}.get(course, course)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
        ours = rates(course, warmup=4, total=20)
        for step in range(20):
            if step >= 4:
                assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
            optimizer.step()
            theirs.step()


def test_adamw_gets_its_options():
    network = torch.nn.Linear(2, 2)
    options = TrainOptions(image_dir="x", learning_rate=0.5, adam_weight_decay=0.25)
    optimizer = make_optimizer(network, options)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    set_learning_rate(optimizer, 0.125)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_the_average_is_the_formula():
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    average = Average(network, decay=0.9)
    expected = 0.0
    for step in range(1, 300):
        network.weight.data.fill_(float(step))
        average.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-4)
    other = Average(network, decay=0.9)
    other.load(average.weights)
    assert torch.equal(other.weights["weight"], average.weights["weight"])


def test_moments_of_other_groups_are_refused():
    network = torch.nn.ModuleDict({n: torch.nn.Linear(1, 1) for n in ("unet", "encoders")})
    options = FinetuneOptions(instance_data_dir="x")
    whole = make_optimizer(network, options).state_dict()
    renew([whole], network, options)
    with pytest.raises(UserError, match="has 1 groups of weights, and this run's has 2"):
        renew([{"param_groups": whole["param_groups"][:1]}], network, options)

"""Two processes learn what one would from both halves of the batch, in either engine."""

import importlib.util
import os
import subprocess
import sys
from ast import literal_eval
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, final_weights, same_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from controlfill.diffusion.objective import step_rng
from controlfill.options import LightningOptions
from controlfill.training import class_pictures, optim
from controlfill.training.batches import Places, make_batches
from controlfill.training.checkpoint import checkpoints_of
from controlfill.training.kinds import prepare
from controlfill.training.loop import make_accelerator, make_team

SCRIPT = ROOT / "tests" / "training" / "two.py"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def two():
    """The script as a module, for its options."""
    spec = importlib.util.spec_from_file_location("two", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(out, *words):
    """Run the script on two processes; they must not hang."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(SCRIPT), str(out), *words,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder that two processes of the Accelerate engine left, after 3 steps."""
    out = tmp_path_factory.mktemp("two")
    launch(out)
    return out


def about(out, rank):
    with safe_open(out / f"rank-{rank}.safetensors", framework="pt") as file:
        return {name: literal_eval(text) for name, text in file.metadata().items()}


def test_all_ranks_end_with_the_same_weights(launched):
    ranks = [load_file(launched / f"rank-{rank}.safetensors") for rank in range(2)]
    assert same_weights(*ranks)


def test_the_learning_rate_is_that_of_one_process(launched):
    options = two().options_of(launched)
    wanted = [optim.learning_rate(step, 3, options) for step in range(3)]
    assert about(launched, 0)["rates"] == about(launched, 1)["rates"] == wanted


def test_no_rank_reads_anothers_pictures(launched):
    first, second = (set(about(launched, rank)["seen"]) for rank in range(2))
    assert len(first) >= 8  # two steps of two passes of two pictures, and its share of validation
    assert len(second) >= 8
    assert not first & second


def test_two_processes_are_one_with_the_doubled_batch(launched, tmp_path):
    options = two().options_of(tmp_path)
    run = prepare(options, make_team(make_accelerator(options)))
    objective, network = run.objective(), run.network
    parameters = list(network.parameters())
    micro = options.gradient_accumulation_steps
    states = load_file(launched / "steps.safetensors")
    loaders = [
        iter(make_batches(run.data.learn, Places(run.data.order, r, 2).between(0, 6), run.spec, 0))
        for r in range(2)
    ]
    for step in range(3):
        network.zero_grad()
        for place, parameter in enumerate(parameters):
            parameter.data.copy_(states[f"{step + 1}.weight.{place}"])
        for number in range(step * micro, (step + 1) * micro):
            for rank, loader in enumerate(loaders):
                rng = step_rng(options.seed, rank, number)
                loss = objective(network, next(loader).to("cpu"), rng).mean()
                (loss / micro / 2).backward()
        nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        for place, parameter in enumerate(parameters):
            theirs = states[f"{step + 1}.grad.{place}"]
            assert parameter.grad is not None
            wrong = (theirs - parameter.grad).norm()
            assert wrong <= 1e-3 * parameter.grad.norm() + 1e-6


def test_two_processes_finetune_as_one_with_the_doubled_batch(launched, monkeypatch):
    monkeypatch.setattr(class_pictures, "STEPS", 1)
    options = two().tune_of(launched)
    run = prepare(options, make_team(make_accelerator(options)))
    objective, network = run.objective(), run.network.train()
    optimizer = optim.make_optimizer(network, options)
    before = {name: p.detach().clone() for name, p in network.learned().items()}
    loaders = [
        iter(make_batches(run.data.learn, Places(run.data.order, r, 2).between(0, 2), run.spec, 0))
        for r in range(2)
    ]
    for step in range(2):
        optimizer.zero_grad()
        for rank, loader in enumerate(loaders):
            rng = step_rng(options.seed, rank, step)
            (objective(network, next(loader).to("cpu"), rng).mean() / 2).backward()
        nn.utils.clip_grad_norm_(network.parameters(), options.max_grad_norm)
        optimizer.step()
    painted = []
    for rank in range(2):
        with safe_open(launched / f"tuned-{rank}.safetensors", framework="pt") as file:
            painted.append(literal_eval(file.metadata()["painted"]))
            for name, weight in network.learned().items():
                assert (file.get_tensor(name) - weight).abs().max() <= 1e-6
    assert sorted(painted[0] + painted[1]) == [0, 1, 2, 3]
    assert len(painted[0]) == len(painted[1])
    assert any((p.detach() - before[n]).abs().max() > 5e-5 for n, p in network.learned().items())


def test_validation_and_saving_do_not_hang_and_resuming_goes_on(launched):
    (run,) = launched.glob("controlnet_inpainting_*")
    assert [p.name for p in checkpoints_of(run)] == ["checkpoint-2", "checkpoint-3"]
    assert (run / "final_model" / "controlnet.safetensors").is_file()
    launch(launched, "resume")
    resumed = [load_file(launched / f"rank-{rank}-resumed.safetensors") for rank in range(2)]
    assert same_weights(*resumed)
    assert checkpoints_of(run)[-1].name == "checkpoint-5"


def test_lightning_on_two_processes_learns_the_same(launched, tmp_path):
    options = two().options_of(tmp_path)
    names = {f.name for f in fields(LightningOptions)}
    shared = {n: v for n, v in options.as_dict().items() if n in names and n != "mask_kinds"}
    words = {
        **shared, "accelerator": "cpu", "devices": 2, "strategy": "ddp",
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.05,
    }  # fmt: skip
    flags = []
    for name, value in words.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, bool):
            flags += [f"--{name}"] if value else []
        elif value is not None:
            flags += [f"--{name}", str(value)]
    done = subprocess.run(
        [sys.executable, "train_lightning.py", *flags], cwd=ROOT, env=ENVIRONMENT,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = launched.glob("controlnet_inpainting_*")
    ours, theirs = load_file(run / "checkpoint-3" / "ema.safetensors"), final_weights(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[n], theirs[n], atol=2e-5) for n in ours)

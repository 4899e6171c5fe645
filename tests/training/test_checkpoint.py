"""Checkpoints are whole or not there, and resume finds the newest whole one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlfill.errors import UserError
from controlfill.files import write_json
from controlfill.options import FinetuneOptions, TrainOptions
from controlfill.training.checkpoint import (
    STATE,
    check_same,
    checkpoints_of,
    find_ckpt,
    find_resume,
    flatten_optimizer,
    is_whole,
    load_optimizer,
    prune,
)


def make(folder, size=5, said=None):
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * size)
    write_json(folder / STATE, {"files": {"weights": size if said is None else said}})
    return folder


def test_whole_means_every_file_at_its_size(tmp_path):
    assert is_whole(make(tmp_path / "a"))
    assert not is_whole(make(tmp_path / "b", said=6))
    (tmp_path / "a" / "weights").unlink()
    assert not is_whole(tmp_path / "a")
    assert not is_whole(tmp_path / "none")


def test_checkpoints_are_ordered_by_step_and_broken_ones_left_out(tmp_path):
    for step in (20, 100, 3):
        make(tmp_path / f"checkpoint-{step}")
    make(tmp_path / "checkpoint-500", said=1)
    make(tmp_path / "checkpoint-old")
    assert [p.name for p in checkpoints_of(tmp_path)] == [
        "checkpoint-3", "checkpoint-20", "checkpoint-100",
    ]  # fmt: skip


@pytest.mark.parametrize(("limit", "left"), [(None, 4), (2, 2), (1, 1), (0, 1)])
def test_pruning_keeps_the_newest(tmp_path, limit, left):
    for step in range(4):
        make(tmp_path / f"checkpoint-{step}")
    prune(tmp_path, limit)
    assert [p.name for p in checkpoints_of(tmp_path)] == [
        f"checkpoint-{step}" for step in range(4 - left, 4)
    ]


def test_latest_is_the_newest_whole_one_of_the_newest_run(tmp_path):
    assert find_resume("latest", tmp_path) is None
    make(tmp_path / "controlnet_inpainting_20260101_000000" / "checkpoint-8")
    run = tmp_path / "controlnet_inpainting_20260202_000000"
    newest = make(run / "checkpoint-4")
    make(run / "checkpoint-6", said=1)
    (run / ".tmp-checkpoint-6-x").mkdir()
    assert find_resume("latest", tmp_path) == newest
    assert not (run / ".tmp-checkpoint-6-x").exists()
    assert find_resume(str(run), tmp_path) == newest
    assert find_resume(str(newest), tmp_path) == newest
    (tmp_path / "controlnet_inpainting_20260303_000000" / "logs").mkdir(parents=True)
    assert find_resume("latest", tmp_path) is None


def test_a_path_without_a_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        find_resume(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        find_resume(str(tmp_path / "none"), tmp_path)


def test_a_folder_of_the_other_engine_is_answered_by_what_this_kind_of_run_has(tmp_path):
    with pytest.raises(UserError, match="go in by --controlnet_model_name_or_path"):
        find_ckpt(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="goes on with --engine accelerate"):
        find_ckpt(str(tmp_path), tmp_path, FinetuneOptions.RUN)


def test_the_optimizer_comes_back():
    def trained():
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        for _ in range(3):
            network(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return network, optimizer

    network, optimizer = trained()
    other, fresh = trained()[0], None
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5, fused=True)
    load_optimizer(fresh, flatten_optimizer(optimizer))
    assert fresh.param_groups[0]["lr"] == 0.5
    for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    assert network is not other


class Kept:
    """An optimizer of which nothing counts but its state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return {"state": self.state, "param_groups": []}

    def load_state_dict(self, saved):
        self.state = saved["state"]


def test_numbers_bytes_and_names_within_names_come_back(tmp_path):
    table = torch.rand(4)
    moments = {"state1": torch.arange(6, dtype=torch.uint8), "absmax1": torch.rand(2)}
    moments["qmap1"] = table
    old = Kept({
        0: {"step": 7, "__bnb_optimizer_quant_state__": moments},
        1: {"step": 7, "qmap1": table, "decay": 0.1},
        2: {"step": torch.tensor(7.0)},
    })  # fmt: skip
    save_file(flatten_optimizer(old), tmp_path / "moments")
    new = Kept({})
    load_optimizer(new, load_file(tmp_path / "moments"))
    assert new.state[0]["step"] == 7
    assert isinstance(new.state[0]["step"], int)
    assert new.state[1]["decay"] == 0.1
    assert isinstance(new.state[2]["step"], torch.Tensor)
    inner = new.state[0]["__bnb_optimizer_quant_state__"]
    assert inner["state1"].dtype == torch.uint8
    assert all(torch.equal(inner[name], tensor) for name, tensor in moments.items())


def test_another_kind_of_run_is_not_gone_on_with(tmp_path):
    saved = TrainOptions(image_dir="x").as_dict()
    check_same(saved, TrainOptions(image_dir="x"), tmp_path)
    with pytest.raises(UserError, match="another kind of run, which has no --instance_data_dir"):
        check_same(saved, FinetuneOptions(instance_data_dir="x"), tmp_path)


def test_a_run_from_before_an_option_had_its_usual_value(tmp_path):
    tune = FinetuneOptions(instance_data_dir="x")
    saved = {name: value for name, value in tune.as_dict().items() if name != "unet"}
    check_same(saved, tune, tmp_path)
    with pytest.raises(UserError, match="was trained with --unet None, not y"):
        check_same(saved, replace(tune, unet=Path("y")), tmp_path)


@pytest.mark.parametrize("before", [False, True])
def test_moments_of_another_optimizer_are_refused(tmp_path, before):
    old = TrainOptions(image_dir="x", use_8bit_adam=before)
    check_same(old.as_dict(), old, tmp_path)
    with pytest.raises(UserError, match=f"with --use_8bit_adam {before}, not {not before}"):
        check_same(old.as_dict(), replace(old, use_8bit_adam=not before), tmp_path)

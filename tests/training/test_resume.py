"""Resume: interrupted, killed, late or from the middle, a run goes on exactly or says why not."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, final_weights, finish, same_weights, small_options, stop_after
from safetensors.torch import load_file

from controlfill.errors import UserError
from controlfill.files import read_json, write_json

FULL = {
    "gradient_accumulation_steps": 2, "ema_decay": 0.9, "lr_warmup_steps": 2, "max_steps": 5,
    "lr_scheduler": "cosine", "max_grad_norm": 0.5, "proportion_empty_prompts": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses and weights of a run with FULL that nobody stops."""
    options = replace(small_options(tmp_path_factory.mktemp("whole")), **FULL, save_steps=100)
    return finish(options), final_weights(options.output_dir)


@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted(whole, small_run, stop):
    losses, weights = whole
    options = replace(small_run, **FULL, save_steps=1)
    stop_after(options, stop)
    rest = finish(replace(options, resume_from_checkpoint="latest"))
    assert rest == losses[-len(rest) :]
    assert same_weights(final_weights(options.output_dir), weights)


def test_killed_with_9_and_resumed_equals_uninterrupted(tmp_path, warm):
    """A real process, really killed while it trains, really started again."""
    command = [
        str(ROOT / "train.py"), "--image_dir", "world:shapes",
        "--pretrained_model_name_or_path", "embedded", "--image_size", "64", "--batch_size", "2",
        "--max_steps", "12", "--save_steps", "3", "--log_steps", "1", "--num_workers", "1",
        "--learning_rate", "1e-3", "--log_images_steps", "0",
    ]  # fmt: skip
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *command, "--output_dir", str(out)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(out.glob("*/checkpoint-*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(out.glob("*/final_model"))
    again = [*command, "--output_dir", str(out), "--resume_from_checkpoint", "latest"]
    assert subprocess.run([sys.executable, *again], cwd=ROOT, check=False).returncode == 0
    whole = [*command, "--output_dir", str(tmp_path / "whole")]
    assert warm.run(["python", *whole], ROOT).returncode == 0
    assert same_weights(final_weights(out), final_weights(tmp_path / "whole"))


def test_latest_without_any_checkpoint_starts_from_the_beginning(small_run, caplog):
    with caplog.at_level(logging.WARNING):
        finish(replace(small_run, max_steps=1, resume_from_checkpoint="latest"))
    assert "starting from the beginning" in caplog.text
    assert len(list(small_run.output_dir.iterdir())) == 1


def test_a_finished_run_resumed_says_the_same(small_run):
    finish(small_run)
    before = final_weights(small_run.output_dir)
    assert finish(replace(small_run, resume_from_checkpoint="latest")) == []
    assert same_weights(before, final_weights(small_run.output_dir))


def test_resuming_with_other_options_is_said_and_another_conditioning_refused(small_run, caplog):
    finish(small_run)
    (state,) = small_run.output_dir.glob("*/checkpoint-4/state.json")
    kept = read_json(state)
    write_json(state, {**kept, "class_pictures": kept["class_pictures"] + 3})
    more = replace(small_run, max_steps=5, learning_rate=1e-4, resume_from_checkpoint="latest")
    with caplog.at_level(logging.WARNING):
        assert len(finish(more)) == 1
    assert "learning_rate 0.001 -> 0.0001" in caplog.text
    assert "max_steps" not in caplog.text
    assert "there were 3 class pictures, now there are 0" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"conditioning": "masked-image+mask"}, {"image_dir": "world:shapes-full"},
        {"pretrained_model_name_or_path": "org/never-fetched"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_run_is_not_resumed(small_run, change):
    finish(replace(small_run, max_steps=2))
    other = replace(small_run, **change, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=f"was trained with --{next(iter(change))} "):
        finish(other)


def test_latest_means_the_newest_run_only(small_run, caplog):
    finish(replace(small_run, max_steps=2))
    (old,) = small_run.output_dir.iterdir()
    newer = old.with_name(f"{old.name}_2")
    (newer / "logs").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert len(finish(replace(small_run, resume_from_checkpoint="latest"))) == 4
    assert "starting from the beginning" in caplog.text
    assert len(list(small_run.output_dir.iterdir())) == 3
    assert [p.name for p in old.glob("checkpoint-*")] == ["checkpoint-2"]


def test_going_on_from_the_middle_branches_off(small_run):
    finish(replace(small_run, save_steps=1))
    (run,) = small_run.output_dir.iterdir()
    middle = replace(
        small_run, save_steps=1, resume_from_checkpoint=str(run / "checkpoint-2"),
        checkpoints_total_limit=1,
    )  # fmt: skip
    assert len(finish(middle)) == 2
    assert len(list(run.glob("checkpoint-*"))) == 4
    (branch,) = (p for p in small_run.output_dir.iterdir() if p != run)
    assert [p.name for p in branch.glob("checkpoint-*")] == ["checkpoint-4"]
    files = [p / "final_model" / "controlnet.safetensors" for p in (run, branch)]
    assert same_weights(*(load_file(f) for f in files))


def test_an_average_that_starts_late_starts_at_the_present_weights(small_run):
    finish(replace(small_run, max_steps=2))
    late = replace(small_run, ema_decay=0.999, learning_rate=0.0, resume_from_checkpoint="latest")
    finish(late)
    (run,) = small_run.output_dir.iterdir()
    present = load_file(run / "checkpoint-4" / "diffusion_pytorch_model.safetensors")
    assert same_weights(final_weights(small_run.output_dir), present)

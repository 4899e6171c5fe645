"""Whatever moment a run is killed at, it resumes and ends with the same weights; signals too."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, final_weights, finish, same_weights, small_options

from controlfill.training.checkpoint import checkpoints_of
from controlfill.training.stop import Stopped

SCRIPT = ROOT / "tests" / "training" / "killed.py"


def test_a_run_killed_50_times_ends_with_the_same_weights(narrow_base, tmp_path):
    import importlib.util

    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), str(narrow_base), str(out), "11"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "50 kills survived" in done.stdout
    begun = re.findall(r"began at (\d+)", done.stdout)
    assert len(set(begun)) > 5  # it got on between the kills
    spec = importlib.util.spec_from_file_location("killed", SCRIPT)
    killed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(killed)
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = replace(
        killed.options_of(str(narrow_base), tmp_path / "whole"), save_steps=killed.STEPS
    )
    finish(whole)
    torch.set_num_threads(threads)
    assert same_weights(final_weights(out), final_weights(whole.output_dir))
    assert not list(out.glob("*/.tmp-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses and weights of the smallest run that nobody stops."""
    options = replace(small_options(tmp_path_factory.mktemp("whole")), save_steps=100)
    return finish(options), final_weights(options.output_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("engine", ["accelerate", "lightning"])
def test_a_signal_saves_and_leaves(whole, small_run, number, engine):
    from test_engines import finish_lightning, for_lightning

    losses, weights = whole
    options = replace(small_run, save_steps=100)
    before = signal.getsignal(number)

    def send(step):
        if step.index == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    with pytest.raises(Stopped, match="stopped after step 2, which is saved") as caught:
        if engine == "lightning":
            finish_lightning(for_lightning(options), send)
        else:
            run_and_tell(options, send)
    assert signal.getsignal(number) == before
    assert not (caught.value.folder / "final_model").exists()
    again = replace(options, resume_from_checkpoint="latest")
    if engine == "lightning":
        assert finish_lightning(for_lightning(again)) == losses[2:]
    else:
        assert [p.name for p in checkpoints_of(caught.value.folder)] == ["checkpoint-2"]
        assert finish(again) == losses[2:]
    assert same_weights(final_weights(options.output_dir), weights)


def run_and_tell(options, tell):
    from controlfill.training.run import train

    for step in train(options):
        tell(step)


def test_ctrl_c_at_the_command_line_is_one_line_and_130(tmp_path):
    command = [
        sys.executable, "train.py", "--image_dir", "world:shapes", "--image_size", "64",
        "--pretrained_model_name_or_path", "embedded", "--max_steps", "1000", "--batch_size", "1",
        "--num_workers", "0", "--log_steps", "1", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    assert re.search(r"stopped after step \d+, which is saved in .*; go on with", last)
    assert "Traceback" not in errors

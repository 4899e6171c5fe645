"""Commands: help without torch, one line for each mistake, exit code 2."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from controlfill.cli import COMMANDS, run
from controlfill.images import read_settings


def test_help_answers_without_importing_torch():
    code = (
        "import sys; from controlfill.cli import run; code = run(['--help']);"
        "heavy = {'torch', 'diffusers', 'cv2', 'numpy'} & set(sys.modules);"
        "sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


# Each command in a process of its own, forked before anything but their names is there.
HELPS = """
import os, sys
from controlfill.cli import COMMANDS, run
for name in COMMANDS:
    if os.fork() == 0:
        os.dup2(os.open(f"{name}.txt", os.O_CREAT | os.O_WRONLY), 1)
        try:
            run([name, "--help"])
        except SystemExit as end:
            assert not end.code
        assert "torch" not in sys.modules
        sys.exit()
    _, status = os.wait()
    open(f"{name}.code", "w").write(str(status))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """A folder of what each command says of itself, and how it ended."""
    folder = tmp_path_factory.mktemp("helps")
    subprocess.run([sys.executable, "-c", HELPS], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_its_options_without_torch(name, helps):
    assert (helps / f"{name}.code").read_text() == "0"
    assert "--" in (helps / f"{name}.txt").read_text()


def test_the_installed_command_and_the_module_are_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "controlfill", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("controlfill: error: no command is called 'nothing'")


@pytest.fixture
def files(tmp_path, photo, hole, monkeypatch):
    """Good and bad files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(photo).save("photo.jpg")
    Image.fromarray(hole).save("mask.png")
    Image.fromarray(hole[:-1]).save("small.png")
    Image.fromarray(hole * 0).save("black.png")
    (tmp_path / "text.png").write_text("hello")
    jpeg = (tmp_path / "photo.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pth").write_bytes(b"\x80\x04garbage")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("inpaint none.png mask.png", "none.png does not exist"),
        ("inpaint text.png mask.png", "is not a picture"),
        ("inpaint cut.jpg mask.png", "is a broken picture"),
        ("inpaint photo.png small.png", "the mask is 70x44 but the picture is 70x45"),
        ("inpaint photo.png black.png", "all black"),
        ("inpaint photo.png empty", "is a folder"),
        ("inpaint photo.png mask.png --control none", "the ControlNet none does not exist"),
        ("inpaint photo.png mask.png --control empty", "holds no ControlNet"),
        ("inpaint photo.png mask.png --control bad.pth", "does not say what conditioning"),
        (
            "inpaint photo.png mask.png --control bad.pth --conditioning masked-image "
            "--base embedded", "is no state dict of plain tensors",
        ),
        (
            "inpaint photo.png mask.png --conditioning masked-image+mask",
            "was trained with conditioning masked-image/1",
        ),
        ("inpaint photo.png mask.png --base nowhere", "is no folder"),
        ("inpaint photo.png mask.png --num_inference_steps 0", "at least 1 is needed"),
        ("inpaint photo.png mask.png --num_inference_steps 1001", "lies between 1 and 1000"),
        ("inpaint photo.png mask.png --num_inference_steps 1 --output_dir mask.png", "mask.png"),
        ("mask out.png --seed -1", "--seed is -1"),
        ("preview world:shapes --image_size 0", "--image_size is 0"),
        ("evaluate --image_size 50", "needs a multiple of 16; 48 would do"),
        ("mask out.png --size 12", "is no size"),
        ("preview empty", "holds no pictures"),
        ("preview nowhere", "is no folder"),
        ("train --image_dir empty", "holds no pictures"),
        ("evaluate world:moon", "no world is called 'moon'"),
        ("evaluate --classical magic", "no fill is called 'magic'"),
        ("evaluate --num_samples 0", "at least 1 is needed"),
        ("train --config none.yaml", "can't be read"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(files, capfd, words, says):
    assert run(words.split()) == 2
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("controlfill: error:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inpaint", "a", "b", "--wrong", "1"], "Unrecognized options: --wrong, 1"),
        (["mask", "a.png", "--seed", "x"], "'x'"),
        (["inpaint", "a", "b", "--fill", "nothing"], "invalid choice 'nothing'"),
        (["inpaint", "a"], "The mask, as large as the picture"),
    ],
)
def test_unknown_flags_and_wrong_values_are_one_line_too(files, capfd, words, says):
    assert run(words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("controlfill: error: ")
    assert says in line
    assert "--help" in line


def test_all_pictures_broken_is_a_mistake(files, capfd):
    (files / "only").mkdir()
    (files / "text.png").rename(files / "only" / "text.png")
    assert run(["preview", "only"]) == 2
    assert "none of the 1 pictures can be used" in capfd.readouterr().err


def test_a_keyboard_interrupt_is_no_traceback(monkeypatch, capfd):
    from controlfill import cli

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", (cli.COMMANDS["doctor"][0], interrupted))
    assert run(["doctor"]) == 130
    assert "interrupted" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["rectangle", "circle", "strokes", "text", "full"])
def test_mask_writes_a_mask(files, kind, capfd):
    assert run(["mask", "m.png", "--size", "70x45", "--kind", kind]) == 0
    with Image.open("m.png") as mask:
        assert mask.size == (70, 45)
        assert np.asarray(mask).any()
    assert read_settings("m.png")["kind"] == kind
    assert "white" in capfd.readouterr().out


def test_inpaint_writes_both_pictures(files, photo, hole, capfd):
    words = "inpaint photo.png mask.png --num_inference_steps 1 --output_dir out --prompt x"
    assert run(words.split()) == 0
    assert "wrote out/inpainted.png" in capfd.readouterr().out
    with Image.open("out/inpainted.png") as filled:
        np.testing.assert_array_equal(np.asarray(filled)[hole == 0], photo[hole == 0])
    settings = read_settings("out/inpainted.png")
    assert (settings["image"], settings["prompt"]) == ("photo.png", "x")


def test_preview_names_what_it_skips(files, capfd):
    (files / "some").mkdir()
    (files / "text.png").rename(files / "some" / "a.png")
    (files / "photo.png").rename(files / "some" / "b.png")
    words = "preview some --image_size 32 --num_samples 2 --output grid.png"
    assert run(words.split()) == 0
    out = capfd.readouterr().out
    assert "skipped: some/a.png is not a picture" in out
    assert "2 of 2 pictures" in out


def test_doctor_finds_all_well(capfd):
    assert run(["doctor", "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "torch 2" in out
    assert "one training step: loss" in out
    assert out.strip().endswith("all is well")


def test_train_shows_loss_and_eta(files, capfd, caplog):
    words = (
        "train --image_dir world:shapes --pretrained_model_name_or_path embedded --image_size 64 "
        "--batch_size 1 --max_steps 2 --log_steps 1 --num_workers 0 --log_images_steps 0 "
        "--output_dir out"
    )
    assert run(words.split()) == 0
    said = capfd.readouterr()
    assert "step 2/2 loss" in said.out
    assert "ETA" in said.err
    assert "what was trained is in out/controlnet_inpainting_" in caplog.text


@pytest.mark.parametrize("error", [MemoryError("big"), RuntimeError("can't allocate memory: big")])
def test_out_of_memory_says_what_to_make_smaller(monkeypatch, capfd, error):
    from controlfill import cli

    def hungry(_):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", (cli.COMMANDS["doctor"][0], hungry))
    assert run(["doctor"]) == 2
    assert "out of memory; use smaller pictures" in capfd.readouterr().err


def test_only_the_first_process_speaks(files, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    words = (
        "train --image_dir world:shapes --pretrained_model_name_or_path embedded --image_size 64 "
        "--batch_size 1 --max_steps 1 --log_steps 1 --num_workers 0 --output_dir out"
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert run(words.split()) == 0
    said = capfd.readouterr()
    assert "step 1/1" not in said.out
    assert "ETA" not in said.err


def test_root_scripts_are_the_commands():
    for name in ("train", "infer"):
        done = subprocess.run(
            [sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0
        assert f"controlfill {name}" in done.stdout

"""The README's commands run as they stand there, with fewer steps; both languages say the same."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import COCO, ROOT
from PIL import Image

FEWER = [
    (r"--max_steps \d+", "--max_steps 2"),
    (r"--num_samples \d+", "--num_samples 2"),
    (r"--num_inference_steps \d+", "--num_inference_steps 2"),
]


def commands(file, fence="sh"):
    """The lines of all ```sh blocks; ```bash blocks are those too long or too big to test."""
    blocks = re.findall(rf"```{fence}\n(.*?)```", (ROOT / file).read_text("utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def shorter(command):
    for pattern, less in FEWER:
        command = re.sub(pattern, less, command)
    return command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what a checkout has; results stay there."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("docs", "configs", "train.py", "train_lightning.py", "infer.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_all(lines, place, warm):
    for command in lines:
        words = shlex.split(shorter(command).replace("../shared/", f"{COCO.parents[1]}/"))
        run = warm.run(words, place)
        assert run.returncode == 0, f"{command}\n{run.stderr[-2000:]}"


def test_readme_commands_run_in_their_order(place, warm):
    lines = [command for command in commands("README.md") if "../shared/" not in command]
    assert len(lines) >= 6
    run_all(lines, place, warm)


def test_readme_commands_run_on_real_coco(place, coco, warm):
    lines = [command for command in commands("README.md") if "../shared/" in command]
    assert len(lines) >= 3
    run_all(lines, place, warm)


def test_a_warm_command_ends_as_a_cold_one(tmp_path, warm):
    """In the folder and with the words that it is given, its exit code and errors its own."""
    for words in (["controlfill", "mask"], ["controlfill", "mask", "a.png", "--size", "8x8"]):
        run = warm.run(words, tmp_path)
        cold = [sys.executable, "-m", *words]
        again = subprocess.run(cold, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (again.returncode, again.stderr)
    assert run.returncode == 0
    assert run.stdout == again.stdout == "wrote a.png: 15.6% white\n"


def test_both_readmes_have_the_same_commands():
    for fence in ("sh", "bash", "python"):
        assert commands("README.md", fence) == commands("README.zh-CN.md", fence)


def test_python_examples_run(place, warm):
    for file in ("README.md", "docs/data.md"):
        for block in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text("utf-8"), re.S):
            run = warm.run(["python", "-c", block], place)
            assert run.returncode == 0, f"{file}\n{run.stderr[-2000:]}"


def test_the_preview_in_the_docs_is_what_the_command_draws(tmp_path):
    (command,) = (c for c in commands("README.md") if c.startswith("controlfill preview world"))
    words = shlex.split(command)
    words[words.index("--output") + 1] = str(tmp_path / "x.png")
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True)
    with (
        Image.open(tmp_path / "x.png") as ours,
        Image.open(ROOT / "docs" / "data_sample.png") as shown,
    ):
        assert ours.size == shown.size
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(shown)).mean() < 1


def test_links_and_pictures_of_the_docs_are_there():
    for file in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", file.read_text("utf-8")):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_the_makefile_lists_its_targets():
    run = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check"):
        assert re.search(rf"^{target} ", run.stdout, re.M)

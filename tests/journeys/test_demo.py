"""The demo leaves a page with pictures and figures, and a trained ControlNet."""

import json
import os
import subprocess

from conftest import ROOT

from controlfill.cli import run
from controlfill.inference.pipeline import load


def test_the_demo_walks_the_whole_road(tmp_path, capfd):
    words = ["demo", "--output_dir", str(tmp_path), "--max_steps", "3", "--num_samples", "2"]
    assert run(words) == 0
    assert capfd.readouterr().out.strip().endswith("report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    for words in ("telea", "navier-stokes", "biharmonic", "seam", "its loss", "went from"):
        assert words in page
    assert json.loads((tmp_path / "report.json").read_text())["figures"]["all"]
    for name in ("data_sample.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 1000
    (folder,) = (tmp_path / "outputs").iterdir()
    assert load(control=str(folder), device="cpu").network is not None


def test_the_quick_start_leaves_what_it_says(tmp_path):
    settings = {**os.environ, "STEPS": "2", "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", "quickstart.sh"],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "data_sample.png").is_file()
    assert (tmp_path / "inference" / "comparison.png").is_file()
    assert len(list(tmp_path.glob("controlnet_inpainting_*/logs/panels.png"))) == 1

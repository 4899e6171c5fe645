"""From parts to data, training with both hints, skins, themes, a report: by the script itself."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from controlfill.models.ocr import has_reader
from controlfill.skins.formats import import_theme
from controlfill.skins.layout import open_layout

ROOT = Path(__file__).parent.parent.parent


def test_the_walk_from_parts_to_themes(tmp_path, warm):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a keyboard skin of dark blue cloudy ground and clear rounded yellow keys\n")
    told = {"OUT": str(tmp_path / "walk"), "COUNT": "3", "STEPS": "1", "PROMPTS": str(prompts)}
    told |= {"SIZE": "256x160", "SAMPLING": "1", "HINTS": "glyphs"}
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "skins_walk.sh")],
        cwd=tmp_path, env={**os.environ, **told, "PATH": warm.path()}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    layout = open_layout("qwerty-26").at((160, 256))
    skins = tmp_path / "walk" / "skins-glyphs"
    (theme,) = skins.glob("*.cskin")
    (trime,) = skins.glob("*.trime.zip")
    assert [s.box for s in import_theme(theme)[0].slots] == [s.box for s in layout.slots]
    assert (import_theme(trime)[1] == import_theme(theme)[1]).all()
    found = json.loads((skins / "report.json").read_text())
    assert "key_fit" in json.dumps(found)
    page = (skins / "report.html").read_text()
    assert "<img" in page
    assert ("v4" in page) or not has_reader("v4")


@pytest.mark.parametrize("name", ["skins_walk.sh"])
def test_the_script_can_be_run(name):
    assert os.access(ROOT / "recipes" / name, os.X_OK)

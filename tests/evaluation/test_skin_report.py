"""A folder of skins becomes figures and a page: the worst first, what can't be measured named."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from test_texts import stand_in

from controlfill.cli import COMMANDS, run
from controlfill.cli_skin_generate import SKIN_GENERATE
from controlfill.errors import UserError
from controlfill.evaluation import skin_report as room
from controlfill.evaluation.skin_report import (
    RED,
    find_skins,
    measure_skins,
    outlined,
    write_skin_report,
)
from controlfill.images import save_image
from controlfill.options.skin_generate import SkinReportOptions
from controlfill.skins.layout import open_layout
from controlfill.skins.themes import draw_skin, draw_theme

LAYOUT = open_layout("qwerty-26").at((320, 512))
SKIN = draw_skin(draw_theme(3), LAYOUT)  # a plain ground


@pytest.fixture(autouse=True)
def readers(monkeypatch):
    """Quick readers called v4 and v6 in place of the real ones."""
    monkeypatch.setattr(room, "open_ocr", lambda name: stand_in(name=name))


@pytest.fixture
def skins(tmp_path):
    """A good skin, one without five keys, one with drawn labels, and what is no skin."""
    settings = {"layout": "qwerty-26", "size": "512x320", "labels": "in-picture", "seed": 4}
    broken = SKIN.image.copy()
    for slot in LAYOUT.keys[10:15]:
        slot.box.of(broken)[:] = broken[2, 2]
    save_image(tmp_path / "a.png", SKIN.image, settings={**settings, "prompt": "red & <round>"})
    save_image(tmp_path / "b.png", broken, settings=settings)
    save_image(tmp_path / "c.png", SKIN.bare, settings={**settings, "labels": "drawn"})
    save_image(tmp_path / "c-labelled.png", SKIN.image, settings=settings)
    (tmp_path / "a").mkdir()
    save_image(tmp_path / "a" / "q.png", SKIN.image)
    save_image(tmp_path / "small.png", SKIN.image[:30, :40])
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def measure(skins, **more):
    return measure_skins(SkinReportOptions(skins=skins, **more), lambda *_: None)


def test_figures_floors_and_ceilings(skins):
    result = measure(skins)
    assert [skin.file for skin in result.skins] == ["b.png", "a.png", "c.png"]
    worst, good, drawn = result.skins
    assert worst.off == [slot.name for slot in LAYOUT.keys[10:15]]
    assert good.off == drawn.off == []
    assert good.figures["key_fit"] == good.ceiling["key_fit"] == 1
    for skin in (good, drawn):
        for name in ("edge_recall", "key_iou", "text_accuracy_v4", "ned_v6", "glyph_correlation"):
            assert skin.floor[name] + 0.2 < skin.figures[name] <= skin.ceiling[name] + 0.03, name
    assert drawn.figures["text_accuracy_v4"] == good.figures["text_accuracy_v4"]
    mean = result.means()["key_fit"]
    assert mean["mean"] == pytest.approx((1 + 1 + 1 - 5 / len(LAYOUT.keys)) / 3)
    assert mean["floor"] < 0.1
    assert mean["normalised"] == pytest.approx(mean["mean"], abs=0.1)
    assert set(result.means()["offset_p95"]) == {"mean"}
    assert len(result.skipped) == 2
    assert "small.png: the skin is 40x30; the layout's canvas is 1024x640" in result.skipped
    assert result.skipped[1].endswith("text.png is not a picture; PNG, JPEG or WebP would be")


def test_the_page_and_the_json_tell_the_same(skins, tmp_path):
    options = SkinReportOptions(skins=skins, loss_ocr="v6")
    result = measure_skins(options, lambda *_: None)
    file = write_skin_report(result, options)
    assert file == skins / "report.html"
    page = file.read_text("utf-8")
    HTMLParser().feed(page)
    assert page.count("<img") == 3
    assert page.index("b.png") < page.index("a.png")
    assert "red &amp; &lt;round&gt;" in page
    assert "<round>" not in page
    assert "labels read exactly, v6 (in the loss, does not count)" in page
    assert "v4 (in the loss" not in page
    assert f"not in place: {', '.join(result.skins[0].off)}" in page
    assert "src='http" not in page
    assert "href" not in page
    written = json.loads((skins / "report.json").read_text())
    assert written == json.loads(json.dumps(result.summary()))
    assert written["not_counting"] == ["ned_v6", "text_accuracy_v6"]
    assert written["means"]["key_fit"]["mean"] == result.means()["key_fit"]["mean"]
    assert written["skins"][0]["keys_off"] == result.skins[0].off
    assert written["skins"][1]["settings"]["prompt"] == "red & <round>"
    assert len(find_skins(skins)) == 5  # the report itself is none
    other = replace(options, output=tmp_path / "x" / "page.html", json=tmp_path / "x" / "f.json")
    write_skin_report(result, other)
    assert {f.name for f in (tmp_path / "x").iterdir()} == {"page.html", "f.json"}


def test_only_keys_that_do_not_fit_are_red(skins):
    worst, good, _ = measure(skins, ocr=()).skins

    def is_red(skin):
        return (outlined(skin) == RED).all(axis=2)

    assert not is_red(good).any()
    red, layout = is_red(worst), LAYOUT.at((250, 400))
    for key in layout.keys:
        assert key.box.of(red).any() == (key.name in worst.off)


def test_a_reader_in_the_loss_does_not_order_pictures(skins, monkeypatch):
    def biased(name):
        reader = stand_in(name=name)
        if name == "v4":
            return reader
        return replace(reader, read=lambda image, boxes, signs: ["?"] * len(boxes))

    monkeypatch.setattr(room, "open_ocr", biased)
    judged = [room.goodness(measure(skins, loss_ocr=loss).skins[0], loss) for loss in (None, "v6")]
    assert judged[0] < judged[1] - 0.1


def test_without_readers_texts_are_left_out_and_it_is_said(skins, monkeypatch):
    def missing(name):
        raise UserError(f"the text reader {name} needs the package onnx")

    monkeypatch.setattr(room, "open_ocr", missing)
    result = measure(skins)
    assert "texts are not read by v4: the text reader v4 needs the package onnx" in result.notes
    assert "glyph_correlation" in result.means()
    assert "text_accuracy_v4" not in result.means()
    assert "needs the package onnx" in room.make_page(result)


def test_layouts_without_labels_are_measured_without_texts(skins, tmp_path):
    rows = [[{"key": f"{row}{n}", "label": ""} for n in range(4)] for row in "abc"]
    panel = {"name": "panel", "rect": [0, 0, 512, 320], "margin": 8, "gap": 8, "rows": rows}
    words = {"name": "blank", "canvas": [512, 320], "regions": [panel]}
    (tmp_path / "blank.yaml").write_text(yaml.dump(words))
    result = measure(skins, layout=str(tmp_path / "blank.yaml"), size="512x320")
    assert result.notes == ["texts are left out: layout blank has no labels, so there is no text "
                            "to be measured"]  # fmt: skip
    assert "glyph_correlation" not in result.means()


def test_labels_that_nobody_painted_or_that_are_gone(skins):
    assert "glyph_correlation" not in measure(skins, labels="none").means()
    (skins / "c-labelled.png").unlink()
    result = measure(skins)
    assert result.notes == ["texts are left out: c-labelled.png is missing, c.png with its labels"]
    assert "text_accuracy_v4" not in result.skins[-1].figures
    found = {skin.file: skin.figures for skin in measure(skins, labels="in-picture").skins}
    assert found["c.png"]["text_accuracy_v4"] < 0.2


def test_foreign_pictures_need_a_layout_of_their_size(tmp_path):
    save_image(tmp_path / "x.png", SKIN.image)
    with pytest.raises(UserError, match="none of the pictures in .* x.png: the skin is 512x320"):
        measure(tmp_path)
    assert measure(tmp_path, size="512x320").means()["key_fit"]["mean"] == 1
    other = measure(tmp_path, size="512x320", layout="t9", ocr=("v4",))
    assert other.means()["key_fit"]["mean"] < 0.3
    assert other.means()["text_accuracy_v4"]["mean"] < 0.3


def test_settings_that_make_no_sense_are_named(skins):
    save_image(skins / "d.png", SKIN.image, settings={"layout": "gone.yaml", "size": "512x320"})
    save_image(skins / "e.png", SKIN.image, settings={"layout": "t9", "size": "large"})
    skipped = "\n".join(measure(skins, ocr=()).skipped)
    assert "d.png: no layout is called 'gone.yaml'" in skipped
    assert "e.png: --size 'large' is no size" in skipped
    with pytest.raises(UserError, match="is only|too small to be measured"):
        measure(skins, size="30x20")


def test_folders_without_skins_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no pictures; `controlfill skin generate` makes"):
        measure(tmp_path)
    with pytest.raises(UserError, match="nowhere is no folder"):
        measure(tmp_path / "nowhere")


def test_the_command(skins, capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "skin report", SKIN_GENERATE["skin report"])
    assert run(["skin", "report", str(skins), "--ocr", "v4"]) == 0
    said = capsys.readouterr().out
    assert "small.png: the skin is 40x30" in said
    assert "KeyFit: keys with all four sides in place 0.96, floor" in said
    assert f"wrote {skins / 'report.html'}" in said
    assert np.isclose(json.loads((skins / "report.json").read_text())["pictures"], 3)

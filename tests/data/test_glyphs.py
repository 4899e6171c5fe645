"""Texts that are found on pictures are drawn where they are; unsure ones have boxes only."""

import json

import numpy as np
import pytest

from controlfill.cli_prepare import PREPARES
from controlfill.data.glyphs import prepare_glyphs
from controlfill.data.sources import open_source
from controlfill.errors import UserError
from controlfill.images import as_photo, save_image
from controlfill.options import DataOptions
from controlfill.options.skinset import PrepareGlyphsOptions
from controlfill.reading import read_options
from controlfill.skins.draw import edge_hint, label_boxes, open_font
from controlfill.skins.layout import Box, open_layout
from controlfill.skins.themes import draw_skin, draw_theme

SIZE = (100, 160)
BOX = Box(20, 30, 80, 60)


def table(folder, count=2, size=SIZE, hint=True):
    """A table of grey pictures that share one hint, a white frame."""
    frame = np.zeros((*size, 3), np.uint8)
    frame[[0, -1]] = 255
    save_image(folder / "hint.png", frame)
    lines = []
    for number in range(count):
        save_image(folder / f"{number}.png", np.full((*SIZE, 3), number, np.uint8))
        row = {"image": f"{number}.png", "text": "grey", "conditioning_image": "hint.png"}
        lines.append({key: row[key] for key in row if hint or "cond" not in key})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]


def finds(*found):
    """An OCR that finds the same everywhere, and counts."""

    def find(image):
        find.seen.append(int(image[0, 0, 0]))
        return [(text, box.corners(), sure) for text, box, sure in found]

    find.seen = []
    return find


def ink(folder, row):
    """What was drawn on a row's hint, bool (H, W), and the box around it."""
    drawn = as_photo(folder / row["conditioning_image"]).rgb[..., 0] > 90
    drawn[:3] = drawn[-3:] = False  # the frame
    ys, xs = np.nonzero(drawn)
    return drawn, Box(int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)


def options(folder, **more):
    return PrepareGlyphsOptions(data=folder, **more)


def test_sure_texts_are_drawn_and_others_only_boxed(tmp_path):
    folder, told = table(tmp_path), []
    unsure, blank = Box(100, 5, 130, 25), Box(100, 50, 120, 70)
    find = finds(("OK", BOX, 0.99), ("maybe", unsure, 0.97), (" ", blank, 1.0))
    done = prepare_glyphs(options(folder), find, lambda *said: told.append(said))
    assert (done.samples, done.kept, done.skipped, done.notes) == (2, 0, [], [])
    assert (find.seen, told[-1]) == ([0, 1], ("pictures", 2, 2))
    rows = rows_of(folder)
    assert rows[1] == {
        "image": "1.png", "text": "grey", "conditioning_image": "glyph_images/000001.png",
        "plain_conditioning_image": "hint.png",
        "box": [BOX.corners(), unsure.corners(), blank.corners()], "texts": ["OK", None, None],
    }  # fmt: skip
    drawn, around = ink(folder, rows[1])
    assert around.inside(BOX)
    assert around.size[0] >= 0.7 * BOX.size[0] or around.size[1] >= 0.9 * BOX.size[1]
    assert np.hypot(*np.subtract(around.middle, BOX.middle)) <= 1
    assert not (as_photo(folder / "hint.png").rgb[1:-1]).any()
    sample = open_source(str(folder), DataOptions(image_size=100))[1]
    assert [(label.text, label.box) for label in sample.labels] == [
        ("OK", BOX), (None, unsure), (None, blank),
    ]  # fmt: skip
    assert (sample.hint[1:-1, :, 0] > 90).sum() == drawn.sum()


def test_confidence_and_font_are_as_asked(tmp_path):
    folder = table(tmp_path, 1)
    found = finds(("OK", BOX, 0.6), ("WWW", Box(100, 5, 150, 95), 0.59))
    prepare_glyphs(options(folder, confidence=0.6), found)
    assert rows_of(folder)[0]["texts"] == ["OK", None]
    usual, _ = ink(folder, rows_of(folder)[0])
    file = getattr(open_font(None, True, 20), "path", None)
    if not isinstance(file, str):
        pytest.skip("no font file of the system's is known")
    prepare_glyphs(options(folder, confidence=0.6, overwrite=True, font=file), found)
    other, _ = ink(folder, rows_of(folder)[0])
    assert (usual != other).any()


def test_edges_of_a_text_give_way_to_it_and_others_stay(tmp_path):
    folder = table(tmp_path, 1)
    save_image(folder / "hint.png", np.full((*SIZE, 3), 255, np.uint8))
    unsure = Box(100, 5, 130, 25)
    prepare_glyphs(options(folder), finds(("I", BOX, 1.0), ("maybe", unsure, 0.1)))
    hint = as_photo(folder / rows_of(folder)[0]["conditioning_image"]).rgb
    assert 0 < BOX.of(hint).mean() < 80
    assert unsure.of(hint).min() == hint[:29].min() == hint[:, :19].min() == 255


def test_tilted_texts_follow_their_box_and_wavering_ones_stand_upright(tmp_path):
    folder = table(tmp_path, 1)
    turned = [[30, 20], [90, 60], [78, 78], [18, 38]]
    prepare_glyphs(options(folder), lambda image: [("HHHHHH", turned, 1.0)])
    drawn, _ = ink(folder, rows_of(folder)[0])
    ys, xs = np.nonzero(drawn)
    slope = np.polyfit(xs, ys, 1)[0]
    assert 0.5 < slope < 0.8
    wavering = [[20, 31], [80, 29], [80, 59], [20, 61]]
    prepare_glyphs(options(folder, overwrite=True), lambda image: [("OK", wavering, 1.0)])
    assert rows_of(folder)[0]["box"] == [BOX.corners()]


def test_chinese_is_drawn_and_signs_without_a_font_are_masked(tmp_path):
    folder = table(tmp_path, 1)
    try:
        found = finds(("空格", BOX, 1.0), ("\ue123", Box(100, 5, 150, 95), 1.0))
        done = prepare_glyphs(options(folder), found)
    except UserError as error:
        pytest.skip(str(error))
    texts = rows_of(folder)[0]["texts"]
    assert texts[1] is None
    assert any("has no \ue123" in note for note in done.notes)
    if texts[0] is None:
        pytest.skip("no Chinese font is on this machine")
    assert ink(folder, rows_of(folder)[0])[1].inside(BOX)


def test_a_hint_of_another_size_is_fitted_and_of_other_proportions_refused(tmp_path):
    folder = table(tmp_path / "a", 1, size=(50, 80))
    prepare_glyphs(options(folder), finds(("OK", BOX, 1.0)))
    assert ink(folder, rows_of(folder)[0])[1].inside(BOX)
    folder = table(tmp_path / "b", 1, size=(50, 50))
    before = (folder / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match="none of the 1 pictures can be used: 0.png is 160x100"):
        prepare_glyphs(options(folder), finds(("OK", BOX, 1.0)))
    assert (folder / "train.jsonl").read_bytes() == before


def test_pictures_without_text_keep_their_hint_and_are_named(tmp_path):
    folder = table(tmp_path, 3)
    (folder / "2.png").write_bytes(b"no picture")
    done = prepare_glyphs(options(folder), lambda image: [("OK", BOX.corners(), image[0, 0, 0])])
    assert done.notes == ["0.png: no text was found; its hint stays plain"]
    assert (done.samples, len(done.skipped)) == (2, 1)
    rows = rows_of(folder)
    assert rows[0]["conditioning_image"] == "hint.png"
    assert (rows[0]["texts"], rows[1]["texts"], "texts" in rows[2]) == ([None], ["OK"], False)
    done = prepare_glyphs(options(folder, overwrite=True), finds())
    assert done.notes[-1] == "no text of confidence 0.98 was found in any picture"
    assert [row["conditioning_image"] for row in rows_of(folder)] == ["hint.png"] * 3


def test_rows_with_texts_are_left_alone_unless_told(tmp_path):
    folder = table(tmp_path)
    prepare_glyphs(options(folder), finds(("OK", BOX, 1.0)))
    before = (folder / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match="all 2 rows of .* have texts already; --overwrite"):
        prepare_glyphs(options(folder), finds(("NO", BOX, 1.0)))
    assert (folder / "train.jsonl").read_bytes() == before
    first, _ = ink(folder, rows_of(folder)[0])
    prepare_glyphs(options(folder, overwrite=True), finds(("I", BOX, 1.0)))
    second, _ = ink(folder, rows_of(folder)[0])
    assert rows_of(folder)[0]["texts"] == ["I"]
    assert second.sum() < first.sum()  # drawn on the plain hint, not over what was there


def test_an_interrupted_run_goes_on(tmp_path):
    folder, sure = table(tmp_path), finds(("OK", BOX, 1.0))

    def stops(image):
        if image[0, 0, 0]:
            raise KeyboardInterrupt
        return sure(image)

    with pytest.raises(KeyboardInterrupt):
        prepare_glyphs(options(folder), stops)
    assert ["texts" in row for row in rows_of(folder)] == [True, False]
    done = prepare_glyphs(options(folder), sure)
    assert (done.samples, done.kept, sure.seen) == (1, 1, [0, 1])


def test_tables_without_hints_and_folders_without_tables_are_refused(tmp_path):
    folder = table(tmp_path / "t", hint=False)
    with pytest.raises(UserError, match="has no conditioning pictures to draw on"):
        prepare_glyphs(options(folder), finds())
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no table; expected train.jsonl in it"):
        prepare_glyphs(options(tmp_path / "none"), finds())


def test_real_labels_are_read_by_the_command(tmp_path, capsys):
    ocr = pytest.importorskip("controlfill.models.ocr")
    try:
        ocr.open_finder()
    except UserError as error:
        pytest.skip(str(error))
    layout = open_layout("t9")
    save_image(tmp_path / "0.png", draw_skin(draw_theme(1), layout).image)
    save_image(tmp_path / "hint.png", edge_hint(layout))
    row = {"image": "0.png", "text": "x", "conditioning_image": "hint.png"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    cls, run = PREPARES["prepare glyphs"]
    run(read_options(cls, "prepare glyphs", [str(tmp_path), "--confidence", "0.9"]))
    assert capsys.readouterr().out.splitlines()[-1] == f"read 1 pictures in {tmp_path}"
    (row,) = rows_of(tmp_path)
    truth = dict(label_boxes(layout))
    right = [text for text in row["texts"] if text in truth]
    assert len(right) >= 0.7 * len(truth)
    for text, ((left, top), _, (end, bottom), _) in zip(row["texts"], row["box"], strict=True):
        if text in truth:
            x, y = truth[text].middle
            assert left < x < end
            assert top < y < bottom

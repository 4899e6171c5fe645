"""Skins become data that training reads back as they were; what can't be used is named."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from controlfill.cli_prepare import PREPARES
from controlfill.data.skinset import prepare_canny, prepare_skins
from controlfill.data.sources import open_source
from controlfill.errors import UserError
from controlfill.images import as_photo, resize, save_image
from controlfill.options import DataOptions
from controlfill.options.skinset import PrepareCannyOptions, PrepareSkinsOptions
from controlfill.reading import read_options
from controlfill.skins.compose import compose
from controlfill.skins.draw import draw_labels, edge_hint, glyph_hint, label_boxes
from controlfill.skins.layout import Box, open_layout
from controlfill.skins.themes import draw_skin, draw_theme, write_part_set

SIZE = "256x160"
LAYOUT = open_layout("qwerty-26").at((160, 256))
WORLD = DataOptions(image_size=32)


@pytest.fixture
def skins(tmp_path):
    """A folder with two part sets and a finished picture of another size."""
    folder = tmp_path / "skins"
    for number in (0, 1):
        (folder / f"theme_{number}").mkdir(parents=True)
        write_part_set(draw_theme(number), LAYOUT, folder / f"theme_{number}")
    save_image(folder / "done.png", draw_skin(draw_theme(2), LAYOUT.at((320, 500))).image)
    (folder / "done.txt").write_text("made of wood\n\nblue flowers\n")
    (folder / "notes.md").write_text("not a skin")
    return folder


def prepare(skins, name="data", **more):
    """Prepare `skins`; what came of it, the rows, and the folder."""
    out = skins.parent / name
    result = prepare_skins(PrepareSkinsOptions(skins=skins, out=out, size=SIZE, **more))
    return result, rows_of(out), out


def rows_of(folder):
    lines = (folder / "train.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_skins_become_rows_that_training_reads(skins):
    told = []
    options = PrepareSkinsOptions(skins=skins, out=skins.parent / "data", size=SIZE)
    result = prepare_skins(options, lambda *words: told.append(words))
    assert (result.samples, result.skipped, result.notes) == (3, [], [])
    assert told[-1] == ("skins", 3, 3)
    rows = rows_of(result.folder)
    assert [list(row) for row in rows] == [
        ["image", "conditioning_image", "text", "box", "texts"]
    ] * 3
    source = open_source(str(result.folder), DataOptions(image_size=160))
    for number, name in ((1, "theme_0"), (2, "theme_1")):
        sample = source[number]
        bare = compose(LAYOUT, skins / name).image
        np.testing.assert_array_equal(sample.image, draw_labels(bare, LAYOUT))
        np.testing.assert_array_equal(sample.hint, edge_hint(LAYOUT))
        assert [(label.text, label.box) for label in sample.labels] == label_boxes(LAYOUT)
        assert rows[number]["box"][0] == label_boxes(LAYOUT)[0][1].corners()
    assert rows[0]["image"] == "images/000000.png"
    large = as_photo(skins / "done.png").rgb
    np.testing.assert_array_equal(source[0].image, resize(large, (160, 256)))


def test_captions_are_those_beside_skins_or_measured_or_given(skins):
    (skins / "theme_1" / "caption.txt").unlink()
    _, rows, _ = prepare(skins)
    assert rows[0]["text"] == [
        "a keyboard skin of made of wood,iflyskin",
        "a keyboard skin of blue flowers,iflyskin",
    ]
    assert rows[1]["text"] == f"{draw_theme(0).caption},iflyskin"
    measured = [row["text"] for row in prepare(skins, "template", caption="template")[1]]
    assert measured[2] == rows[2]["text"]
    assert all(" keys on " in words for words in measured)
    given = prepare(skins, "given", caption="glass", prefix="a photo of", suffix="")[1]
    assert {row["text"] for row in given} == {"a photo of glass"}


def test_hints_are_shared_or_not_with_glyphs_or_without(skins):
    _, rows, out = prepare(skins, hint="glyphs", shared_hint=True)
    assert {row["conditioning_image"] for row in rows} == {"conditioning_images/shared.png"}
    assert [file.name for file in (out / "conditioning_images").iterdir()] == ["shared.png"]
    shared = as_photo(out / "conditioning_images" / "shared.png").rgb
    np.testing.assert_array_equal(shared, glyph_hint(LAYOUT))
    _, rows, out = prepare(skins, "each")
    assert len({row["conditioning_image"] for row in rows}) == 3
    assert len(list((out / "conditioning_images").iterdir())) == 3


def test_texts_of_finished_pictures_are_known_or_not_or_none(skins):
    labels = [slot.label for slot in LAYOUT.labelled]
    unknown, known, none = (
        prepare(skins, kind, picture_texts=kind)[1] for kind in ("unknown", "layout", "none")
    )
    assert unknown[0]["texts"] == [None] * len(labels)
    assert known[0]["texts"] == none[0]["texts"] == unknown[1]["texts"] == labels
    for slot, box in zip(LAYOUT.labelled, unknown[0]["box"], strict=True):
        (left, top), _, (right, bottom), _ = box
        inner = Box(left, top, right, bottom)
        assert inner.inside(slot.box)
        # What counts nothing in the loss is less than half of a key.
        assert np.prod(inner.size) < 0.45 * np.prod(slot.box.size)
    for slot, box, (_, ink) in zip(
        LAYOUT.labelled, known[0]["box"], label_boxes(LAYOUT), strict=True
    ):
        (left, top), _, (right, bottom), _ = box
        assert slot.box.left < left <= ink.left < ink.right <= right < slot.box.right
        assert slot.box.top < top <= ink.top < ink.bottom <= bottom < slot.box.bottom
    files = [skins.parent / kind / "images" / "000000.png" for kind in ("layout", "none")]
    taken, drawn = (as_photo(file).rgb for file in files)
    np.testing.assert_array_equal(drawn, draw_labels(taken, LAYOUT))


def test_without_text_skins_stay_bare(skins):
    _, rows, out = prepare(skins, text=False)
    assert rows[1]["box"] == rows[1]["texts"] == []
    bare = compose(LAYOUT, skins / "theme_0").image
    np.testing.assert_array_equal(as_photo(out / rows[1]["image"]).rgb, bare)
    with pytest.raises(UserError, match="--hint glyphs tells of labels that --no_text leaves out"):
        prepare(skins, "both", text=False, hint="glyphs")


def test_layout_format_and_font_are_as_asked(skins, tmp_path):
    (tmp_path / "t9").mkdir()
    layout = open_layout("t9")
    (tmp_path / "t9" / "one").mkdir()
    write_part_set(draw_theme(3), layout, tmp_path / "t9" / "one")
    options = PrepareSkinsOptions(
        skins=tmp_path / "t9", out=tmp_path / "o", layout="t9", image_format="jpg"
    )
    prepare_skins(options)
    (row,) = rows_of(tmp_path / "o")
    assert row["texts"] == [slot.label for slot in layout.labelled]
    with Image.open(tmp_path / "o" / row["image"]) as picture:
        assert (picture.format, picture.size) == ("JPEG", (1024, 640))
    with pytest.raises(UserError, match="is no font that can be read"):
        prepare(skins, font=tmp_path / "none.ttf")


def test_what_cannot_be_used_is_named_and_the_rest_is_written(skins):
    (skins / "broken.png").write_bytes((skins / "done.png").read_bytes()[:900])
    save_image(skins / "square.png", np.zeros((90, 90, 3), np.uint8))
    (skins / "nothing").mkdir()
    (skins / "theme_0" / "wide-key.png").unlink()
    save_image(skins / "theme_1" / "key.png", np.zeros((40, 40, 3), np.uint8))
    result, rows, _ = prepare(skins)
    said = "\n".join(result.skipped)
    assert (result.samples, len(result.skipped), len(rows)) == (2, 4, 2)
    assert "broken.png: " in said
    assert "is a broken picture" in said
    assert "square.png: it is 90x90, the canvas 256x160" in said
    assert "nothing: " in said
    assert "theme_0: it lacks wide-key (for 4) of layout qwerty-26; --incomplete keeps it" in said
    assert any(n.startswith("theme_1: key.png: 40x40 is stretched to") for n in result.notes)
    result, rows, _ = prepare(skins, "more", incomplete=True)
    assert result.samples == len(rows) == 3
    assert any(n.startswith("theme_0: shift: neither of shift.png") for n in result.notes)


def test_nothing_is_lost_and_nothing_half_written(skins, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="data is not empty; name a new folder"):
        prepare(skins)
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["mine.txt"]
    (tmp_path / "bad").mkdir()
    with pytest.raises(UserError, match="bad holds no skins; pictures or folders"):
        prepare(tmp_path / "bad", "o")
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 1 skins can be used: x.png: "):
        prepare(tmp_path / "bad", "o")
    with pytest.raises(UserError, match="the parts of one skin; give the folder that"):
        prepare(skins / "theme_0", "../o")
    with pytest.raises(UserError, match="is no folder; give one that holds skins"):
        prepare(tmp_path / "none", "o")
    assert {path.name for path in tmp_path.iterdir()} == {"skins", "data", "bad"}


def test_the_same_skins_give_the_same_bytes(skins):
    _, _, first = prepare(skins, "a")
    _, _, second = prepare(skins, "b")
    files = [sorted(f for f in folder.rglob("*") if f.is_file()) for folder in (first, second)]
    assert [f.relative_to(first) for f in files[0]] == [f.relative_to(second) for f in files[1]]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def command(name, *arguments):
    """Run a command of `PREPARES` as the command line does."""
    cls, run = PREPARES[name]
    run(read_options(cls, name, [str(argument) for argument in arguments]))


def test_the_command_says_what_it_did(skins, capsys):
    (skins / "nothing").mkdir()
    out = skins.parent / "data"
    command(
        "prepare skins", skins, out, "--layout", "qwerty-26", "--size", SIZE, "--hint", "glyphs",
        "--shared_hint", "--text", "--picture_texts", "layout", "--caption", "glass",
    )  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("skipped: nothing: ")
    assert said[1] == f"wrote 3 skins to {out}"
    assert {row["text"] for row in rows_of(out)} == {"a keyboard skin of glass,iflyskin"}


def soft_edge(folder):
    """A folder with one picture: a strong and a weak edge, in the left and the right half."""
    picture = np.full((40, 120, 3), 100, np.uint8)
    picture[:, 30:] = 190
    picture[:, 90:] = 205
    save_image(folder / "a" / "p.png", picture)
    (folder / "a" / "p.txt").write_text("two edges")
    return folder / "a", picture


def test_canny_hints_at_any_threshold(tmp_path):
    folder, picture = soft_edge(tmp_path)
    hints = {}
    for name, low, high in (("usual", 50, 80), ("keen", 10, 20), ("blunt", 300, 400)):
        options = PrepareCannyOptions(data=str(folder), out=tmp_path / name, low=low, high=high)
        assert prepare_canny(options).samples == 1
        sample = open_source(str(tmp_path / name), WORLD)[0]
        np.testing.assert_array_equal(sample.image, picture)
        assert sample.prompt == "two edges"
        expected = cv2.Canny(picture, low, high)
        np.testing.assert_array_equal(sample.hint, np.dstack([expected] * 3))
        hints[name] = (sample.hint[..., 0] > 0).any(axis=0)
    assert hints["keen"][80:100].any()
    assert not hints["usual"][80:100].any()
    assert hints["usual"][20:40].any()
    assert not hints["blunt"][80:100].any()
    with pytest.raises(UserError, match="--low 90 is above --high 80"):
        prepare_canny(PrepareCannyOptions(data=str(folder), out=tmp_path / "o", low=90))


def test_canny_hints_take_the_place_of_others(skins):
    _, _, data = prepare(skins)
    command("prepare canny", data, skins.parent / "canny", "--count", "2", "--image_format", "jpg")
    rows = rows_of(skins.parent / "canny")
    assert [row["image"] for row in rows] == ["images/000000.jpg", "images/000001.jpg"]
    hint = as_photo(skins.parent / "canny" / rows[0]["conditioning_image"]).rgb
    skin = as_photo(data / "images" / "000000.png").rgb
    np.testing.assert_array_equal(hint[..., 0], cv2.Canny(skin, 50, 80))


@pytest.mark.parametrize(("size", "shape"), [("24", (24, 24)), ("48x24", (24, 48))])
def test_canny_pictures_are_cut_from_the_middle(tmp_path, size, shape):
    folder, picture = soft_edge(tmp_path)
    prepare_canny(PrepareCannyOptions(data=str(folder), out=tmp_path / "t", size=size))
    width = 40 * shape[1] // shape[0]
    left = (120 - width) // 2
    image = open_source(str(tmp_path / "t"), WORLD)[0].image
    np.testing.assert_array_equal(image, resize(picture[:, left : left + width], shape))


def test_large_pictures_are_read_whole_and_worlds_have_an_end(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a" / "p.jpg")
    prepare_canny(PrepareCannyOptions(data=str(tmp_path / "a"), out=tmp_path / "t", image_size=32))
    assert as_photo(tmp_path / "t" / "images" / "000000.png").size == (1200, 1600)
    with pytest.raises(UserError, match="say how many pictures with --count"):
        prepare_canny(PrepareCannyOptions(data="world:shapes", out=tmp_path / "o"))
    options = PrepareCannyOptions(data="world:shapes", out=tmp_path / "o", count=1, image_size=32)
    prepare_canny(options)
    assert as_photo(tmp_path / "o" / "images" / "000000.png").size == (32, 32)
    for size in ("x", "0", "12x"):
        with pytest.raises(UserError, match="is no size; WIDTHxHEIGHT"):
            prepare_canny(PrepareCannyOptions(data="world:shapes", out=tmp_path / "p", size=size))

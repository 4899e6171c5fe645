"""Texts in pictures: the columns `box` and `texts` become labels; what can't be meant is named."""

from dataclasses import replace

import pytest
from test_tables import OPTIONS, picture, table

from controlfill.data.prepare import prepare_shards, prepare_table
from controlfill.data.sources import Subset, open_source
from controlfill.errors import UserError
from controlfill.options import DataOptions, PrepareShardsOptions, PrepareTableOptions
from controlfill.skins.layout import Box

BOX = [[4, 6], [20, 6], [20, 14], [4, 14]]


def test_labels_are_read_where_they_are_and_their_signs_are_known(tmp_path):
    rows = [{"image": picture(tmp_path / name).name, "text": ""} for name in ("a.png", "b.png")]
    rows[0] |= {"box": [BOX, [[0, 0], [3, 0], [3, 3], [0, 3]]], "texts": ["OK", None]}
    source = open_source(str(table(tmp_path, rows)), OPTIONS)
    known, unknown = source[0].labels
    assert (known.text, known.box) == ("OK", Box(4, 6, 20, 14))
    assert (unknown.text, unknown.box) == (None, Box(0, 0, 3, 3))
    assert source[1].labels == ()
    assert (source.signs, Subset(source, 2).signs) == ("KO", "KO")


def test_labels_follow_a_picture_that_is_decoded_smaller(tmp_path):
    picture(tmp_path / "a.jpg", "white", (400, 400))
    box = [[100, 200], [200, 200], [200, 300], [100, 300]]
    table(tmp_path, [{"image": "a.jpg", "text": "", "box": [box], "texts": ["A"]}])
    sample = open_source(str(tmp_path), DataOptions(image_size=100))[0]
    assert sample.image.shape[0] == 100
    assert sample.labels[0].box == Box(25, 50, 50, 75)
    whole = open_source(str(tmp_path), DataOptions(image_size=100, crop="patch"))[0]
    assert whole.image.shape[0] == 400


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"box": [BOX], "texts": []}, "1 polygons in 'box' and 0 words in 'texts'"),
        ({"box": [BOX], "texts": [3]}, "each polygon needs its text, or null"),
        ({"box": [BOX], "texts": 5}, "'texts' is 5; a list of texts is wanted"),
        ({"box": [[{"x": 1}]], "texts": ["A"]}, "a list of polygons"),
        ({"box": [[[float("inf"), 0]]], "texts": ["A"]}, "a list of polygons"),
        ({"box": [[1, 2]], "texts": ["A"]}, r"a list of polygons \[\[x, y\], ...\] is wanted"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused_with_their_line(tmp_path, row, words):
    picture(tmp_path / "a.png")
    table(tmp_path, [{"image": "a.png", "text": "", **row}])
    with pytest.raises(UserError, match=f"train.jsonl:1: .*{words}"):
        open_source(str(tmp_path), OPTIONS)


def test_columns_of_these_names_that_mean_something_else_are_let_be(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path, [{"image": "a.png", "text": "", "box": [1, 2, 3, 4]}])
    assert open_source(str(tmp_path), OPTIONS)[0].labels == ()
    table(tmp_path, [{"image": "a.png", "texts": ["a hat", "hats"], "box": [BOX]}])
    options = DataOptions(image_size=32, crop="center", caption_column="texts")
    assert open_source(str(tmp_path), options)[0].prompts == ("a hat", "hats")


def test_shards_would_lose_labels_and_say_so(tmp_path):
    picture(tmp_path / "data" / "a.png")
    row = {"image": "a.png", "text": "", "box": [BOX], "texts": ["A"]}
    table(tmp_path / "data", [row])
    told = PrepareShardsOptions(data=str(tmp_path / "data"), out=tmp_path / "tars", image_size=32)
    with pytest.raises(UserError, match="labels in its pictures, which tar shards don't keep"):
        prepare_shards(told)
    again = PrepareTableOptions(data=str(tmp_path / "data"), out=tmp_path / "kept", image_size=32)
    prepare_table(replace(again, make_hint="edges"))
    assert open_source(str(tmp_path / "kept"), OPTIONS)[0].labels[0].text == "A"

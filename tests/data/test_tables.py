"""Tables beside pictures and Hugging Face datasets become samples; what is wrong is named."""

import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image, ImageFile

from controlfill.data.sample import PreparedSource
from controlfill.data.sources import Subset, make_preparation, open_source
from controlfill.data.tables import Columns, HubSource, TableSource, Texts
from controlfill.errors import UserError
from controlfill.options import DataOptions

OPTIONS = DataOptions(image_size=32, crop="center")


def picture(path, colour="red", size=(48, 40), **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **settings)
    return path


def table(folder, rows, name="train.jsonl"):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text("\n".join(lines), "utf-8")
    return folder


@pytest.fixture
def pairs(tmp_path):
    """Three pictures in the fill50k layout, each with its conditioning picture."""
    rows = []
    for number, colour in enumerate(("red", "lime", "blue")):
        picture(tmp_path / "images" / f"{number}.png", colour)
        picture(tmp_path / "conditioning_images" / f"{number}.png", "white")
        rows.append(
            {
                "text": f"a {colour} wall", "image": f"images/{number}.png",
                "conditioning_image": f"conditioning_images/{number}.png",
            }
        )  # fmt: skip
    return table(tmp_path, rows)


def test_fill50k_layout_gives_pictures_hints_and_prompts(pairs):
    source = open_source(str(pairs), OPTIONS)
    assert isinstance(source, TableSource)
    assert source.has_hints
    assert len(source) == 3
    assert source.missing == []
    sample = source[1]
    assert (sample.prompt, sample.prompts, sample.name) == ("a lime wall", (), "images/1.png")
    assert sample.image[0, 0].tolist() == [0, 255, 0]
    assert sample.hint.shape == sample.image.shape
    assert sample.hint.min() == 255
    prepared, _ = PreparedSource(pickle.loads(pickle.dumps(source)), make_preparation(OPTIONS), 0)[
        0, 1
    ]
    assert prepared.mask.min() == 255
    assert prepared.hint.shape == (32, 32, 3)


def test_other_column_names(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    folder = table(tmp_path, [{"target": "a.png", "source": "b.png", "caption": "hi"}])
    options = DataOptions(
        image_size=32, image_column="target", conditioning_image_column="source",
        caption_column="caption",
    )  # fmt: skip
    source = open_source(str(folder), options)
    assert source[0].prompt == "hi"
    assert source.has_hints
    with pytest.raises(UserError, match=r"no column 'image'; there are: target, source, caption"):
        open_source(str(folder), OPTIONS)
    for field, flag in [
        ("image_column", "--image_column"),
        ("conditioning_image_column", "--conditioning_image_column"),
        ("caption_column", "--caption_column"),
    ]:
        wrong = DataOptions(**{"image_column": "target", field: "nope"})
        with pytest.raises(UserError, match=f"no column 'nope'.*{flag}"):
            open_source(str(folder), wrong)


def test_image_folder_metadata_as_jsonl_and_csv(tmp_path):
    for name in ("j", "c"):
        picture(tmp_path / name / "deep" / "x.png")
    table(tmp_path / "j", [{"file_name": "deep/x.png", "text": ["one", " two "]}], "metadata.jsonl")
    (tmp_path / "c" / "metadata.csv").write_text('﻿file_name,text\ndeep/x.png,"a, b"\n', "utf-8")
    first, second = (open_source(str(tmp_path / name), OPTIONS) for name in ("j", "c"))
    assert first[0].prompts == ("one", "two")
    assert second[0].prompt == "a, b"
    assert not first.has_hints
    assert first[0].hint is None


def test_a_row_without_words_has_an_empty_prompt(tmp_path):
    picture(tmp_path / "x.png")
    rows = [{"image": "x.png"}, {"image": "x.png", "text": None}, {"image": "x.png", "text": []}]
    source = open_source(str(table(tmp_path, rows)), OPTIONS)
    assert [source[i].prompt for i in range(3)] == ["", "", ""]


def test_a_line_separator_in_a_caption_ends_no_row(tmp_path):
    picture(tmp_path / "x.png")
    row = json.dumps({"image": "x.png", "text": "one\u2028two"}, ensure_ascii=False)
    assert open_source(str(table(tmp_path, [row])), OPTIONS)[0].prompt == "one\u2028two"


def test_absent_pictures_and_hints_are_named_and_left_out(pairs):
    (pairs / "images" / "0.png").unlink()
    (pairs / "conditioning_images" / "2.png").unlink()
    source = open_source(str(pairs), OPTIONS)
    assert len(source) == 1
    assert source.missing == ["images/0.png", "conditioning_images/2.png"]
    assert source[0].prompt == "a lime wall"
    assert source[0].image[0, 0].tolist() == [0, 255, 0]
    (pairs / "images" / "1.png").unlink()
    with pytest.raises(UserError, match=r"none of the 3 rows .* is images/0\.png"):
        open_source(str(pairs), OPTIONS)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"image": "a.png"', r"train\.jsonl:2 is not JSON"),
        ('["a.png"]', r"train\.jsonl:2 holds no"),
        ('{"image": ""}', r"train\.jsonl:2: 'image' is ''"),
        ('{"text": "x"}', r"train\.jsonl:2: 'image' is None"),
        ('{"image": "../a.png"}', r"train\.jsonl:2: \.\./a\.png lies outside"),
        ('{"image": "b/../../a.png"}', "lies outside"),
        ('{"image": "/etc/a.png"}', "lies outside"),
        ('{"image": "C:\\\\a.png"}', "lies outside"),
        ('{"image": "a.png", "text": 7}', r"train\.jsonl:2: the caption is 7"),
        ('{"image": "a.png", "text": ["x", 7]}', "the caption is"),
        ('{"image": "a.png", "conditioning_image": 3}', "'conditioning_image' is None"),
    ],
)
def test_broken_rows_are_refused_with_file_and_line(tmp_path, row, words):
    picture(tmp_path / "a.png")
    table(tmp_path, ['{"image": "./a.png"}', row])
    with pytest.raises(UserError, match=words) as error:
        open_source(str(tmp_path), OPTIONS)
    assert "\n" not in str(error.value)


def test_broken_tables_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png\n")
    with pytest.raises(UserError, match=r"metadata\.csv:2 hasn't as many cells"):
        open_source(str(tmp_path), OPTIONS)
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "x" * 200_000 + ",y\n")
    with pytest.raises(UserError, match=r"metadata\.csv:\d+ is no CSV"):
        open_source(str(tmp_path), OPTIONS)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        open_source(str(tmp_path), OPTIONS)
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="can't be read as UTF-8"):
        open_source(str(tmp_path), OPTIONS)


def test_a_hint_of_other_size_is_resized_and_of_other_shape_skipped(pairs):
    picture(pairs / "conditioning_images" / "0.png", "white", (96, 80))
    picture(pairs / "conditioning_images" / "1.png", "white", (96, 90))
    source = open_source(str(pairs), OPTIONS)
    assert source[0].hint.shape == (40, 48, 3)
    with pytest.raises(UserError, match=r"is 48x40, but its conditioning picture is 96x90"):
        source[1]
    sample, skipped = PreparedSource(source, make_preparation(OPTIONS), 0)[0, 1]
    assert sample.name == "images/2.png"
    assert "images/1.png" in skipped[0]


def test_large_jpegs_are_decoded_smaller_with_their_hints(tmp_path):
    picture(tmp_path / "a.jpg", size=(201, 151))
    picture(tmp_path / "b.png", size=(201, 151))
    table(tmp_path, [{"image": "a.jpg", "conditioning_image": "b.png"}])
    sample = open_source(str(tmp_path), OPTIONS)[0]
    assert sample.image.shape[0] < 100
    assert sample.hint.shape == sample.image.shape


def test_sizes_come_from_headers_and_know_orientation(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", size=(60, 40), exif=exif)
    picture(tmp_path / "b.png", size=(60, 40))
    (tmp_path / "c.png").write_text("no picture")
    plain = open_source(str(tmp_path), OPTIONS)
    named = open_source(
        str(table(tmp_path, [{"image": n} for n in ("c.png", "b.png", "a.jpg")])), OPTIONS
    )
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded pixels"))
    assert plain.sizes().tolist() == [[60, 40], [40, 60], [1, 1]]
    assert named.sizes().tolist() == [[1, 1], [40, 60], [60, 40]]
    world = open_source("world:shapes", DataOptions(image_size=16, max_train_samples=2))
    assert world.sizes().tolist() == [[16, 16]] * 2


def test_max_train_samples_takes_the_first_ones(pairs):
    options = DataOptions(image_size=32, max_train_samples=2)
    (pairs / "conditioning_images" / "2.png").unlink()
    whole = open_source(str(pairs), options)
    assert isinstance(whole, TableSource)
    few = open_source(str(pairs), DataOptions(image_size=32, max_train_samples=1))
    assert isinstance(few, Subset)
    assert (len(few), few.has_hints, few.missing) == (1, True, whole.missing)
    assert few[0].prompt == "a red wall"
    assert few.sizes().tolist() == [[40, 48]]
    with pytest.raises(IndexError):
        few[1]
    world = open_source("world:shapes", options)
    assert len(world) == 2
    assert Subset([few[0]], 5).sizes() is None


def test_options_that_a_source_would_not_look_at_are_refused(pairs):
    with pytest.raises(UserError, match=r"--mask_dir goes with a plain folder"):
        open_source(str(pairs), DataOptions(mask_dir=pairs))
    (pairs / "train.jsonl").unlink()
    for where in (str(pairs), "world:shapes"):
        with pytest.raises(UserError, match="--caption_column goes with tables"):
            open_source(where, DataOptions(caption_column="words"))


def test_texts_come_back_as_they_were():
    words = ["", "één", "x" * 500, ""]
    texts = Texts(words)
    assert [texts[i] for i in range(len(texts))] == words


@pytest.fixture
def hub(tmp_path):
    """A dataset of three rows with column names of its own, on disk, alone and as a split."""
    import datasets

    datasets.disable_progress_bars()
    pixels = [np.full((40, 48, 3), value, np.uint8) for value in (10, 20, 30)]
    data = datasets.Dataset.from_dict(
        {
            "target": [Image.fromarray(p) for p in pixels],
            "edges": [Image.fromarray(255 - p) for p in pixels],
            "words": ["one", "two", ""],
            "more": [1, 2, 3],
        }
    )
    for name in ("target", "edges"):
        data = data.cast_column(name, datasets.Image())
    data.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict(test=data.select([2, 1])).save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=data, test=data.select([2])).save_to_disk(tmp_path / "both")
    return tmp_path


COLUMNS = {
    "image_column": "target", "conditioning_image_column": "edges", "caption_column": "words",
}  # fmt: skip


def test_a_hub_dataset_on_disk_with_other_column_names(hub):
    options = DataOptions(image_size=32, **COLUMNS)
    source = open_source(f"hf:{hub / 'alone'}", options)
    assert isinstance(source, HubSource)
    assert (len(source), source.has_hints) == (3, True)
    sample = pickle.loads(pickle.dumps(source))[1]
    assert (sample.prompt, sample.name) == ("two", "row 1")
    assert (sample.image.max(), sample.hint.min()) == (20, 235)
    assert source.sizes().tolist() == [[40, 48]] * 3
    assert [len(open_source(f"hf:{hub / n}", options)) for n in ("single", "both")] == [2, 3]
    assert open_source(f"hf:{hub / 'both'}:test", options)[0].image.max() == 30
    few = open_source(f"hf:{hub / 'both'}", DataOptions(max_train_samples=2, **COLUMNS))
    assert len(few) == 2


def test_hub_datasets_that_lack_something_are_refused(hub, monkeypatch):
    where = f"hf:{hub / 'both'}"
    with pytest.raises(UserError, match="no column 'image'; there are: target, edges, words, more"):
        open_source(where, OPTIONS)
    with pytest.raises(UserError, match="has no split 'val'; there are: train, test"):
        open_source(f"{where}:val", OPTIONS)
    with pytest.raises(UserError, match="can't be opened"):
        open_source(f"hf:{hub / 'nowhere'}", OPTIONS)
    with pytest.raises(UserError, match="--ann_file goes with a plain folder"):
        open_source(where, DataOptions(ann_file=hub, **COLUMNS))
    (hub / "script").mkdir()
    (hub / "script" / "script.py").write_text("import datasets")
    with pytest.raises(UserError, match="scripts are no longer supported.*parquet version"):
        open_source(f"hf:{hub / 'script'}", OPTIONS)
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach\n the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"hf:a/b can't be opened \(Couldn't reach the Hub\)"):
        open_source("hf:a/b", OPTIONS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'controlfill\[data\]'"):
        open_source("hf:a/b", OPTIONS)


def test_hub_pictures_may_be_bytes_paths_or_decoded(tmp_path):
    import datasets

    file = picture(tmp_path / "a.png")
    image = Image.open(file)
    image.load()
    rows = [{"image": file.read_bytes()}, {"image": str(file)}, {"image": image}, {"image": None}]
    rows.append({"image": {"bytes": None, "path": str(file)}})
    rows.append({"image": b"broken"})
    kinds = [datasets.Dataset.from_list(rows[i : i + 1]) for i in (0, 1)]
    for data in kinds:
        data.save_to_disk(tmp_path / "data")
        sample = HubSource(f"hf:{tmp_path / 'data'}", Columns(), 32)[0]
        assert sample.image.shape == (40, 48, 3)
    source = HubSource(f"hf:{tmp_path / 'data'}", Columns(), 32)
    source.data = rows
    assert [source[i].image.shape for i in (2, 4)] == [(40, 48, 3)] * 2
    with pytest.raises(UserError, match="row 3 is NoneType, not a picture"):
        source[3]
    with pytest.raises(UserError, match="row 5: the picture is not a picture"):
        source[5]


def test_coco_knows_sizes_from_its_index(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLFILL_CACHE", str(tmp_path / "cache"))
    picture(tmp_path / "images" / "b.png")
    images = [
        {"id": 1, "file_name": "absent.png", "height": 7, "width": 7},
        {"id": 2, "file_name": "b.png", "height": 40, "width": 48},
    ]
    (tmp_path / "ann.json").write_text(json.dumps({"images": images}))
    options = DataOptions(ann_file=tmp_path / "ann.json", max_train_samples=5)
    source = open_source(str(tmp_path / "images"), options)
    assert source.sizes().tolist() == [[40, 48]]

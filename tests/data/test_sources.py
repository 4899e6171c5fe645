"""Folders, pairs and COCO become samples; what is missing is named."""

import json

import numpy as np
import pytest
from PIL import Image

from controlfill.data import coco as coco_module
from controlfill.data.coco import CocoSource, draw_segmentation, open_index
from controlfill.data.sample import PreparedSource
from controlfill.data.sources import make_preparation, open_source
from controlfill.data.worlds import HELD_OUT
from controlfill.errors import UserError
from controlfill.options import DataOptions

OPTIONS = DataOptions(image_size=32)


def picture(path, colour="red", size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_a_folder_gives_pictures_with_captions_beside_them(tmp_path):
    picture(tmp_path / "b.png", "blue")
    picture(tmp_path / "deep" / "a.jpg")
    (tmp_path / "b.txt").write_text("a blue wall\n\nanother wording\n", "utf-8")
    (tmp_path / "notes.md").write_text("no picture")
    source = open_source(str(tmp_path), OPTIONS)
    assert len(source) == 2
    assert source[0].prompts == ("a blue wall", "another wording")
    assert source[1].prompts == ()
    assert source[0].image.shape == (40, 48, 3)


def test_a_folder_of_pairs_uses_the_given_masks(tmp_path):
    picture(tmp_path / "i" / "x.jpg")
    mask = Image.new("L", (48, 40), 0)
    mask.paste(255, (10, 10, 30, 30))
    (tmp_path / "m").mkdir()
    mask.save(tmp_path / "m" / "x.png")
    options = DataOptions(image_size=32, mask_dir=tmp_path / "m", crop="center")
    source = open_source(str(tmp_path / "i"), options)
    sample, _ = PreparedSource(source, make_preparation(options), 0)[0, 0]
    assert 0.2 < (sample.mask > 0).mean() < 0.4
    assert sample.mask[16, 14] == 255
    assert sample.mask[0, 0] == 0


def test_pairs_that_lack_a_mask_are_named(tmp_path):
    picture(tmp_path / "i" / "x.jpg")
    (tmp_path / "m").mkdir()
    options = DataOptions(mask_dir=tmp_path / "m")
    with pytest.raises(UserError, match=r"1 of 1 pictures have no mask.*x\.jpg"):
        open_source(str(tmp_path / "i"), options)
    with pytest.raises(UserError, match="is no folder"):
        open_source(str(tmp_path / "i"), DataOptions(mask_dir=tmp_path / "none"))


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        open_source(str(tmp_path), OPTIONS)
    with pytest.raises(UserError, match="is no folder"):
        open_source(str(tmp_path / "none"), OPTIONS)
    for where, given, words in [
        (str(tmp_path), {"captions_file": tmp_path}, "goes with --ann_file"),
        (str(tmp_path), {"ann_file": tmp_path, "mask_dir": tmp_path}, "give one of them"),
        ("world:shapes", {"mask_dir": tmp_path}, "--mask_dir goes with a folder"),
        ("world:shapes", {"ann_file": tmp_path}, "--ann_file goes with a folder"),
    ]:
        with pytest.raises(UserError, match=words):
            open_source(where, DataOptions(**given))


def test_broken_files_in_a_folder_are_skipped_and_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("this is text")
    whole = picture(tmp_path / "c.jpg").read_bytes()
    (tmp_path / "c.jpg").write_bytes(whole[: len(whole) // 2])
    data = PreparedSource(open_source(str(tmp_path), OPTIONS), make_preparation(OPTIONS), 0)
    sample, skipped = data[0, 1]
    assert sample.name == "a.png"
    assert [("b.png" in skipped[0]), ("c.jpg" in skipped[1])] == [True, True]


def test_worlds_keep_training_and_held_out_apart():
    train, held = (open_source("world:shapes", OPTIONS, held_out=h) for h in (False, True))
    assert (train.first, held.first) == (0, HELD_OUT)
    assert len(train) < HELD_OUT
    assert train[3].image.shape == (32, 32, 3)
    assert len(train[3].objects()) == 1
    assert train[3].prompt != held[3].prompt or not np.array_equal(train[3].image, held[3].image)


@pytest.fixture
def small_coco(tmp_path, monkeypatch):
    """Two pictures, one of them absent, with a polygon, both kinds of RLE, and captions."""
    monkeypatch.setenv("CONTROLFILL_CACHE", str(tmp_path / "cache"))
    picture(tmp_path / "images" / "one.jpg", size=(60, 40))
    counts = [0, 40 * 30, 40 * 30]  # the left half, column by column
    annotations = [
        {"id": 2, "image_id": 9, "segmentation": [[0, 0, 5, 0, 5, 5]], "iscrowd": 0},
        {"id": 1, "image_id": 5, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]], "bbox": [1]},
        {"id": 3, "image_id": 5, "segmentation": {"size": [40, 60], "counts": counts[1:]}},
    ]
    images = [
        {"id": 9, "file_name": "absent.jpg", "height": 10, "width": 10, "license": 3},
        {"id": 5, "file_name": "one.jpg", "height": 40, "width": 60},
    ]
    captions = [{"image_id": 5, "caption": "a wall "}, {"image_id": 5, "caption": "paint"}]
    for name, part in (("instances", annotations), ("captions", captions)):
        content = json.dumps({"info": {}, "images": images, "annotations": part})
        (tmp_path / f"{name}.json").write_text(content)
    return tmp_path


def test_coco_gives_objects_and_captions_and_names_what_is_absent(small_coco):
    source = CocoSource(
        small_coco / "images", small_coco / "instances.json", small_coco / "captions.json", 32
    )
    assert len(source) == 1
    assert source.missing == ["absent.jpg"]
    sample = source[0]
    assert sample.prompts == ("a wall", "paint")
    polygon, half = sample.objects()
    assert polygon[20, 20] == 255
    assert abs((polygon > 0).sum() - 400) < 50
    assert (half > 0).mean() == 0.5


def test_compressed_rle_is_read_too():
    from pycocotools import mask as tools

    shape = np.zeros((12, 9), np.uint8, order="F")
    shape[3:7, 2:5] = 1
    code = tools.encode(shape)
    raw = json.dumps({"size": [12, 9], "counts": code["counts"].decode()}).encode()
    np.testing.assert_array_equal(draw_segmentation(raw, 12, 9), shape * 255)


@pytest.mark.parametrize(
    "raw",
    [b"[]", b"[[]]", b"[[1,2]]", b"[[1,2,3,4]]", b"null", b'{"size":[12,9]}', b"7",
     b'{"size":[12,9],"counts":"\\u0001"}'],
)  # fmt: skip
def test_segmentations_that_enclose_nothing_are_empty(raw):
    mask = draw_segmentation(raw, 12, 9)
    assert mask.shape == (12, 9)
    assert not mask.any()


def test_pictures_without_a_caption_are_no_mistake(small_coco):
    file = small_coco / "captions.json"
    file.write_text(file.read_text().replace('"paint"', "null"))
    source = CocoSource(small_coco / "images", small_coco / "instances.json", file, 32)
    assert source[0].prompts == ("a wall",)


def test_an_index_that_another_process_is_replacing_is_built_again(small_coco):
    file = small_coco / "instances.json"
    open_index(file)
    (coco_module.cache_folder(file) / "text.npy").unlink()
    assert open_index(file).name(1) == "one.jpg"


def test_the_index_is_cached_and_a_changed_file_is_read_again(small_coco, monkeypatch):
    file = small_coco / "instances.json"
    first = open_index(file)
    monkeypatch.setattr(coco_module, "build_index", lambda _: pytest.fail("built again"))
    again = open_index(file)
    assert isinstance(again.text, np.memmap)
    assert again.texts(1) == first.texts(1)
    assert again.name(1) == "one.jpg"
    file.write_text(file.read_text() + " ")
    with pytest.raises(pytest.fail.Exception):
        open_index(file)


def test_an_unwritable_cache_costs_nothing_but_time(small_coco, monkeypatch):
    (small_coco / "file").write_text("")
    monkeypatch.setenv("CONTROLFILL_CACHE", str(small_coco / "file"))
    assert open_index(small_coco / "instances.json").name(0) == "absent.jpg"


def test_wrong_annotation_files_are_refused(small_coco):
    (small_coco / "bad.json").write_text('{"images": [{"id": "x"}]}')
    with pytest.raises(UserError, match="is no COCO annotation file"):
        open_index(small_coco / "bad.json")
    with pytest.raises(UserError, match="does not exist"):
        open_index(small_coco / "none.json")
    (small_coco / "empty").mkdir()
    with pytest.raises(UserError, match="none of the 2 pictures"):
        CocoSource(small_coco / "empty", small_coco / "instances.json", None, 32)


def test_real_coco(coco, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLFILL_CACHE", str(tmp_path))
    options = DataOptions(
        ann_file=coco / "annotations" / "instances_train2017.json",
        captions_file=coco / "annotations" / "captions_train2017.json",
        image_size=128,
        mask_kinds=("object",),
    )
    source = open_source(str(coco / "train2017"), options)
    assert len(source) == 80
    data = PreparedSource(source, make_preparation(options), 0)
    for index in range(0, 80, 8):
        sample, skipped = data[0, index]
        assert not skipped
        assert len(sample.prompt) > 10
        assert 0.1 <= (sample.mask > 0).mean() <= 0.3

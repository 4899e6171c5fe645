"""Data written in other layouts reads back as what it was; what was interrupted goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from controlfill.data.prepare import (
    edges,
    prepare_shards,
    prepare_table,
    write_shards,
    write_table,
)
from controlfill.data.sample import Sample
from controlfill.data.sources import open_source
from controlfill.errors import UserError
from controlfill.options import DataOptions
from controlfill.options.preparing import PrepareShardsOptions, PrepareTableOptions

OPTIONS = DataOptions(image_size=32)


class Numbers:
    """Grey pictures; some stop the program, some are broken."""

    def __init__(self, count, stop_at=None, broken=()):
        self.count, self.stop_at, self.broken, self.read = count, stop_at, broken, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.stop_at:
            raise KeyboardInterrupt
        if index in self.broken:
            raise UserError(f"picture {index} is broken")
        self.read.append(index)
        return Sample(image=np.full((8, 9, 3), index, np.uint8), prompt=f"grey {index}")


def test_a_world_becomes_a_table_with_edges(tmp_path):
    told = []
    options = PrepareTableOptions(data="world:shapes", out=tmp_path / "t", count=3, image_size=32)
    result = prepare_table(options, lambda *words: told.append(words))
    assert (result.samples, result.skipped) == (3, [])
    assert told[-1] == ("pictures", 3, 3)
    lines = (tmp_path / "t" / "train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[2]["image"] == "images/000002.png"
    assert rows[2]["conditioning_image"] == "conditioning_images/000002.png"
    source, world = open_source(str(tmp_path / "t"), OPTIONS), open_source("world:shapes", OPTIONS)
    assert source.has_hints
    for index in range(3):
        np.testing.assert_array_equal(source[index].image, world[index].image)
        np.testing.assert_array_equal(source[index].hint, edges(world[index].image))
        assert source[index].prompt == world[index].prompt
        assert set(np.unique(source[index].hint)) == {0, 255}
    with pytest.raises(UserError, match="already holds a table"):
        prepare_table(options)


def test_table_options_do_what_they_say(tmp_path):
    options = PrepareTableOptions(
        data="world:shapes", out=tmp_path / "t", max_train_samples=2, count=5, image_size=32,
        make_hint="none", image_format="jpg",
    )  # fmt: skip
    assert prepare_table(options).samples == 2
    assert not open_source(str(tmp_path / "t"), OPTIONS).has_hints
    with Image.open(tmp_path / "t" / "images" / "000001.jpg") as picture:
        assert picture.format == "JPEG"
    with pytest.raises(UserError, match="has no end; say how many pictures with --count"):
        prepare_table(PrepareTableOptions(data="world:shapes", out=tmp_path / "u"))


def test_broken_pictures_are_left_out_of_tables_and_named(tmp_path):
    result = write_table(Numbers(3, broken=(1,)), tmp_path / "t")
    assert (result.samples, result.skipped) == (2, ["picture 1 is broken"])
    assert [open_source(str(tmp_path / "t"), OPTIONS)[i].prompt for i in (0, 1)] == [
        "grey 0", "grey 2",
    ]  # fmt: skip
    with pytest.raises(UserError, match="none of the 2 pictures can be used: picture 0"):
        write_table(Numbers(2, broken=(0, 1)), tmp_path / "u")
    assert not (tmp_path / "u" / "train.jsonl").exists()


def test_several_wordings_survive_in_a_table(tmp_path):
    sample = Sample(image=np.zeros((8, 8, 3), np.uint8), prompts=("één", "two"))
    write_table([sample, Sample(image=sample.image)], tmp_path)
    source = open_source(str(tmp_path), OPTIONS)
    assert source[0].prompts == ("één", "two")
    assert (source[1].prompt, source[1].prompts) == ("", ())


def test_a_table_becomes_shards_with_its_hints(tmp_path):
    prepare_table(
        PrepareTableOptions(data="world:shapes", out=tmp_path / "t", count=5, image_size=32)
    )
    told = []
    options = PrepareShardsOptions(
        data=str(tmp_path / "t"), out=tmp_path / "s", per_shard=2, count=4, image_size=32,
        image_format="png",
    )  # fmt: skip
    result = prepare_shards(options, lambda *words: told.append(words))
    assert (result.samples, told) == (4, [("pictures", 2, 4), ("pictures", 4, 4)])
    names = sorted(file.name for file in (tmp_path / "s").iterdir())
    assert names == ["index.json", "shard-000000.tar", "shard-000001.tar"]
    table, stream = (open_source(str(tmp_path / name), OPTIONS) for name in "ts")
    assert stream.has_hints
    for index in range(4):
        np.testing.assert_array_equal(table[index].image, stream[index].image)
        np.testing.assert_array_equal(table[index].hint, stream[index].hint)
        assert table[index].prompt == stream[index].prompt


def test_shards_of_pictures_without_hints_may_get_edges(tmp_path):
    options = {"data": "world:shapes", "count": 2, "image_size": 32}
    prepare_shards(PrepareShardsOptions(out=tmp_path / "plain", **options))
    prepare_shards(PrepareShardsOptions(out=tmp_path / "e", make_hint="edges", **options))
    assert [open_source(str(tmp_path / n), OPTIONS).has_hints for n in ("plain", "e")] == [
        False, True,
    ]  # fmt: skip


def test_an_interrupted_write_goes_on_and_ends_the_same(tmp_path):
    write_shards(Numbers(11, broken=(4,)), tmp_path / "whole", 3)
    with pytest.raises(KeyboardInterrupt):
        write_shards(Numbers(11, stop_at=7, broken=(4,)), tmp_path / "again", 3)
    kept = tmp_path / "again" / "shard-000000.tar"
    before = kept.stat().st_ino
    assert not (tmp_path / "again" / "shard-000002.tar").exists()
    assert (tmp_path / "again" / ".tmp-shard-000002.tar").exists()
    with pytest.raises(UserError, match="are not finished"):
        open_source(str(tmp_path / "again"), OPTIONS)
    rest = Numbers(11, broken=(4,))
    result = write_shards(rest, tmp_path / "again", 3)
    assert rest.read == [6, 7, 8, 9, 10]
    assert kept.stat().st_ino == before
    assert (result.samples, result.skipped) == (10, ["picture 4 is broken"])
    whole, again = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("whole", "again")
    )
    assert whole == again


def test_a_shard_that_was_lost_is_written_again(tmp_path):
    write_shards(Numbers(6), tmp_path, 2)
    (tmp_path / "shard-000001.tar").unlink()
    rest = Numbers(6)
    write_shards(rest, tmp_path, 2)
    assert rest.read == [2, 3, 4, 5]
    assert len(open_source(str(tmp_path), OPTIONS)) == 6


def test_shards_of_other_commands_are_left_alone(tmp_path):
    write_shards(Numbers(6), tmp_path / "a", 2)
    with pytest.raises(UserError, match=r"another command \(per_shard was 2, now 3\)"):
        write_shards(Numbers(6), tmp_path / "a", 3)
    with pytest.raises(UserError, match=r"image_format was 'jpg', now 'png'"):
        write_shards(Numbers(6), tmp_path / "a", 2, "png")
    (tmp_path / "a" / "index.json").unlink()
    with pytest.raises(UserError, match="already holds tars of unknown origin"):
        write_shards(Numbers(6), tmp_path / "a", 2)
    with pytest.raises(UserError, match="none of the 2 pictures can be used"):
        write_shards(Numbers(2, broken=(0, 1)), tmp_path / "b")


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    from webdataset import writer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.TarWriter, "write", full)
    with pytest.raises(UserError, match=r"the disk is full: .*shard-000000\.tar"):
        write_shards(Numbers(2), tmp_path)

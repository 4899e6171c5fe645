"""Shards stream in an order that depends on nothing but the seed, and memory stays flat."""

import io
import itertools
import json
import pickle
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from controlfill.data.prepare import write_shards
from controlfill.data.sample import Sample
from controlfill.data.shards import ShardStream, shuffled
from controlfill.data.sources import FolderSource, make_preparation, open_source
from controlfill.data.streams import PreparedStream, endless
from controlfill.errors import UserError
from controlfill.options import DataOptions

SIDE = 16
OPTIONS = DataOptions(image_size=SIDE, shuffle_buffer=5, mask_kinds=("rectangle",))


class Tiny:
    """Pictures whose prompt is their number, and whose green and blue spell it."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((SIDE, SIDE, 3), 90, np.uint8)
        image[..., 1:] = divmod(index, 256)
        return Sample(image=image, prompt=str(index))


class Hinted(Tiny):
    """The same with a conditioning picture and a mask, and several wordings for odd numbers."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[:5] = 255
        words = {"prompts": (f"{index}", f"no. {index}")} if index % 2 else {"prompt": "a\nb"}
        return Sample(image=sample.image, hint=255 - sample.image, mask=mask, **words)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 pictures in five shards, the last of three."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(Tiny(23), folder, per_shard=5, image_format="png")
    return folder


def prompts(items):
    return [[sample.prompt for sample, _ in batch] for batch in items]


def prepared(stream, batch=3, **ranks):
    return PreparedStream(stream, make_preparation(OPTIONS), 7, batch, **ranks)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png(colour="red", size=(SIDE, SIDE)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own(shards):
    stream = open_source(str(shards), OPTIONS)
    assert isinstance(stream, ShardStream)
    assert (len(stream), stream.length, stream.missing) == (23, 23, [])
    epochs = [[decode().prompt for _, decode in stream.epoch(e)] for e in (0, 1, 0)]
    assert [number for number, _ in stream.epoch(0)] == list(range(23))
    assert sorted(epochs[0], key=int) == [str(i) for i in range(23)]
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]
    other = open_source(str(shards), DataOptions(seed=5, shuffle_buffer=5))
    assert [decode().prompt for _, decode in other.epoch(0)] != epochs[0]


def test_the_shuffle_buffer_mixes_that_far_and_no_farther(shards):
    rng = np.random.default_rng(0)
    assert list(shuffled(range(50), 1, rng)) == list(range(50))
    mixed = list(shuffled(range(50), 8, rng))
    assert sorted(mixed) == list(range(50))
    assert mixed != sorted(mixed)
    assert max(value - place for place, value in enumerate(mixed)) <= 8
    alone = ShardStream(str(shards), DataOptions(shuffle_buffer=1))
    order = [int(decode().prompt) for _, decode in alone.epoch(0)]
    # Within a shard nothing moves; two shards may happen to follow each other.
    assert 18 <= sum(b == a + 1 for a, b in itertools.pairwise(order)) < 22


# Three workers are wanted on machines with fewer cores, too.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(shards, workers):
    data = prepared(open_source(str(shards), OPTIONS)).between(2, 15)
    alone = list(DataLoader(data, batch_size=None, collate_fn=list))
    several = list(DataLoader(data, batch_size=None, num_workers=workers, collate_fn=pickle.dumps))
    assert len(alone) == len(data) == 13
    assert prompts(map(pickle.loads, several)) == prompts(alone)
    for ours, theirs in zip(alone, map(pickle.loads, several), strict=True):
        for (a, _), (b, _) in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.mask, b.mask)


def test_more_workers_than_batches_are_no_mistake(shards):
    data = prepared(open_source(str(shards), OPTIONS)).between(0, 1)
    assert len(list(DataLoader(data, batch_size=None, num_workers=2, collate_fn=len))) == 1


def test_a_resumed_stream_goes_on_where_it_was(shards):
    stream = open_source(str(shards), OPTIONS)
    whole = list(prepared(stream).between(0, 20))
    for start in (1, 7, 8, 19):
        rest = list(prepared(stream).between(start, 20))
        assert prompts(rest) == prompts(whole[start:])
        np.testing.assert_array_equal(rest[0][0][0].mask, whole[start][0][0].mask)
    sequence = [place.decode().prompt for place in itertools.islice(endless(stream), 60)]
    assert [p for batch in prompts(whole) for p in batch] == sequence
    masks = {sample.mask.tobytes() for batch in whole for sample, _ in batch}
    assert len(masks) > 30


def test_nothing_is_decoded_that_is_only_passed_over(shards, monkeypatch):
    stream = open_source(str(shards), OPTIONS)
    decoded = []
    true = ShardStream._decode
    monkeypatch.setattr(
        ShardStream, "_decode", lambda self, group: decoded.append(0) or true(self, group)
    )
    assert len(list(prepared(stream).between(6, 7))) == 1
    assert len(decoded) == 3


def test_ranks_share_an_epoch_without_overlap(shards):
    stream = open_source(str(shards), OPTIONS)
    ranks = [list(prepared(stream, 2, rank=r, ranks=3).between(0, 3)) for r in range(3)]
    seen = [p for rank in ranks for batch in prompts(rank) for p in batch]
    assert len(set(seen)) == len(seen) == 18
    single = [p for batch in prompts(prepared(stream, 2).between(0, 9)) for p in batch]
    rows = zip(*map(prompts, ranks), strict=True)
    assert [p for row in rows for batch in row for p in batch] == single


def test_ten_thousand_pictures_stream_in_flat_memory(tmp_path):
    write_shards(Tiny(10_000), tmp_path, per_shard=5000)
    stream = ShardStream(str(tmp_path), DataOptions(image_size=SIDE, shuffle_buffer=200))
    reading = stream.epoch(0)
    for _ in range(1000):
        next(reading)[1]()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    count = 1000
    for number, decode in reading:
        count += 1
        if number % 20 == 0:
            decode()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000
    # Keeping the headers alone would cost 6 MB here.
    assert peak - before < 1_500_000


def broken_shards(folder, broken):
    """Nine samples in one tar, some of which are no pictures."""
    members = []
    for number in range(9):
        data = b"no picture" if number in broken else png()
        members += [(f"{number}.png", data), (f"{number}.txt", str(number).encode())]
    tar_of(folder / "a.tar", members)
    return ShardStream(str(folder), DataOptions(image_size=SIDE, shuffle_buffer=1))


def test_a_broken_picture_is_named_and_changes_no_other_batch(tmp_path):
    whole = list(prepared(broken_shards(tmp_path / "w", ())).between(0, 3))
    some = list(prepared(broken_shards(tmp_path / "s", (4, 8))).between(0, 3))
    assert prompts(whole) == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"]]
    assert prompts(some) == [["0", "1", "2"], ["3", "5", "5"], ["6", "7", "6"]]
    reasons = [reason for batch in some for _, skipped in batch for reason in skipped]
    assert [reason.split(":")[:2] for reason in reasons] == [["a.tar", "4"], ["a.tar", "8"]]
    np.testing.assert_array_equal(some[1][1][0].mask, whole[1][1][0].mask)
    np.testing.assert_array_equal(some[2][0][0].mask, whole[2][0][0].mask)


def test_a_batch_of_broken_pictures_takes_the_next_one_that_is_whole(tmp_path):
    stream = broken_shards(tmp_path / "s", (2, 3, 4, 8))
    assert prompts(prepared(stream, 1).between(0, 9)) == [[n] for n in "015555670"]
    assert prompts(prepared(stream, 2).between(0, 3)) == [["0", "1"], ["5", "5"], ["5", "5"]]
    none = broken_shards(tmp_path / "n", range(9))
    with pytest.raises(UserError, match=r"none of the samples in .* can be used: a\.tar:0"):
        next(iter(prepared(none).between(0, 1)))


def test_a_tar_that_is_cut_off_gives_what_it_has_and_is_named(tmp_path, shards):
    for name in ("shard-000000.tar", "shard-000001.tar"):
        (tmp_path / name).write_bytes((shards / name).read_bytes())
    cut = tmp_path / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[:4600])
    (tmp_path / "shard-000002.tar").write_bytes(b"x" * 600)
    stream = ShardStream(str(tmp_path), OPTIONS)
    assert len(stream) == 6
    assert [("000001" in stream.missing[0]), ("000002" in stream.missing[1])] == [True, True]
    assert "its first 1 samples are used" in stream.missing[0]
    assert len([decode() for _, decode in stream.epoch(3)]) == 6
    # One that gets shorter later keeps its place in the order.
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    reasons = []
    for _, decode in stream.epoch(3):
        try:
            decode()
        except UserError as error:
            reasons.append(str(error))
    assert len(reasons) == 5
    assert "shard-000000.tar can't be read to its end" in reasons[0]
    cut.unlink()
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="holds no samples: .*000002.tar can't be read to its end"):
        len(ShardStream(str(tmp_path), OPTIONS))


def test_shards_of_other_makers(tmp_path, shards):
    words = {"caption": ["one", "two"], "url": "x"}
    tar_of(
        tmp_path / "other.tar",
        [
            ("notes.txt", b"no sample"),
            ("deep/a.JPG", png("red")), ("deep/a.json", json.dumps(words).encode()),
            ("deep/a.cls", b"3"), ("deep/a.edge.png", png("white")),
            ("deep/b.webp", png("blue")), ("deep/b.txt", b"first\n\nsecond\n"),
            ("deep/b.hint.png", png("white", (8, 8))), ("deep/b.mask.png", png("white")),
            ("deep/c.png", png("lime")),
            ("deep/d.png", png()), ("deep/d.json", b"{"), ("deep/d.hint.png", png()),
            ("deep/e.png", png()), ("deep/e.hint.png", png("red", (9, 16))),
        ],
    )  # fmt: skip
    options = DataOptions(
        image_size=SIDE, caption_column="caption", conditioning_image_column="edge"
    )
    stream = open_source(str(tmp_path / "other.tar"), options)
    assert stream.has_hints
    assert len(stream) == 5
    first, second = stream[0], stream[1]
    assert first.prompts == ("one", "two")
    assert first.hint.min() == 255
    assert second.prompts == ("first", "second")
    assert second.hint.shape == second.image.shape
    assert second.mask.min() == 255
    for index, reason in ((2, "c has no conditioning"), (3, "not JSON"), (4, "is 9x16")):
        with pytest.raises(UserError, match=reason):
            stream[index]
    with pytest.raises(IndexError):
        stream[5]
    plain = open_source(str(shards), DataOptions(image_column="nope"))
    assert not plain.has_hints
    assert plain[7].prompt == "7"


def test_hints_masks_and_wordings_survive(tmp_path):
    write_shards(Hinted(4), tmp_path, per_shard=3, image_format="png")
    stream = ShardStream(str(tmp_path), OPTIONS)
    assert stream.has_hints
    for index, source in enumerate(Hinted(4)[i] for i in range(4)):
        sample = stream[index]
        np.testing.assert_array_equal(sample.image, source.image)
        np.testing.assert_array_equal(sample.hint, source.hint)
        np.testing.assert_array_equal(sample.mask, source.mask)
        assert (sample.prompt, sample.prompts) == (source.prompt, source.prompts)


def test_ways_of_naming_shards(shards, tmp_path):
    def count(where):
        return len(open_source(where, OPTIONS))

    assert count(f"{shards}/shard-00000{{0..1}}.tar") == 10
    assert count(f"{shards}/shard-*[34].tar") == 8
    assert len(ShardStream(f"{shards}/../shards/shard-000000.tar", OPTIONS).index) == 1
    assert count(f"{shards}/shard-000004.tar") == 3
    for where in ("shard-00000{3..5}.tar", "none-*.tar", "none.tar"):
        with pytest.raises(UserError, match=r"does not exist; give a folder of \.tar files"):
            open_source(f"{shards}/{where}", OPTIONS)
    tar_of(tmp_path / "x" / "a.tar", [("a.png", png())])
    (tmp_path / "x" / "b.png").write_bytes(png())
    assert isinstance(open_source(str(tmp_path / "x"), OPTIONS), FolderSource)
    tar_of(tmp_path / "y" / "a.tar", [("a.txt", b"no picture")])
    with pytest.raises(UserError, match=r"holds no samples: no picture"):
        count(str(tmp_path / "y"))
    assert not open_source(str(tmp_path / "y"), OPTIONS).has_hints
    with pytest.raises(UserError, match="--mask_dir goes with a plain folder"):
        open_source(str(shards), DataOptions(mask_dir=shards))


def test_max_train_samples_takes_the_first_of_the_stream(shards):
    stream = open_source(str(shards), DataOptions(shuffle_buffer=5, max_train_samples=7))
    assert len(stream) == 7
    found = {int(decode().prompt) for _, decode in stream.epoch(4)}
    assert found == set(range(7))


def test_addresses_are_streamed_in_the_same_order(shards):
    pipes = f"pipe:cat {shards}/shard-00000{{0..4}}.tar"
    stream = open_source(pipes, OPTIONS)
    local = open_source(str(shards), OPTIONS)
    assert stream.length is None
    assert not stream.has_hints
    assert stream.missing == []
    with pytest.raises(UserError, match="--max_steps"):
        len(stream)
    with pytest.raises(UserError, match="--max_train_samples needs local shards"):
        open_source(pipes, DataOptions(max_train_samples=3))
    there, here = (prompts(prepared(s).between(6, 12)) for s in (stream, local))
    assert there == here


def test_addresses_that_can_not_be_read_are_named(tmp_path):
    whole = tar_of(tmp_path / "whole.tar", [(f"{i}.png", png()) for i in range(2)])
    for where in ("pipe:exit 3", "http://127.0.0.1:9/{0..1}.tar", f"pipe:cat {whole}; exit 3"):
        stream = ShardStream(where, OPTIONS)
        with pytest.raises(UserError, match=r"(3|tar) can't be read to its end") as error:
            next(iter(prepared(stream).between(0, 1)))
        assert "\n" not in str(error.value)
    file = tar_of(tmp_path / "a.tar", [("a.txt", b"no picture")])
    stream = ShardStream(f"pipe:cat {file}", OPTIONS)
    with pytest.raises(UserError, match="holds no samples with a picture"):
        next(iter(prepared(stream).between(0, 1)))


def test_an_index_that_is_wrong_or_unfinished_is_refused(tmp_path, shards):
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "whole": False}))
    with pytest.raises(UserError, match="are not finished; run the command"):
        open_source(str(tmp_path), OPTIONS)
    (tmp_path / "index.json").write_text(json.dumps(index))
    tar_of(tmp_path / "shard-000003.tar", [("a.png", png())])
    with pytest.raises(UserError, match=r"shard-000003\.tar is not what index\.json says"):
        open_source(str(tmp_path), OPTIONS)
    (tmp_path / "index.json").write_text('["of another tool"]')
    assert len(open_source(str(tmp_path), OPTIONS)) == 19


def test_without_webdataset_the_extra_is_named(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    with pytest.raises(UserError, match=r"pip install 'controlfill\[data\]'"):
        open_source(str(shards), OPTIONS)[0]

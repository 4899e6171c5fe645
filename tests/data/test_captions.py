"""Captions are written where they miss; those that are there, and all other columns, stay."""

import json

import numpy as np
import pytest

from controlfill.cli_prepare import PREPARES
from controlfill.data import captions
from controlfill.data.captions import prepare_captions, template, written
from controlfill.data.palette import describe
from controlfill.data.sources import open_source
from controlfill.errors import UserError
from controlfill.images import save_image
from controlfill.options import DataOptions
from controlfill.options.skinset import PrepareCaptionsOptions
from controlfill.reading import read_options


def pictures(folder, count=5):
    """A folder of grey pictures in a subfolder, each of its own brightness."""
    for number in range(count):
        save_image(folder / "images" / f"{number}.png", np.full((20, 24, 3), 40 * number, np.uint8))
    return folder


def table(folder, count=5, **texts):
    """The same as a table; `texts` are captions by the row's number, as `_0=...`."""
    rows = [
        {"image": f"images/{n}.png", "box": [], "note": "ü\u2028", "text": texts.get(f"_{n}", "")}
        for n in range(count)
    ]
    pictures(folder, count)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(folder):
    return [
        json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").split("\n")[:-1]
    ]


class Counter:
    """Words that say how bright a picture is; stops the program at some call."""

    def __init__(self, stop_at=None):
        self.stop_at, self.batches = stop_at, []

    def __call__(self, samples):
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append([sample.name for sample in samples])
        return [f"grey {sample.image[0, 0, 0]}" for sample in samples]


def options(folder, **more):
    return PrepareCaptionsOptions(data=folder, **{"prefix": "", "suffix": "", **more})


def test_a_table_gets_the_captions_it_lacks(tmp_path):
    folder = table(tmp_path, _1="mine", _3=["two", "wordings"])
    before, told, words = rows_of(folder), [], Counter()
    done = prepare_captions(options(folder, batch_size=2), words, lambda *said: told.append(said))
    assert (done.samples, done.kept, done.skipped) == (3, 2, [])
    assert words.batches == [["images/0.png", "images/2.png"], ["images/4.png"]]
    assert told == [("captions", 2, 3), ("captions", 3, 3)]
    after = rows_of(folder)
    assert [row.pop("text") for row in after] == [
        "grey 0", "mine", "grey 80", ["two", "wordings"], "grey 160",
    ]  # fmt: skip
    assert after == [{key: row[key] for key in ("image", "box", "note")} for row in before]
    again = prepare_captions(options(folder), Counter(stop_at=0))
    assert (again.samples, again.kept) == (0, 5)
    assert prepare_captions(options(folder, overwrite=True), Counter()).samples == 5
    assert rows_of(folder)[3]["text"] == "grey 120"


def test_plain_pictures_get_files_that_training_reads(tmp_path):
    folder = pictures(tmp_path)
    (folder / "images" / "1.txt").write_text("mine\n")
    (folder / "images" / "2.txt").write_text("\n")
    done = prepare_captions(options(folder), Counter())
    assert (done.samples, done.kept) == (4, 1)
    source = open_source(str(folder), DataOptions())
    found = ["".join(source[n].prompts) for n in range(5)]
    assert found == ["grey 0", "mine", "grey 80", "grey 120", "grey 160"]
    prepare_captions(options(folder, overwrite=True), Counter())
    assert (folder / "images" / "1.txt").read_text() == "grey 40\n"


@pytest.mark.parametrize("make", [table, pictures])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, make):
    folder, whole = make(tmp_path / "a"), make(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        prepare_captions(options(folder, batch_size=2), Counter(stop_at=2))
    rest = Counter()
    done = prepare_captions(options(folder, batch_size=2), rest)
    assert (done.samples, done.kept, len(rest.batches)) == (1, 4, 1)
    prepare_captions(options(whole), Counter())
    files = [sorted(f for f in p.rglob("*") if f.is_file()) for p in (folder, whole)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_a_table_is_saved_now_and_then(tmp_path, monkeypatch):
    folder, saved = table(tmp_path), []
    monkeypatch.setattr(captions, "KEEP", 2)
    keep = captions.Table.save
    monkeypatch.setattr(captions.Table, "save", lambda own: saved.append(keep(own)))
    prepare_captions(options(folder, batch_size=1), Counter())
    assert len(saved) == 3
    assert rows_of(folder)[4]["text"] == "grey 160"


def test_prefix_and_suffix_are_said_once(tmp_path):
    folder = pictures(tmp_path, 4)
    said = ["Skin of  wood", "glass,new", "skin offal", "skin of"]
    dress = options(folder, prefix="skin of", suffix=",new")
    prepare_captions(dress, lambda samples: said[: len(samples)])
    assert [(folder / "images" / f"{n}.txt").read_text() for n in range(4)] == [
        "Skin of wood,new\n", "skin of glass,new\n", "skin of skin offal,new\n", "skin of,new\n",
    ]  # fmt: skip


def test_words_by_hand_are_found_by_path_or_name(tmp_path):
    folder = table(tmp_path / "t")
    (tmp_path / "w.jsonl").write_text(
        '{"image": "images/0.png", "text": ["one", "two"]}\n{"image": "3.png", "text": "three"}\n'
    )
    (tmp_path / "w.csv").write_text("file_name,text\n4.png,four\n")
    done = prepare_captions(options(folder, suffix=",x"), written(tmp_path / "w.jsonl"))
    assert done.samples == 2
    assert done.skipped == [f"images/{n}.png: no words were found for it" for n in (1, 2, 4)]
    assert [row["text"] for row in rows_of(folder)] == [["one,x", "two,x"], "", "", "three,x", ""]
    command("prepare captions", folder, "--captions", tmp_path / "w.csv", "--suffix", "")
    assert rows_of(folder)[4]["text"] == "a keyboard skin of four"
    (tmp_path / "bare.csv").write_text("image\n4.png\n")
    (tmp_path / "none.csv").write_text("image,text\n")
    for name, why in (("w.txt", "is no .jsonl or .csv"), ("bare.csv", "has no column 'text'"),
                      ("none.csv", "holds no rows"), ("absent.csv", "can't be read")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            written(tmp_path / name)


def command(name, *arguments):
    """Run a command of `PREPARES` as the command line does."""
    cls, run = PREPARES[name]
    run(read_options(cls, name, [str(argument) for argument in arguments]))


def test_the_template_needs_no_model(tmp_path, capsys):
    folder = table(tmp_path, 2, _0="mine")
    save_image(folder / "images" / "1.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="none of the 1 pictures has got a caption: images/1.png"):
        command("prepare captions", folder)
    command("prepare captions", folder, "--overwrite", "--prefix", "skin:", "--batch_size", "1")
    picture = np.zeros((20, 24, 3), np.uint8)
    assert rows_of(folder)[0]["text"] == f"skin: {describe(picture)},iflyskin"
    assert rows_of(folder)[1]["text"] == ""
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "skipped: images/1.png: no words were found for it", f"wrote 1 captions in {folder}",
    ]  # fmt: skip
    assert template([]) == []
    with pytest.raises(UserError, match="both say where words come from; give one"):
        command("prepare captions", folder, "--captions", "w.csv", "--model", "a/b")


def test_broken_pictures_are_named_and_mistakes_are_told(tmp_path):
    folder = table(tmp_path / "t", 3)
    (folder / "images" / "1.png").write_bytes(b"no picture")
    done = prepare_captions(options(folder), Counter())
    assert (done.samples, len(done.skipped)) == (2, 1)
    assert "1.png is not a picture" in done.skipped[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metadata.csv").write_text("image,text\na.png,b\n")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("")
    for name, why in (("empty", "holds neither a train.jsonl nor pictures"),
                      ("none", "is no folder; give one with a train.jsonl"),
                      ("csv", "is a CSV, in which"), ("rows", "holds no rows")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            prepare_captions(options(tmp_path / name), Counter())

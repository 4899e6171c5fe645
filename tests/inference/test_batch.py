"""A batch does what it can, names what it can't, and goes on where it stopped."""

import json

import numpy as np
import pytest
from PIL import Image

from controlfill.cli import run
from controlfill.errors import UserError
from controlfill.inference import batch as room
from controlfill.inference.batch import MANIFEST, find_jobs, run_batch
from controlfill.options import BatchOptions

FAST = {"num_inference_steps": 1, "device": "cpu"}


@pytest.fixture
def folder(photo, hole, tmp_path):
    """Three pictures (one in a folder below, one broken) and masks for all of them."""
    for name in ("a.jpg", "deep/b.png", "c.png"):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(file)
        mask = (tmp_path / "masks" / name).with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(hole).save(mask)
    (tmp_path / "in" / "c.png").write_bytes(b"no picture")
    return tmp_path


def options_of(folder, data="in", **more):
    return BatchOptions(data=folder / data, output_dir=folder / "out", **FAST, **more)


def lines(folder):
    return [json.loads(line) for line in (folder / "out" / MANIFEST).read_text().splitlines()]


def test_a_folder_is_filled_and_what_is_broken_is_named(pipe, folder, photo, hole):
    told = []
    options = options_of(folder, mask_dir=folder / "masks")
    written, skipped = run_batch(pipe, options, lambda *at: told.append(at))
    assert written == ["a.png", "deep/b.png"]
    assert len(skipped) == 1
    assert "c.png is not a picture" in skipped[0]
    assert told[-1] == ("pictures", 3, 3)
    with Image.open(folder / "out" / "deep" / "b.png") as made:
        np.testing.assert_array_equal(np.asarray(made)[hole == 0], photo[hole == 0])
    assert [bool(line["error"]) for line in lines(folder)] == [False, True, False]


def test_it_goes_on_where_it_stopped(pipe, folder, monkeypatch):
    options = options_of(folder, mask_dir=folder / "masks")
    made, fill = [], room.inpaint

    def dies_at_the_second(pipeline, photo, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(photo)
        return fill(pipeline, photo, *rest)

    monkeypatch.setattr(room, "inpaint", dies_at_the_second)
    (folder / "in" / "c.png").unlink()
    with pytest.raises(KeyboardInterrupt):
        run_batch(pipe, options, lambda *_: None)
    with (folder / "out" / MANIFEST).open("a") as manifest:
        manifest.write('{"image": "cut in the mid')
    monkeypatch.setattr(room, "inpaint", fill)
    assert run_batch(pipe, options, lambda *_: None)[0] == ["deep/b.png"]
    assert run_batch(pipe, options, lambda *_: None) == ([], [])
    (folder / "out" / "a.png").unlink()
    assert run_batch(pipe, options, lambda *_: None)[0] == ["a.png"]
    other = options_of(folder, mask_dir=folder / "masks", seed=9)
    assert len(run_batch(pipe, other, lambda *_: None)[0]) == 2


def test_without_masks_pictures_grow(pipe, folder):
    written, _ = run_batch(pipe, options_of(folder, left=3, top=2), lambda *_: None)
    with Image.open(folder / "out" / written[0]) as made:
        assert made.size == (73, 47)
    _, skipped = run_batch(pipe, options_of(folder), lambda *_: None)
    assert "neither a mask nor a side to grow" in skipped[0]


def test_a_list_says_it_for_each_picture(pipe, folder, photo):
    rows = [
        {"image": "in/a.jpg", "mask": "masks/a.png", "prompt": "red star", "seed": 3},
        {"image": "in/a.jpg", "to": "90x60", "output": "../../grown"},
        {"image": "in/deep/b.png", "mask": "masks/deep/b.png", "strength": 7},
        {"image": "in/deep/b.png", "mask": "masks/deep/b.png", "brush": 7},
        {"image": "in/a.jpg", "mask": "masks/a.png"},
        {"mask": "masks/a.png"},
    ]
    text = "\n".join([*map(json.dumps, rows), "", "{broken"])
    (folder / "list.jsonl").write_text(text)
    written, skipped = run_batch(pipe, options_of(folder, "list.jsonl"), lambda *_: None)
    assert written == ["a.png", "grown.png", "a-2.png"]
    assert (folder / "out" / "grown.png").is_file()
    for reason, words in zip(
        skipped,
        ["--strength is 7", "list.jsonl, line 4: brush is no option", "line 6: wanted an object",
         "list.jsonl, line 8: "],
        strict=True,
    ):  # fmt: skip
        assert words in reason
    with Image.open(folder / "out" / "a.png") as made:
        settings = json.loads(made.info["controlfill"])
    assert (settings["prompt"], settings["seed"]) == ("red star", 3)


def test_pictures_without_their_mask_are_named(folder):
    (folder / "masks" / "a.png").unlink()
    jobs = find_jobs(options_of(folder, mask_dir=folder / "masks"))
    assert [bool(job.trouble) for job in jobs] == [True, False, False]
    with pytest.raises(UserError, match="nowhere is no folder; it holds a mask per picture"):
        find_jobs(options_of(folder, mask_dir=folder / "nowhere"))


@pytest.mark.parametrize(
    ("data", "words"), [("nowhere", "neither a folder"), ("empty", "holds no pictures")]
)
def test_batches_of_nothing_are_refused(folder, data, words):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        find_jobs(options_of(folder, data))


def test_the_command(folder, capsys):
    words = ["batch", str(folder / "in"), "--mask_dir", str(folder / "masks"), "--device", "cpu"]
    words += ["--num_inference_steps", "1", "--output_dir", str(folder / "out")]
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "wrote 2 pictures to" in said
    assert "skipped 1" in said
    assert run(["batch", str(folder / "nowhere")]) == 2

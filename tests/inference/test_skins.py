"""A batch of skins does what it can, names what it can't, goes on where it stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from controlfill.cli import COMMANDS, run
from controlfill.cli_skin_generate import SKIN_GENERATE
from controlfill.errors import UserError
from controlfill.images import as_photo, read_settings, save_image
from controlfill.inference import skins as room
from controlfill.inference.batch import MANIFEST
from controlfill.inference.complete import Result
from controlfill.inference.pipeline import load
from controlfill.inference.skins import find_requests, name_of, run_skins
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import make_controlnet, make_header, save_controlnet
from controlfill.options.skin_generate import SkinGenerateOptions
from controlfill.skins.compose import compose
from controlfill.skins.draw import draw_labels, edge_hint, glyph_hint
from controlfill.skins.layout import open_layout

SIZE, LAYOUT = "128x80", open_layout("qwerty-26").at((80, 128))


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A ControlNet of given hints with random weights, its last layers too, so that it matters."""
    folder = tmp_path_factory.mktemp("control")
    bundle = load_bundle("embedded")
    torch.manual_seed(0)
    network = make_controlnet(bundle, 3)
    for layer in (network.controlnet_cond_embedding.conv_out, *network.controlnet_down_blocks):
        torch.nn.init.normal_(layer.weight, std=0.1)
    save_controlnet(network, folder, make_header(bundle, "image/1"))
    return folder


@pytest.fixture(scope="module")
def painter(control):
    """The pipeline of that ControlNet on the embedded base."""
    return load(control=str(control), device="cpu")


@pytest.fixture
def asked(control, tmp_path):
    """The smallest request."""
    return SkinGenerateOptions(
        output_dir=tmp_path / "out", control=str(control), prompt="a red skin", size=SIZE,
        num_inference_steps=1, device="cpu", slices=False, labels="none",
    )  # fmt: skip


def make(painter, options):
    return run_skins(painter, options, lambda *_: None)


def names(folder):
    return {str(f.relative_to(folder)) for f in folder.iterdir()} - {MANIFEST}


@pytest.fixture
def hints(monkeypatch):
    """The hints of all pictures that are painted, by a quick hand: no network is asked."""
    seen = []

    def told(pipeline, hint, options, progress):
        rng = np.random.default_rng([options.seed, len(options.prompt), int(hint.sum())])
        picture = rng.integers(0, 256, hint.shape).astype(np.uint8)
        seen.append(hint)
        progress(1, 1)
        return Result(image=picture, alpha=None, known=hint, mask=hint, settings=options.as_dict())

    monkeypatch.setattr(room, "follow", told)
    return seen


def test_a_skin_its_labels_its_parts_and_its_themes(painter, asked, hints):
    options = replace(
        asked, labels="drawn", slices=True, theme=("cskin", "trime", "fcitx5"), seed=5
    )
    told = []
    made = run_skins(painter, options, lambda *words: told.append(words))
    assert (made.written, made.kept, made.failed) == (["a-red-skin.png"], [], [])
    assert told == [("sampling", 1, 1), ("skins", 1, 1)]
    out = asked.output_dir
    assert names(out) == {
        "a-red-skin.png", "a-red-skin-labelled.png", "a-red-skin", "a-red-skin.cskin",
        "a-red-skin.trime.zip", "a-red-skin.fcitx5.zip",
    }  # fmt: skip
    np.testing.assert_array_equal(hints[0], edge_hint(LAYOUT))
    picture = as_photo(out / "a-red-skin.png").rgb
    labelled = as_photo(out / "a-red-skin-labelled.png").rgb
    np.testing.assert_array_equal(labelled, draw_labels(picture, LAYOUT))
    np.testing.assert_array_equal(compose(LAYOUT, out / "a-red-skin").image, picture)
    for file in ("a-red-skin.png", "a-red-skin-labelled.png"):
        settings = read_settings(out / file)
        found = {key: settings[key] for key in ("prompt", "seed", "layout", "size", "labels")}
        assert found == {
            "prompt": "a red skin", "seed": 5, "layout": "qwerty-26", "size": SIZE,
            "labels": "drawn",
        }  # fmt: skip


def test_hint_and_labels_go_together(painter, asked, hints):
    glyphs = replace(asked, hint="glyphs", labels=None)
    made = make(painter, glyphs)
    assert names(asked.output_dir) == {"a-red-skin.png"}
    np.testing.assert_array_equal(hints[0], glyph_hint(LAYOUT))
    assert read_settings(asked.output_dir / made.written[0])["labels"] == "in-picture"
    assert find_requests(replace(asked, labels=None))[0].options.labels == "drawn"
    for labels in ("drawn", "none"):
        with pytest.raises(UserError, match=f"--labels {labels} does not go with --hint glyphs"):
            find_requests(replace(glyphs, labels=labels))


def test_the_networks_hear_of_prompt_seed_layout_and_scale(painter, asked):
    changes = (
        {}, {"prompt": "navy"}, {"seed": 1}, {"layout": "t9"},
        {"controlnet_conditioning_scale": 0.0},
    )  # fmt: skip
    pictures = set()
    for number, change in enumerate(changes):
        out = asked.output_dir / str(number)
        options = replace(asked, size="96x64", guidance_scale=1, **change, output_dir=out)
        (name,) = make(painter, options).written
        pictures.add(as_photo(out / name).rgb.tobytes())
    assert len(pictures) == len(changes)
    settings = read_settings(asked.output_dir / "0" / "a-red-skin.png")
    found = [settings[key] for key in ("conditioning", "base", "size", "guidance_scale")]
    assert found == ["image/1", "embedded", "96x64", 1]


def test_a_list_says_it_for_each_skin(painter, asked, hints, tmp_path):
    rows = [
        {"prompt": "navy", "name": "../../first.png", "seed": 7},
        {"prompt": "navy", "layout": "t9", "negative_prompt": "red", "num_inference_steps": 2},
        {"prompt": "navy", "brush": 7},
        {"seed": 1},
        {"prompt": "navy", "layout": "t10"},
        {"prompt": "navy", "size": "250x160"},
        {"prompt": "navy", "num_inference_steps": 0},
    ]
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), "", "{broken"]))
    made = make(painter, replace(asked, prompt="", prompts=file))
    assert made.written == ["first.png", "navy.png"]
    expected = (
        "list.jsonl, line 3: brush is no option", "line 4: wanted an object with a prompt",
        "navy-2: no layout is called 't10'", "embedded needs multiples of 16; --size 256x160 would",
        "navy-4: --num_inference_steps is 0", "list.jsonl, line 9: ",
    )  # fmt: skip
    for reason, words in zip(made.failed, expected, strict=True):
        assert words in reason
    assert read_settings(asked.output_dir / "first.png")["seed"] == 7
    settings = read_settings(asked.output_dir / "navy.png")
    assert (settings["layout"], settings["negative_prompt"]) == ("t9", "red")
    lines = (asked.output_dir / MANIFEST).read_text().splitlines()
    assert [bool(json.loads(line)["error"]) for line in lines] == [False, False, *[True] * 6]


def test_it_goes_on_where_it_stopped(painter, asked, hints, tmp_path, monkeypatch):
    file = tmp_path / "list.txt"
    file.write_text("red\n\nnavy star\n")
    options = replace(asked, prompt="", prompts=file, num_images=2, labels="drawn")
    finish = room.finish_skin

    def dies_at_the_second(image, layout, request, anew):
        if request.name == "red_43":
            raise KeyboardInterrupt
        finish(image, layout, request, anew)

    monkeypatch.setattr(room, "finish_skin", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(painter, options)
    monkeypatch.setattr(room, "finish_skin", finish)
    made = make(painter, options)
    assert made.kept == ["red_42.png"]
    assert made.written == ["red_43.png", "navy-star_42.png", "navy-star_43.png"]
    assert len(hints) == 4  # red_43 was whole already
    assert "red_43-labelled.png" in names(asked.output_dir)
    assert len(make(painter, options).kept) == 4
    (asked.output_dir / "red_42-labelled.png").unlink()
    assert make(painter, options).written == ["red_42.png"]
    (asked.output_dir / "red_42.png").write_bytes(b"cut")
    with (asked.output_dir / MANIFEST).open("a") as manifest:
        manifest.write('{"output": "cut in the mid')
    assert make(painter, options).written == ["red_42.png"]
    assert len(hints) == 5
    assert len(make(painter, options).kept) == 4


def test_what_changes_the_picture_is_painted_again_and_nothing_else(
    painter, asked, hints, control, tmp_path
):
    make(painter, asked)
    for change in ({"slices": True}, {"theme": ("cskin",)}, {"labels": "drawn"}, {"font": None}):
        make(painter, replace(asked, **change))
    assert len(hints) == 1
    for number, change in enumerate(({"seed": 3}, {"hint": "glyphs", "labels": None}), 2):
        make(painter, replace(asked, **change))
        assert len(hints) == number
    weights = next(control.glob("*.safetensors"))
    copy = tmp_path / "later.safetensors"
    copy.write_bytes(weights.read_bytes())
    make(painter, replace(asked, control=str(copy), hint="glyphs", labels=None))
    assert len(hints) == 4
    make(painter, asked)  # the first one, which the others have taken the place of
    assert len(hints) == 5


def test_a_folder_of_something_else_is_left_alone(painter, asked, hints):
    own = asked.output_dir / "a-red-skin"
    own.mkdir(parents=True)
    (own / "letter.txt").write_text("dear")
    options = replace(asked, slices=True)
    for _ in range(2):
        assert "a-red-skin is there and holds something else" in make(painter, options).failed[0]
    make(painter, asked)
    assert make(painter, options).failed
    assert (own / "letter.txt").read_text() == "dear"
    (own / "letter.txt").unlink()
    assert make(painter, options).written == ["a-red-skin.png"]
    make(painter, replace(options, seed=8))  # parts of its own are replaced
    picture = as_photo(asked.output_dir / "a-red-skin.png").rgb
    np.testing.assert_array_equal(compose(LAYOUT, own).image, picture)


def test_a_failing_theme_is_named_and_the_picture_stays(painter, asked, hints):
    options = replace(asked, layout="keyboard-parts-4", size="128x128", theme=("cskin",))
    made = make(painter, options)
    assert "layout keyboard-parts-4 has 2 panels" in made.failed[0]
    assert names(asked.output_dir) == {"a-red-skin.png"}


def test_names():
    assert name_of("a  Red, (glossy) skin!") == "a-Red-glossy-skin"
    assert name_of("../..") == name_of("  ") == "skin"
    assert name_of("粉色 键盘") == "粉色-键盘"
    assert len(name_of("word " * 50)) <= 48
    requests = [
        room.Request(name=name, options=SkinGenerateOptions(control="x"))
        for name in ("a", "A", "a-labelled", "a-2", "b")
    ]
    named = [request.name for request in room.named_apart(requests)]
    assert named == ["a", "A-2", "a-labelled-2", "a-2-2", "b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "give either --prompt"),
        ({"prompts": "list.txt"}, "give either --prompt"),
        ({"prompt": "", "prompts": "nowhere.txt"}, "nowhere.txt can't be read"),
        ({"prompt": "", "prompts": "empty.txt"}, "holds no prompt"),
        (
            {"size": "250x100"},
            "is 250x100, but embedded needs multiples of 16; --size 256x96 would",
        ),
        ({"size": "3x3"}, "--size 16x16 would do"),
        ({"size": "48x16"}, "on 48x16 .* is only .* pixels; a larger --size is needed"),
        ({"layout": "t10"}, "no layout is called 't10'"),
    ],
)
def test_mistakes_about_all_skins_are_refused(painter, asked, tmp_path, change, words):
    (tmp_path / "empty.txt").write_text(" \n")
    if "prompts" in change:
        change = {**change, "prompts": tmp_path / change["prompts"]}
    with pytest.raises(UserError, match=words):
        make(painter, replace(asked, **change))
    assert not asked.output_dir.exists()


def test_a_controlnet_that_fills_holes_is_refused(pipe, asked):
    with pytest.raises(UserError, match="trained with masked-image/1: it fills holes; skins need"):
        make(pipe, asked)


def test_the_command(control, asked, hints, tmp_path, capsys, monkeypatch):
    for name, command in SKIN_GENERATE.items():
        monkeypatch.setitem(COMMANDS, name, command)
    out, file = asked.output_dir, tmp_path / "p.jsonl"
    words = ["skin", "generate", str(out), "--control", str(control), "--size", SIZE]
    words += ["--device", "cpu", "--num_inference_steps", "1", "--no_slices"]
    assert run([*words, "--prompt", "red", "--theme", "cskin"]) == 0
    assert f"wrote 1 skins to {out}" in capsys.readouterr().out
    assert names(out) == {"red.png", "red-labelled.png", "red.cskin"}
    file.write_text('{"prompt": "red"}\n{"prompt": "navy", "layout": "t10"}\n')
    assert run([*words, "--prompts", str(file), "--theme", "cskin"]) == 2
    said = capsys.readouterr()
    assert "failed: navy: no layout is called 't10'" in said.out
    assert "1 of 2 skins could not be made" in said.err
    assert run([*words, "--prompts", str(tmp_path / "none")]) == 2


def test_a_foreign_picture_in_the_way_is_left_alone(painter, asked, hints):
    file = save_image(asked.output_dir / "a-red-skin.png", np.zeros((5, 5, 3), np.uint8))
    before = file.read_bytes()
    (reason,) = make(painter, asked).failed
    assert "is there and is no skin; give the skin another name" in reason
    assert file.read_bytes() == before
    assert not hints


def test_parts_that_somebody_works_on_stay(painter, asked, hints):
    options = replace(asked, slices=True)
    make(painter, options)
    part = asked.output_dir / "a-red-skin" / "q.png"
    save_image(part, np.zeros((4, 4, 3), np.uint8))
    retouched = part.read_bytes()
    assert make(painter, replace(options, theme=("cskin",))).written == ["a-red-skin.png"]
    assert part.read_bytes() == retouched
    (part.parent / "w.png").unlink()
    make(painter, options)
    assert part.read_bytes() != retouched
    assert len(hints) == 1

"""Class pictures: painted once, gone on with, never twice the same, weighed beside others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from controlfill.data.buckets import make_buckets
from controlfill.data.concepts import Worded, join, say
from controlfill.data.masks import make_recipe
from controlfill.data.sample import Preparation, PreparedSource, Sample, collate
from controlfill.data.streams import PreparedStream
from controlfill.diffusion.objective import Objective, step_rng
from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.inference.pipeline import HOLE_SPEC, Pipeline
from controlfill.models.controlnet import make_controlnet
from controlfill.options import FinetuneOptions
from controlfill.training.batches import Beside, Bucketed, Shuffled, StreamBeside
from controlfill.training.class_pictures import (
    Painter,
    drop_doubles,
    paint_missing,
    painted,
    runs_of,
)
from controlfill.training.loop import make_accelerator, make_team
from controlfill.training.start import quiet


class Plain:
    """Pictures of the given sizes, with words or without."""

    def __init__(self, sizes, words=""):
        self.shapes, self.words = sizes, words

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        if self.shapes[index] is None:
            raise UserError("broken")
        return Sample(image=np.zeros((*self.shapes[index], 3), np.uint8), prompt=self.words)

    def sizes(self):
        return np.array(self.shapes)


@pytest.fixture
def painter(pipe, tmp_path):
    options = FinetuneOptions(
        instance_data_dir="x", with_prior_preservation=True, class_prompt="a red circle",
        class_data_dir=tmp_path / "class", num_class_images=5, image_size=64, batch_size=2, seed=7,
    )  # fmt: skip
    pipeline = Pipeline(bundle=pipe.bundle, network=None, spec=HOLE_SPEC)
    team = make_team(make_accelerator(options))
    return Painter(folder=tmp_path / "class", pipeline=pipeline, options=options, team=team)


@pytest.fixture
def fake(monkeypatch):
    """A base that paints its seed; remembers which seeds it was asked for."""
    asked = []

    def paint(pipeline, batch, options):
        seeds = range(options.seed, options.seed + len(batch.prompts))
        asked.append(list(seeds))
        assert batch.mask.min() == 1
        assert set(batch.prompts) == {"a red circle"}
        values = torch.tensor([(s - 7) % 1_000_003 for s in seeds]) / 255
        return values.view(-1, 1, 1, 1).expand(-1, 3, 64, 64)

    monkeypatch.setattr("controlfill.training.class_pictures.generate_batch", paint)
    return asked


def test_missing_pictures_are_painted_and_an_interrupted_painting_goes_on(painter, fake):
    told = []
    paint_missing(painter, lambda what, done, total: told.append((what, done, total)))
    assert fake == [[7, 8], [9, 10], [11]]
    assert told[0] == ("class pictures", 0, 5)
    assert told[-1] == ("class pictures", 5, 5)
    files = painted(painter.folder)
    assert sorted(files) == [0, 1, 2, 3, 4]
    before = files[3].read_bytes()
    files[3].unlink()
    files[0].unlink()
    fake.clear()
    paint_missing(painter, quiet)
    assert fake == [[7], [10]]
    assert painted(painter.folder)[3].read_bytes() == before
    fake.clear()
    paint_missing(painter, quiet)
    assert fake == []


def test_pictures_of_the_user_count(painter, fake):
    painter.folder.mkdir()
    for name in "abc":
        Image.new("RGB", (9, 9)).save(painter.folder / f"{name}.png")
    # Only those have words that would stand for the {}.
    options = replace(painter.options, class_prompt="a red circle, {}")
    paint_missing(replace(painter, options=options), quiet)
    assert fake == [[7, 8]]


def test_settings_are_kept_and_other_ones_refused(painter, fake):
    paint_missing(painter, quiet)
    made = read_json(painter.folder / "settings.json")
    assert (made["class_prompt"], made["base"]) == ("a red circle", "embedded")
    for change, words in {
        ("class_prompt", "a blue circle"): "class_prompt 'a red circle', not 'a blue circle'",
        ("seed", 8): "seed 7, not 8",
    }.items():
        options = replace(painter.options, num_class_images=6, **dict([change]))
        with pytest.raises(UserError, match=words):
            paint_missing(replace(painter, options=options), quiet)


def test_settings_count_also_when_no_picture_is_missing(painter, fake):
    paint_missing(painter, quiet)
    paint_missing(replace(painter, options=replace(painter.options, seed=8)), quiet)
    other = replace(painter.options, class_prompt="a blue circle")
    with pytest.raises(UserError, match="not 'a blue circle'"):
        paint_missing(replace(painter, options=other), quiet)


def test_no_picture_is_there_twice(painter, monkeypatch):
    def paint(pipeline, batch, options):
        # The same picture for every seed, but for those of the second attempt.
        values = torch.tensor(
            [float(options.seed > 1000) * (n + 1) / 9 for n in range(len(batch.prompts))]
        )
        return values.view(-1, 1, 1, 1).expand(-1, 3, 64, 64)

    monkeypatch.setattr("controlfill.training.class_pictures.generate_batch", paint)
    few = replace(painter, options=replace(painter.options, num_class_images=2))
    paint_missing(few, quiet)
    names = [file.stem.rpartition("-")[2] for file in painted(few.folder).values()]
    assert len(set(names)) == 2
    with pytest.raises(UserError, match="painted the same picture again and again"):
        paint_missing(replace(painter, options=replace(painter.options, num_class_images=9)), quiet)


def test_numbers_go_in_groups_that_follow_each_other():
    assert list(runs_of([0, 1, 2, 5, 6, 9], 2)) == [[0, 1], [2], [5, 6], [9]]
    assert list(runs_of([], 2)) == []


def test_a_base_paints_what_the_class_is(painter):
    few = replace(painter, options=replace(painter.options, num_class_images=1))
    paint_missing(few, quiet)
    picture = np.asarray(Image.open(painted(few.folder)[0]), dtype=float)
    red, green, blue = picture[24:40, 24:40].mean(axis=(0, 1))
    assert red > green + 20
    assert red > blue + 20


def test_every_picture_has_words():
    blank = np.zeros((2, 2, 3), np.uint8)
    bare = Sample(image=blank, hint=blank)
    own = Sample(image=blank, prompts=("a mat", "a cat"))
    assert say(bare, "sks").prompt == "sks"
    assert say(bare, "sks").hint is None
    assert say(own, "sks").prompts == ("a mat", "a cat")
    assert say(own, "sks, {}").prompts == ("sks, a mat", "sks, a cat")
    assert say(bare, "sks, {}").prompt == "sks"
    assert say(Sample(image=blank, prompt="a mat"), "sks").prompt == "a mat"


def make_data(sizes, buckets):
    preparation = Preparation(side=64, recipe=make_recipe(("full",), (0.1, 0.3)), crop="center")
    source = Worded(Plain(sizes), "own")
    return PreparedSource(source, preparation, 3, buckets)


@pytest.mark.parametrize("bucketed", [False, True])
def test_batches_are_half_class_pictures_of_the_same_size(bucketed):
    sizes = [(64, 64), (64, 128), (40, 80), (64, 64), (128, 64)]
    buckets = make_buckets(np.array(sizes), 64, 8) if bucketed else None
    data = make_data(sizes, buckets)
    others = Worded(Plain([(70, 90), None, (50, 50)]), "class", 0.25)
    joined = join(data, others)
    of = data.bucket_of()
    order = Shuffled(5, 2, 3) if of is None else Bucketed(of, 2, 3)
    beside = Beside(order, joined.bucket_of()[:5], len(others), 3)
    shapes, seen = set(), []
    for number in range(9):
        items = [joined[place] for place in beside.batch(number)]
        samples = [sample for sample, _ in items]
        assert [s.prompt for s in samples] == ["own"] * 2 + ["class"] * 2
        assert [s.weight for s in samples] == [1.0] * 2 + [0.25] * 2
        assert len({s.image.shape for s in samples}) == 1
        shapes.add(samples[0].image.shape[:2])
        seen += [place for _, place in beside.batch(number)[2:]]
    assert len(shapes) == (3 if bucketed else 1)
    counts = np.bincount([(place - 5) % 3 for place in seen])
    assert counts.tolist() == [6, 6, 6]


@pytest.mark.parametrize("ranks", [1, 2])
def test_streams_have_class_pictures_beside_them_in_turn(ranks):
    class Stream:
        length, where = 5, "shards"

        def epoch(self, epoch):
            return ((n, lambda: Sample(image=np.zeros((64, 64, 3), np.uint8))) for n in range(5))

    class Noted(list):
        def __len__(self):
            return 3

        def __getitem__(self, place):
            self.append(place)
            return Sample(image=np.zeros((64, 64, 3), np.uint8), prompt="class"), []

    others, preparation = Noted(), make_data([(64, 64)], None).preparation
    for rank in range(ranks):
        alone = PreparedStream(Stream(), preparation, 3, 2, rank, ranks)
        stream = StreamBeside(alone, others).between(0, 6 // ranks)
        own = list(alone.between(0, 6 // ranks))
        for batch, wanted in zip(stream, own, strict=True):
            assert [sample.prompt for sample, _ in batch] == ["", "", "class", "class"]
            pairs = zip(batch[:2], wanted, strict=True)
            assert all(np.array_equal(a.mask, b.mask) for (a, _), (b, _) in pairs)
    # Twelve pictures beside twelve, each of three in each of four turns.
    assert sorted(Noted.__iter__(others)) == [(turn, n) for turn in range(4) for n in range(3)]


def test_pictures_that_two_processes_painted_at_once_are_there_once(painter):
    painter.folder.mkdir()
    for number, name in enumerate("aba"):
        (painter.folder / f"class-{number:06d}-{name * 16}.png").touch()
    drop_doubles(painter.folder)
    assert sorted(painted(painter.folder)) == [0, 1]


def test_class_pictures_count_as_much_as_they_weigh(pipe):
    rng = np.random.default_rng(0)
    mask = np.full((64, 64), 255, np.uint8)
    samples = [
        Sample(image=rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), mask=mask, prompt="a mat")
        for _ in range(2)
    ]
    network = make_controlnet(pipe.bundle, 3)
    objective = Objective(pipe.bundle, HOLE_SPEC)
    batches = [collate([samples[0], replace(samples[1], weight=w)], HOLE_SPEC) for w in (1.0, 0.25)]
    assert batches[0].weights is None
    with torch.no_grad():
        plain, weighed = (objective(network, b, step_rng(0, 0, 0)) for b in batches)
    torch.testing.assert_close(weighed, plain * torch.tensor([1.0, 0.25]), rtol=0, atol=0)
    assert batches[1].take([1]).weights.tolist() == [0.25]

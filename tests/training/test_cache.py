"""Caches: the same numbers as without, fresh posteriors, dropped prompts, nothing stale."""

import json
import os
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from conftest import final_weights, finish, same_weights
from PIL import Image

from controlfill.data.cache import describe, open_cache
from controlfill.data.sample import PreparedSource
from controlfill.data.sources import open_source
from controlfill.errors import UserError
from controlfill.options import CacheOptions
from controlfill.training import caching
from controlfill.training.caching import build_cache
from controlfill.training.loop import make_accelerator


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures of two shapes with captions, one of them broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(7):
        size = (70, 100) if number % 2 else (80, 80)
        image = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"red circle {number % 3}\nsquare")
    (folder / "6.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def asked(pictures, tmp_path):
    """Options of a cache of `pictures`."""
    return CacheOptions(
        data=str(pictures), pretrained_model_name_or_path="embedded", image_size=64,
        cache_dir=tmp_path / "cache", batch_size=3, num_workers=0, random_flip=True,
    )  # fmt: skip


@pytest.fixture
def run(small_run, pictures):
    """A run on `pictures`, without a cache."""
    return replace(
        small_run, image_dir=str(pictures), random_flip=True, proportion_empty_prompts=0.3,
        max_steps=3,
    )  # fmt: skip


def build(options):
    return build_cache(options, lambda *_: None)


def test_training_with_a_cache_calls_no_encoder_and_learns_the_same(run, asked, monkeypatch):
    from controlfill.models.bundle import Bundle
    from controlfill.models.text import Text

    _, skipped = build(replace(asked, crop="center", random_flip=False))
    assert len(skipped) == 1
    assert "6.png" in skipped[0]
    plain = replace(run, crop="center", random_flip=False)
    losses = finish(plain)
    monkeypatch.setattr(Bundle, "encode_moments", lambda *_: pytest.fail("the VAE was asked"))
    monkeypatch.setattr(Text, "encode_anew", lambda *_: pytest.fail("the text encoder was asked"))
    cached = replace(plain, cache_dir=asked.cache_dir, output_dir=run.output_dir / "cached")
    # Batches of two and of three leave the VAE with other last bits.
    np.testing.assert_allclose(finish(cached), losses, rtol=1e-3)


def test_cuts_repeat_after_their_variants_and_masks_never(run, asked):
    from controlfill.data.sources import make_preparation

    build(replace(asked, variants=2))
    cache = open_cache(asked.cache_dir, {})
    source = open_source(asked.data, asked)
    data = PreparedSource(source, make_preparation(asked), asked.seed, None, cache.latents)
    cuts = [data[epoch, 1][0] for epoch in range(4)]
    assert np.array_equal(cuts[0].image, cuts[2].image)
    assert np.array_equal(cuts[1].moments, cuts[3].moments)
    assert not np.array_equal(cuts[0].image, cuts[1].image)
    assert len({cut.mask.tobytes() for cut in cuts}) == 4
    assert cuts[0].moments.shape == (2, 4, 16, 16)


def test_every_wording_is_there_once_and_the_empty_one(asked):
    build(asked)
    index = json.loads((asked.cache_dir / "index.json").read_text())
    wanted = ["", "red circle 0", "red circle 1", "red circle 2", "square"]
    assert sorted(index["prompts"]) == wanted
    texts = open_cache(asked.cache_dir, {}).texts
    assert texts.get(["square", ""])[0].shape[0] == 2
    assert texts.get(["square", "never seen"]) is None
    # Caches from before there was a mark of their end: in those, texts came last.
    del index["whole"]
    (asked.cache_dir / "index.json").write_text(json.dumps(index))
    assert open_cache(asked.cache_dir, {}).texts.place == texts.place
    (asked.cache_dir / "texts.safetensors").unlink()
    with pytest.raises(UserError, match="is not finished"):
        open_cache(asked.cache_dir, {})


def test_without_texts_the_text_encoder_is_asked(run, asked):
    build(replace(asked, text=False))
    assert open_cache(asked.cache_dir, {}).texts is None
    assert len(finish(replace(run, cache_dir=asked.cache_dir))) == 3


def test_buckets_are_cached_in_their_sizes(run, asked):
    build(replace(asked, aspect_ratio_buckets=True, mixed_precision="bf16"))
    shapes = {open_cache(asked.cache_dir, {}).latents.read(i, 0).shape for i in range(6)}
    assert len(shapes) == 2
    bucketed = replace(run, cache_dir=asked.cache_dir, aspect_ratio_buckets=True)
    assert len(finish(bucketed)) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 32}, "stale: it was made with image_size 64, this run has 32"),
        ({"random_flip": False}, "stale: it was made with random_flip True, this run has False"),
        ({"max_train_samples": 3}, "stale: it was made with pictures 7, this run has 3"),
        ({"aspect_ratio_buckets": True}, "stale: it was made with aspect_ratio_buckets False"),
        ({"image_dir": "world:shapes"}, "stale: it was made with data"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_stale_cache_is_refused_by_name(run, asked, change, words):
    build(replace(asked, text=False))
    with pytest.raises(UserError, match=words):
        finish(replace(run, cache_dir=asked.cache_dir, **change))


def test_another_encoder_is_refused(run, asked, narrow_base):
    build(replace(asked, text=False))
    other = replace(run, cache_dir=asked.cache_dir, pretrained_model_name_or_path=str(narrow_base))
    with pytest.raises(UserError, match="stale: it was made with vae .*, this run has"):
        finish(other)
    with pytest.raises(UserError, match="holds no cache; make one with `controlfill cache`"):
        finish(replace(run, cache_dir=asked.cache_dir / "none"))
    os.utime(asked.data + "/0.png", (0, 0))
    with pytest.raises(UserError, match="stale: it was made with files .*, this run has"):
        finish(replace(run, cache_dir=asked.cache_dir))


def test_an_interrupted_pass_goes_on(asked, monkeypatch):
    monkeypatch.setattr(caching, "PER_SHARD", 3)
    encode, calls = caching.encode_batch, []

    def dies(bundle, cuts):
        calls.append(len(cuts))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return encode(bundle, cuts)

    monkeypatch.setattr(caching, "encode_batch", dies)
    with pytest.raises(OSError, match="No space"):
        build(replace(asked, text=False))
    with pytest.raises(UserError, match="is not finished; .* goes on where it was"):
        open_cache(asked.cache_dir, {})
    build(asked)
    assert calls == [3, 3, 3, 0]
    cache = open_cache(asked.cache_dir, {})
    assert all(np.isfinite(cache.latents.read(i, 0)).all() for i in range(6))
    with pytest.raises(UserError, match="picture 6 is not in the cache"):
        cache.latents.read(6, 0)
    with pytest.raises(UserError, match="holds a cache made with image_size 64, not 32"):
        build(replace(asked, image_size=32))


def test_pictures_that_come_back_take_nothing_from_others(asked, monkeypatch):
    monkeypatch.setattr(caching, "PER_SHARD", 1)
    few, cut = replace(asked, max_train_samples=3, text=False), PreparedSource.cut

    def away(self, index, variant):
        if index == 0:
            raise UserError("away")
        return cut(self, index, variant)

    with monkeypatch.context() as patch:
        patch.setattr(PreparedSource, "cut", away)
        assert build(few)[1] == ["away"]
    assert len(list(asked.cache_dir.glob("latents-*"))) == 2  # none that is empty
    assert build(few)[1] == []
    latents = open_cache(asked.cache_dir, {}).latents
    assert len({latents.read(index, 0).tobytes() for index in range(3)}) == 3


def test_a_cache_of_other_pictures_is_stale(pictures, asked, monkeypatch):
    monkeypatch.setenv("CONTROLFILL_CACHE", str(pictures.parent / "indices"))
    masks = pictures.parent / "masks"
    masks.mkdir()
    for file in pictures.glob("*.png"):
        (masks / file.name).write_bytes(file.read_bytes())
    rows = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in range(7)]
    ann_file = pictures.parent / "ann.json"
    ann_file.write_text(json.dumps({"images": rows, "annotations": []}))

    def marks():
        table = pictures / "metadata.csv"
        kinds = [{}, {"mask_dir": masks}, {"ann_file": ann_file}, {"max_train_samples": 3}]
        sources = [open_source(str(pictures), replace(asked, **kind)) for kind in kinds]
        table.write_text("file_name\n" + "".join(f"{n}.png\n" for n in range(7)))
        sources.append(open_source(str(pictures), asked))
        table.unlink()
        return [describe("here", source, asked, False)["files"] for source in sources]

    def changed(file):
        before = marks()
        os.utime(file, (0, 0))
        return [old != new for old, new in zip(before, marks(), strict=True)]

    assert changed(pictures / "0.png") == [True] * 5
    assert changed(pictures / "5.png") == [True, True, True, False, True]
    assert changed(masks / "0.png") == [False, True, False, False, False]
    assert changed(pictures / "0.txt") == [False] * 5  # new words are encoded when they are met


def test_processes_wait_for_one_that_encodes(run):
    assert make_accelerator(run).init_handler.timeout > timedelta(hours=1)


def test_shards_cant_be_cached(asked, tmp_path):
    from controlfill.data.prepare import write_shards
    from controlfill.data.sources import Subset

    write_shards(Subset(open_source("world:shapes", asked), 2), tmp_path / "shards")
    with pytest.raises(UserError, match="tar shards can't be cached"):
        build(replace(asked, data=str(tmp_path / "shards")))


def test_the_same_cache_serves_workers(run, asked):
    build(asked)
    none = replace(run, cache_dir=asked.cache_dir)
    two = replace(none, num_workers=2, output_dir=run.output_dir / "two")
    finish(none)
    finish(two)
    assert same_weights(final_weights(none.output_dir), final_weights(two.output_dir))

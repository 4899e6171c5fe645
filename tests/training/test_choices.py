"""Options that change how a run works but not what it is: each turned on, each seen to act."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import finish, small_options
from PIL import Image

from controlfill.errors import UserError


@pytest.fixture(scope="module")
def two_losses(tmp_path_factory):
    """The losses of the smallest run's first two steps."""
    return finish(replace(small_options(tmp_path_factory.mktemp("two")), max_steps=2))


@pytest.mark.parametrize(
    "change",
    [{"gradient_checkpointing": True}, {"set_grads_to_none": False}, {"allow_tf32": True}],
    ids=lambda change: next(iter(change)),
)
def test_options_that_only_spare_learn_the_same(two_losses, small_run, change):
    # Two steps: what is computed twice differs in last bits, which Adam's first steps enlarge.
    spared = replace(small_run, max_steps=2, **change)
    np.testing.assert_allclose(finish(spared), two_losses, rtol=1e-4)


def test_checkpointing_recomputes_activations(small_run, monkeypatch):
    import torch.utils.checkpoint

    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k)
    )
    finish(replace(small_run, gradient_checkpointing=True, max_steps=1))
    assert len(calls) > 5


def test_gradients_are_zeros_or_gone(small_run, monkeypatch):
    seen = []
    zero = torch.optim.AdamW.zero_grad
    monkeypatch.setattr(
        torch.optim.AdamW,
        "zero_grad",
        lambda s, set_to_none=True: seen.append(set_to_none) or zero(s),
    )
    finish(replace(small_run, max_steps=1))
    finish(replace(small_run, max_steps=1, set_grads_to_none=False))
    assert seen[0] is True
    assert seen[-1] is False


def test_compiling_is_asked_for(small_run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    finish(replace(small_run, torch_compile=True, max_steps=1))
    assert {cls.__name__ for cls in compiled} == {"UNet2DConditionModel", "ControlNetModel"}


def test_buckets_train_in_their_own_shapes(small_run, tmp_path):
    (tmp_path / "i").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        size = (64, 100) if number % 2 else (90, 90)
        picture = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "i" / f"{number}.png")
    options = replace(
        small_run, image_dir=str(tmp_path / "i"), aspect_ratio_buckets=True, image_size=96,
        random_flip=True, max_steps=3,
    )  # fmt: skip
    from controlfill.data.sample import Stack

    shapes, make = set(), Stack.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "to", lambda s, d: shapes.add(tuple(s.image.shape[1:3])) or make(s, d))
        assert len(finish(options)) == 3
    assert len(shapes) == 2


def test_a_general_controlnet_learns_from_fill50ks_layout(small_run, tmp_path):
    from controlfill.data.prepare import prepare_table
    from controlfill.inference.complete import follow, inpaint
    from controlfill.inference.pipeline import load
    from controlfill.options import HoleOptions, PrepareTableOptions

    folder = tmp_path / "fill"
    prepare_table(PrepareTableOptions(data="world:shapes", out=folder, count=6, image_size=64))
    options = replace(small_run, image_dir=str(folder), conditioning="image", log_images_steps=4)
    assert len(finish(options)) == 4
    pipeline = load(control=str(small_run.output_dir), device="cpu")
    hint = folder / "conditioning_images" / "000000.png"
    result = follow(pipeline, hint, HoleOptions(num_inference_steps=2))
    assert result.image.shape == (64, 64, 3)
    with pytest.raises(UserError, match="follows a conditioning picture and fills no holes"):
        inpaint(pipeline, hint, np.full((64, 64), 255, np.uint8), HoleOptions())
    with pytest.raises(UserError, match="use them with --conditioning image"):
        finish(replace(options, conditioning="masked-image"))
    with pytest.raises(UserError, match="needs conditioning pictures, which this data does not"):
        plain = tmp_path / "plain"
        plain.mkdir()
        Image.new("RGB", (64, 64)).save(plain / "a.png")
        finish(replace(options, image_dir=str(plain)))


def test_shards_train_the_same_with_any_workers_and_resumed(small_run, tmp_path):
    from controlfill.data.prepare import prepare_shards
    from controlfill.options import PrepareShardsOptions

    folder = tmp_path / "shards"
    prepare_shards(
        PrepareShardsOptions(
            data="world:shapes", out=folder, count=9, per_shard=4, image_size=64, image_format="png"
        )
    )
    options = replace(small_run, image_dir=str(folder), shuffle_buffer=5, max_steps=6, save_steps=4)
    losses = finish(options)
    other = replace(options, num_workers=2, output_dir=tmp_path / "other")
    assert finish(other) == losses
    (run,) = other.output_dir.iterdir()
    again = replace(
        options, resume_from_checkpoint=str(run / "checkpoint-4"), output_dir=tmp_path / "again"
    )
    assert finish(again) == losses[4:]
    for name, value in {"val_split": 0.1, "aspect_ratio_buckets": True}.items():
        with pytest.raises(UserError, match=f"--{name} needs data whose pictures can be read"):
            finish(replace(options, **{name: value}))

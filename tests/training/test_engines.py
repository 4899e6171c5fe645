"""Two engines, one set of numbers: the same losses and weights, the same data, the same files."""

import logging
import random
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import final_weights, finish, same_weights

from controlfill.errors import UserError
from controlfill.inference.complete import inpaint
from controlfill.inference.pipeline import load
from controlfill.models.controlnet import find_controlnet, read_control_header
from controlfill.options import ControlOptions, HoleOptions, LightningOptions
from controlfill.training.lightning import train_lightning


@pytest.fixture
def rich_run(small_run):
    """A run with all that could tell the engines apart: accumulation, clipping, EMA, warm-up."""
    return replace(
        small_run, gradient_accumulation_steps=2, max_grad_norm=0.05, ema_decay=0.9,
        lr_warmup_steps=3, lr_scheduler="cosine", proportion_empty_prompts=0.3,
        max_train_samples=11, max_steps=8, save_steps=1,
    )  # fmt: skip


def for_lightning(options, **changes):
    """The same run in Lightning's words."""
    shared = {f.name: getattr(options, f.name) for f in fields(ControlOptions)}
    words = {
        "accumulate_grad_batches": options.gradient_accumulation_steps,
        "gradient_clip_val": options.max_grad_norm,
        "log_every_n_steps": options.log_steps,
        "log_images_every_n_steps": options.log_images_steps,
        "accelerator": "cpu",
    }
    return LightningOptions(**{**shared, **words, **changes})


def finish_lightning(options, on_step=lambda step: None):
    """Train to the end; the losses of all steps."""
    losses = []

    def both(step):
        losses.append(float(step.loss))
        on_step(step)

    train_lightning(options, on_step=both)
    return losses


def test_both_engines_learn_the_same_to_the_last_bit(rich_run, tmp_path):
    options = replace(rich_run, max_steps=20, save_steps=20)
    told = for_lightning(options, output_dir=tmp_path / "lightning")
    losses = finish(options)
    assert len(losses) == 20
    assert finish_lightning(told) == losses
    assert same_weights(final_weights(options.output_dir), final_weights(told.output_dir))


def test_a_run_resumed_at_any_step_ends_the_same(rich_run, tmp_path):
    losses = finish(rich_run)
    (run,) = rich_run.output_dir.iterdir()
    for step in random.Random(5).sample(range(1, 8), 5):
        other = replace(
            rich_run, output_dir=tmp_path / str(step), num_workers=step % 3, save_steps=100,
            resume_from_checkpoint=str(run / f"checkpoint-{step}"),
        )  # fmt: skip
        assert finish(other) == losses[step:]
        assert same_weights(final_weights(rich_run.output_dir), final_weights(other.output_dir))


def test_lightning_resumed_at_any_step_ends_the_same(rich_run, tmp_path):
    told = for_lightning(rich_run, output_dir=tmp_path / "whole")

    def keep(step):
        (last,) = told.output_dir.glob("*/checkpoints/last.ckpt")
        shutil.copy(last, tmp_path / f"{step.index}.ckpt")

    losses = finish_lightning(told, keep)
    # An epoch of 11 pictures is three steps, so most of these stand in the middle of one.
    for step in random.Random(7).sample(range(1, 8), 5):
        other = replace(
            told, output_dir=tmp_path / str(step), num_workers=step % 3,
            resume_from_checkpoint=str(tmp_path / f"{step}.ckpt"),
        )  # fmt: skip
        assert finish_lightning(other) == losses[step:]
        assert same_weights(final_weights(told.output_dir), final_weights(other.output_dir))


def test_weights_go_both_ways(small_run, tmp_path, photo, hole):
    told = for_lightning(replace(small_run, ema_decay=0.5), max_steps=2, output_dir=tmp_path / "l")
    train_lightning(told)
    (file,) = told.output_dir.glob("*/checkpoints/last.ckpt")
    assert read_control_header(file).step == 2
    frozen = replace(small_run, learning_rate=0.0, max_steps=1)
    finish(replace(frozen, controlnet_model_name_or_path=str(file)))
    assert same_weights(final_weights(told.output_dir), final_weights(frozen.output_dir))
    result = inpaint(load(control=str(file)), photo, hole, HoleOptions(num_inference_steps=1))
    np.testing.assert_array_equal(result.image[hole == 0], photo[hole == 0])
    (run,) = frozen.output_dir.iterdir()
    back = for_lightning(
        frozen, controlnet_model_name_or_path=str(run / "checkpoint-1"), output_dir=tmp_path / "b"
    )
    train_lightning(back)
    assert same_weights(final_weights(told.output_dir), final_weights(back.output_dir))
    (tmp_path / "b" / next(back.output_dir.iterdir()).name / "final_model").rename(tmp_path / "f")
    assert find_controlnet(str(next(back.output_dir.iterdir()))).name == "last.ckpt"


def test_the_best_and_the_last_are_kept(small_run, tmp_path):
    told = for_lightning(
        small_run, max_steps=None, num_epochs=4, max_train_samples=4, save_every_n_epochs=1,
        save_top_k=2, output_dir=tmp_path / "l",
    )  # fmt: skip
    folder = train_lightning(told)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert len(names) == 3
    assert names[-1] == "last.ckpt"
    assert all(n.startswith("controlnet-epoch=0") and "-train_loss=0." in n for n in names[:-1])


def test_the_validation_split_is_measured_every_epoch_and_picks_the_best(small_run, tmp_path):
    told = for_lightning(
        small_run, max_steps=None, num_epochs=2, max_train_samples=6, val_split=0.3,
        save_every_n_epochs=1, save_top_k=-1, output_dir=tmp_path / "l",
    )  # fmt: skip
    folder = train_lightning(told)
    names = [p.name for p in (folder / "checkpoints").glob("controlnet-*")]
    assert len(names) == 2
    assert all("-val_loss=0." in name for name in names)
    scalars = read_scalars(folder)
    assert [step for step, _ in scalars["val/loss"]] == [2, 4]
    assert "val/loss_hole" in scalars


def read_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_training_stops_early_when_nothing_improves(small_run, tmp_path):
    told = for_lightning(
        small_run, max_steps=None, num_epochs=9, max_train_samples=4, val_split=0.5,
        learning_rate=0.0, early_stopping_patience=2, output_dir=tmp_path / "l",
    )  # fmt: skip
    assert len(finish_lightning(told)) == 3  # an epoch is one step; two bring nothing
    assert list(told.output_dir.glob("*/final_model"))


def test_a_learning_rate_is_found_and_used(small_run, tmp_path):
    told = for_lightning(small_run, lr_find=True, max_steps=1, output_dir=tmp_path / "l")
    rates = []
    train_lightning(told, on_step=lambda step: rates.append(step.learning_rate))
    assert len(rates) == 1
    assert rates[0] != told.learning_rate
    assert len(list(told.output_dir.glob("controlnet_*"))) == 1


def test_the_same_batches_come_again_when_overfitting(small_run, tmp_path):
    options = replace(small_run, overfit_batches=1, learning_rate=0.0, max_steps=3)
    told = for_lightning(options, output_dir=tmp_path / "l")
    assert finish_lightning(told) == finish(options)
    more = replace(options, overfit_batches=0, output_dir=tmp_path / "more")
    assert finish(more)[0] == finish(replace(options, output_dir=tmp_path / "again"))[0]
    assert (
        finish(replace(more, output_dir=tmp_path / "m2"))[1:]
        != finish(replace(options, output_dir=tmp_path / "again2"))[1:]
    )


def test_the_profiler_writes_where_the_time_went(small_run, tmp_path):
    for name in ("simple", "advanced"):
        told = for_lightning(small_run, profiler=name, max_steps=1, output_dir=tmp_path / name)
        folder = train_lightning(told)
        (report,) = (folder / "logs").glob("fit-*.txt")
        assert "training_step" in report.read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accelerator": "gpu"}, "--accelerator gpu, but no GPU is there"),
        ({"precision": "16-mixed"}, "--precision 16-mixed needs a GPU"),
        ({"resume_from_checkpoint": "nowhere"}, "no .ckpt file; weights of the other engine go in"),
        ({"lr_find": True, "devices": 2}, "--lr_find works on one device"),
        ({"learning_rate": 1e30}, "the (loss|weights) became"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(small_run, tmp_path, change, words):
    told = for_lightning(small_run, output_dir=tmp_path / "l", **change)
    with pytest.raises(UserError, match=words) as caught:
        train_lightning(told)
    assert "\n" not in str(caught.value)


def test_bf16_trains_close_to_fp32_and_latest_resumes(small_run, tmp_path):
    told = for_lightning(small_run, precision="bf16-mixed", output_dir=tmp_path / "l")
    half = finish_lightning(replace(told, max_steps=2))
    half += finish_lightning(replace(told, resume_from_checkpoint="latest"))
    np.testing.assert_allclose(half, finish(small_run), rtol=0.1)
    assert len(list(told.output_dir.iterdir())) == 1


def test_lightning_goes_on_with_the_same_run_only(small_run, tmp_path, caplog):
    told = for_lightning(
        replace(small_run, max_steps=2, max_train_samples=6, num_epochs=2),
        output_dir=tmp_path / "l",
    )
    finish_lightning(told)
    (file,) = told.output_dir.glob("*/checkpoints/last.ckpt")
    weights = trained_weights(file)
    again = replace(told, max_steps=None, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="was trained with --image_dir world:shapes"):
        finish_lightning(replace(again, image_dir="world:shapes-full"))
    # Two steps of one pass each were two thirds of an epoch; with two passes they are all of it.
    steps, other = [], replace(again, accumulate_grad_batches=2, learning_rate=0.0, ema_decay=0.999)
    with caplog.at_level(logging.WARNING):
        finish_lightning(other, lambda step: steps.append((step.index, step.total, step.images)))
    assert steps == [(3, 4, 4), (4, 4, 4)]
    assert torch.load(file, weights_only=True)["global_step"] == 4
    assert "gradient_accumulation_steps 1 -> 2" in caplog.text
    # An average that starts late starts at the present weights.
    assert same_weights(final_weights(told.output_dir), weights)


def trained_weights(file):
    """The weights in one of Lightning's checkpoints."""
    state = torch.load(file, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}

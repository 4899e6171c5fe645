"""Runs: the output tree, exact resume, every option turned on, mistakes in one line."""

import json
import logging
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import final_weights, finish, same_weights, small_options
from PIL import Image
from safetensors.torch import load_file

from controlfill.data.hints import HINTS
from controlfill.data.sample import Sample
from controlfill.errors import UserError
from controlfill.models.controlnet import find_controlnet, read_control_header
from controlfill.options import TrainOptions
from controlfill.training.batches import Places, Shuffled, count_steps


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The smallest run, once for all that compare with it: its folder, losses and weights."""
    options = small_options(tmp_path_factory.mktemp("plain"))
    losses = finish(options)
    (folder,) = options.output_dir.iterdir()
    return Namespace(folder=folder, losses=losses, weights=final_weights(options.output_dir))


@pytest.fixture
def other_run(small_run):
    """Options of the same run without checkpoints on the way."""
    return replace(small_run, save_steps=100)


def test_the_output_tree(small_run):
    losses = finish(replace(small_run, log_images_steps=2))
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    (run,) = small_run.output_dir.iterdir()
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint-2", "checkpoint-4", "config.yaml", "final_model", "logs",
    ]  # fmt: skip
    assert {p.name for p in (run / "checkpoint-2").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip
    assert {p.name for p in (run / "final_model").iterdir()} == {
        "README.md", "config.json", "controlnet.safetensors",
        "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    with Image.open(run / "logs" / "panels.png") as panels:
        assert panels.size == (5 * 68 + 4, 4 * 68 + 4)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["batch_size"] == 2
    assert saved["pretrained_model_name_or_path"] == "embedded"
    header = read_control_header(run / "final_model" / "controlnet.safetensors")
    assert (header.conditioning, header.base, header.step) == ("masked-image/1", "embedded", 4)


def test_tensorboard_shows_scalars_and_panels(small_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finish(replace(small_run, log_images_steps=4))
    (run,) = small_run.output_dir.iterdir()
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "train/memory_gb",
    }  # fmt: skip
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4]
    assert events.Scalars("train/memory_gb")[0].value > 0.05
    assert events.Tags()["images"] == ["panels"]


def test_the_number_of_workers_changes_nothing(plain, other_run):
    finish(replace(other_run, num_workers=2))
    assert same_weights(plain.weights, final_weights(other_run.output_dir))


def test_other_seeds_learn_other_weights(plain, other_run):
    finish(replace(other_run, seed=1))
    assert not same_weights(plain.weights, final_weights(other_run.output_dir))


def test_clipping_is_off_at_zero(other_run, tmp_path):
    finish(replace(other_run, max_grad_norm=0.0))
    loose = replace(other_run, max_grad_norm=1e9, output_dir=tmp_path / "loose")
    finish(loose)
    assert same_weights(final_weights(other_run.output_dir), final_weights(loose.output_dir))


def test_weights_that_are_no_numbers_are_never_saved(small_run):
    # The loss of a first step is that of the untouched network; only its weights tell.
    options = replace(small_run, max_steps=1, save_steps=1, learning_rate=1e39)
    with pytest.raises(UserError, match="the weights became NaN or infinite at or before step 1"):
        finish(options)
    assert not list(small_run.output_dir.glob("*/checkpoint-*"))


def test_fp16_on_a_cpu_is_refused(small_run):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        finish(replace(small_run, mixed_precision="fp16"))


def test_the_average_is_what_final_model_holds(small_run):
    finish(replace(small_run, ema_decay=0.9))
    (run,) = small_run.output_dir.iterdir()
    average = load_file(run / "checkpoint-4" / "ema.safetensors")
    last = load_file(run / "checkpoint-4" / "diffusion_pytorch_model.safetensors")
    final = final_weights(small_run.output_dir)
    assert same_weights(final, average)
    assert not same_weights(final, last)
    found = find_controlnet(str(run / "checkpoint-4"))
    assert found.name == "ema.safetensors"
    assert read_control_header(found).step == 4


def test_checkpoints_are_limited(small_run):
    finish(replace(small_run, save_steps=1, checkpoints_total_limit=2))
    (run,) = small_run.output_dir.iterdir()
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("name", sorted(n for n, spec in HINTS.items() if not spec.given))
def test_every_conditioning_trains_and_fills(name, small_run, photo, hole):
    from controlfill.inference.complete import inpaint
    from controlfill.inference.pipeline import load
    from controlfill.options import HoleOptions

    finish(replace(small_run, conditioning=name, max_steps=1))
    pipeline = load(control=str(next(small_run.output_dir.iterdir())), device="cpu")
    assert pipeline.spec.name == name
    result = inpaint(pipeline, photo, hole, HoleOptions(num_inference_steps=1))
    np.testing.assert_array_equal(result.image[hole == 0], photo[hole == 0])


def test_bf16_trains_close_to_fp32(plain, small_run, tmp_path):
    # Pictures are drawn by the network in the wrapper that Accelerate puts around it.
    options = replace(small_run, mixed_precision="bf16", log_images_steps=2)
    half = finish(replace(options, output_dir=tmp_path / "half"))
    assert half != plain.losses
    np.testing.assert_allclose(half, plain.losses, rtol=0.1)
    assert all(w.dtype == torch.float32 for w in final_weights(tmp_path / "half").values())


@pytest.mark.parametrize(
    "change",
    [
        {"max_grad_norm": 1e-3}, {"lr_warmup_steps": 3}, {"lr_scheduler": "linear"},
        {"adam_weight_decay": 10.0}, {"random_flip": True}, {"mask_kinds": ("full",)},
        {"mask_area": (0.5, 0.6)}, {"gradient_accumulation_steps": 2}, {"batch_size": 3},
        {"proportion_empty_prompts": 1.0}, {"learning_rate": 1e-4}, {"snr_gamma": 1.0},
        {"noise_offset": 0.2}, {"hole_weight": 5.0}, {"max_train_samples": 3},
        {"val_split": 0.00001},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_option_changes_what_is_learned(plain, other_run, change):
    finish(replace(other_run, **change))
    assert not same_weights(plain.weights, final_weights(other_run.output_dir))


def test_crops_are_centred_when_asked(small_run, tmp_path):
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 96:160] = 200
    (tmp_path / "i").mkdir()
    Image.fromarray(wide).save(tmp_path / "i" / "x.png")
    options = replace(small_run, image_dir=str(tmp_path / "i"), max_steps=1)
    finish(replace(options, crop="center"))
    finish(replace(options, output_dir=tmp_path / "other"))
    assert not same_weights(final_weights(options.output_dir), final_weights(tmp_path / "other"))


def test_given_weights_are_the_start(plain, small_run):
    start = str(plain.folder / "final_model")
    more = replace(
        small_run, controlnet_model_name_or_path=start, learning_rate=0.0, max_steps=1
    )  # fmt: skip
    finish(more)
    assert same_weights(plain.weights, final_weights(more.output_dir))
    with pytest.raises(UserError, match="was trained with conditioning masked-image/1"):
        finish(replace(more, conditioning="masked-image+mask"))


class Mine:
    """The documented interface for one's own data."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 2:
            raise UserError("my picture 2 is broken")
        image = np.full((80, 70, 3), 40 * index, np.uint8)
        return Sample(image=image, prompt=f"grey {index}", name=str(index))


def test_own_data_by_the_interface_and_broken_pictures_named(small_run, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(finish(replace(small_run, max_steps=6), Mine())) == 6
    assert caplog.text.count("skipped: my picture 2 is broken") == 1
    assert "1 pictures were skipped" in caplog.text


def test_a_narrow_sd15_trains_a_step_and_infers(small_run, narrow_base, photo, hole):
    from controlfill.inference.complete import inpaint
    from controlfill.inference.pipeline import load
    from controlfill.options import HoleOptions

    finish(replace(small_run, pretrained_model_name_or_path=str(narrow_base), max_steps=1))
    pipeline = load(control=str(next(small_run.output_dir.iterdir())), device="cpu")
    assert pipeline.bundle.prediction_type == "epsilon"
    result = inpaint(pipeline, photo, hole, HoleOptions(num_inference_steps=2, scheduler="unipc"))
    np.testing.assert_array_equal(result.image[hole == 0], photo[hole == 0])


def test_coco_trains(small_run, coco, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CONTROLFILL_CACHE", str(tmp_path / "cache"))
    ann = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    ann["images"].append({**ann["images"][0], "id": 1, "file_name": "absent.jpg"})
    (tmp_path / "ann.json").write_text(json.dumps(ann))
    with caplog.at_level(logging.WARNING):
        losses = finish(
            replace(
                small_run, image_dir=str(coco / "train2017"), ann_file=tmp_path / "ann.json",
                captions_file=coco / "annotations" / "captions_train2017.json", max_steps=2,
            )
        )  # fmt: skip
    assert len(losses) == 2
    assert "1 pictures that the data names are absent and left out: absent.jpg" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 50}, "needs a multiple of 16; 48 would do"),
        ({"batch_size": 0}, "--batch_size is 0; at least 1"),
        ({"ema_decay": 1.5}, "lies between 0 and 0.999"),
        ({"num_workers": -1}, "--num_workers is -1; at least 0"),
        ({"image_dir": "nowhere"}, "is no folder"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "is no folder"),
        ({"controlnet_model_name_or_path": "nowhere"}, "does not exist"),
        ({"resume_from_checkpoint": "nowhere"}, "holds no whole checkpoint"),
        ({"mask_kinds": ("blob",)}, "no mask kind"),
        ({"learning_rate": 1e30}, "the loss became (nan|inf)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(small_run, change, words):
    with pytest.raises(UserError, match=words) as caught:
        finish(replace(small_run, **{"save_steps": 50, **change}))
    assert "\n" not in str(caught.value)


def test_a_broken_network_is_never_saved(small_run):
    with pytest.raises(UserError, match="the loss became"):
        finish(replace(small_run, learning_rate=1e30, log_steps=100, save_steps=4))
    assert not list(small_run.output_dir.glob("*/checkpoint-*"))
    assert not list(small_run.output_dir.glob("*/final_model"))


def test_a_full_disk_keeps_the_checkpoint_before(small_run, monkeypatch):
    from controlfill.training import checkpoint

    save_file, calls = checkpoint.save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return save_file(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="the disk is full.*checkpoint-4"):
        finish(small_run)
    (run,) = small_run.output_dir.iterdir()
    assert [p.name for p in run.glob("*checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert len(finish(replace(small_run, resume_from_checkpoint="latest"))) == 2


def test_no_two_processes_see_the_same_pictures():
    ranks = [
        [p for places in Places(Shuffled(24, 3, 0), rank, 2).between(0, 4) for p in places]
        for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1]) == 12
    assert sorted(ranks[0] + ranks[1]) == [(0, i) for i in range(24)]
    later = [p for places in Places(Shuffled(24, 3, 0), 1, 2).between(2, 4) for p in places]
    assert later == ranks[1][6:]
    odd = [p for places in Places(Shuffled(5, 3, 0), 0, 1).between(0, 5) for p in places]
    assert sorted(odd) == sorted((epoch, i) for epoch in range(3) for i in range(5))


def test_epochs_become_steps():
    options = TrainOptions(image_dir="x", batch_size=4, num_epochs=3, gradient_accumulation_steps=2)
    order = Shuffled(80, 4, 0)
    assert count_steps(order, options, 1) == 30
    assert count_steps(order, options, 2) == 15
    assert count_steps(Shuffled(81, 4, 0), options, 1) == 33  # epochs are whole steps
    assert count_steps(order, replace(options, max_steps=7), 1) == 7
    assert count_steps(order, replace(options, overfit_batches=4), 1) == 6

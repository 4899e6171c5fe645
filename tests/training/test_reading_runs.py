"""Skins with labels train in both engines; each option of the text loss changes what is learned."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import final_weights, finish, same_weights
from test_engines import finish_lightning, for_lightning, read_scalars

from controlfill.cli import run as call
from controlfill.errors import UserError
from controlfill.models.ocr import has_reader
from controlfill.options import ControlOptions, TrainOptions, check_values

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/skins_*.yaml"))
needs_readers = pytest.mark.skipif(
    not (has_reader("v6") and has_reader("v4")), reason="the models of PP-OCR are not installed"
)


@pytest.fixture
def skins_run(small_run):
    """The smallest run on skins with the text loss."""
    return replace(
        small_run, image_dir="world:skins", conditioning="image", crop="patch", image_size=128,
        pretrained_model_name_or_path="embedded-skins", batch_size=2, max_steps=2, log_steps=1,
        max_train_samples=8, text_loss=1.0, text_loss_labels=3,
        controlnet_model_name_or_path="embedded-skins",
    )  # fmt: skip


@needs_readers
def test_both_engines_read_the_same_labels(skins_run, tmp_path):
    losses = finish(skins_run)
    told = for_lightning(skins_run, output_dir=tmp_path / "lightning")
    assert finish_lightning(told) == losses
    assert same_weights(final_weights(skins_run.output_dir), final_weights(told.output_dir))
    (run,) = skins_run.output_dir.iterdir()
    scalars = read_scalars(run)
    for part in ("ctc", "floor", "excess", "feature"):
        assert len(scalars[f"train/text_{part}"]) == 2


@needs_readers
def test_validation_says_how_labels_are_read_by_noise_level(skins_run):
    finish(replace(skins_run, val_split=0.5, validation_steps=2))
    (run,) = skins_run.output_dir.iterdir()
    scalars = read_scalars(run)
    for reader in ("v4", "v6"):
        found = [v for k, v in scalars.items() if k.startswith(f"val/text_read_{reader}_t")]
        assert found
        assert all(0 <= value <= 1 for values in found for _, value in values)
    assert any(name.startswith("val/text_floor_t") for name in scalars)


@needs_readers
@pytest.mark.parametrize(
    "change",
    [
        {"text_loss": 0.0}, {"text_loss_feature": 0.0}, {"text_loss_ctc": 0.0},
        {"text_loss_weighting": "none"}, {"text_loss_weighting": "minsnr"},
        {"text_loss_max_t": 0.1}, {"text_loss_labels": 1}, {"text_loss_ocr": "v4"},
        {"text_box_weight": 4.0},
    ],
    ids=str,
)  # fmt: skip
def test_each_option_changes_what_is_learned(skins_run, tmp_path, change, usual_text_run):
    options = replace(skins_run, max_steps=1, save_steps=9, **change)
    assert finish(options) != usual_text_run


@pytest.fixture(scope="module")
def usual_text_run(tmp_path_factory):
    """The losses of one step of the run above."""
    return finish(
        TrainOptions(
            image_dir="world:skins", conditioning="image", crop="patch", image_size=128,
            pretrained_model_name_or_path="embedded-skins", batch_size=2, max_steps=1,
            learning_rate=1e-3, save_steps=9, log_steps=1, log_images_steps=0, num_workers=0,
            max_train_samples=8, text_loss=1.0, text_loss_labels=3,
            controlnet_model_name_or_path="embedded-skins",
            output_dir=tmp_path_factory.mktemp("usual"),
        )
    )  # fmt: skip


def test_data_without_labels_is_refused(small_run):
    with pytest.raises(UserError, match="--text_loss needs to know what is written"):
        finish(replace(small_run, text_loss=1.0))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_published_experiments_are_tried_by_one_flag(config, tmp_path):
    told = check_values(TrainOptions, yaml.safe_load(config.read_text()), str(config))
    assert TrainOptions(**told, rehearse=True).rehearsed().image_size == 128
    words = ["train", "--config", str(config), "--rehearse", "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path), "--log_images_steps", "0", "--text_loss", "0"]
    assert call(words) == 0
    (run,) = (tmp_path / "rehearsal").iterdir()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["pretrained_model_name_or_path"] == "embedded-skins"
    assert saved["mixed_precision"] == "no"
    assert (run / "final_model").is_dir()


def test_a_rehearsal_touches_nothing_real(tmp_path):
    options = TrainOptions(
        image_dir="photos", ann_file=Path("a.json"), output_dir=tmp_path, push_to_hub=True,
        resume_from_checkpoint="latest", report_to="wandb", torch_compile=True, rehearse=True,
    ).rehearsed()  # fmt: skip
    assert (options.push_to_hub, options.resume_from_checkpoint) == (False, None)
    assert (options.report_to, options.torch_compile) == ("tensorboard", False)
    assert options.output_dir == tmp_path / "rehearsal"
    # A run that fills holes is tried on what has holes, and data of other kinds is what it is.
    assert (options.image_dir, options.ann_file) == ("world:shapes", None)
    assert options.pretrained_model_name_or_path == "embedded"
    for name in ("world:shapes-bare", "hf:user/set", "data/{000..010}.tar"):
        assert replace(options, image_dir=name).rehearsed().image_dir == name


def test_five_experiments_ship_and_a_rehearsal_keeps_data_that_is_there(tmp_path):
    assert len(CONFIGS) == 5
    options = ControlOptions(image_dir=str(tmp_path), rehearse=True)
    assert options.rehearsed().image_dir == str(tmp_path)
    assert replace(options, rehearse=False).rehearsed() == replace(options, rehearse=False)

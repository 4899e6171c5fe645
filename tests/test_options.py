"""The list of options is frozen here: a new flag is a decision, not an accident."""

import dataclasses

import pytest

from controlfill import options as opts
from controlfill.cli import COMMANDS
from controlfill.errors import UserError
from controlfill.reading import presets, read_options, take_engine

DATA = {
    "ann_file", "captions_file", "mask_dir", "image_size", "crop", "random_flip", "mask_kinds",
    "mask_area", "seed", "image_column", "conditioning_image_column", "caption_column",
    "max_train_samples", "shuffle_buffer",
}  # fmt: skip
SAMPLE = {
    "strength", "fill", "match_colours", "num_images",
    "prompt", "negative_prompt", "guidance_scale", "controlnet_conditioning_scale",
    "num_inference_steps", "scheduler", "seed", "feather", "mixed_precision", "device",
    "output_dir", "conditioning", "window_size", "window_overlap", "window_batch",
    "control_guidance_start", "control_guidance_end", "control_prompted_only", "guidance_start",
    "guidance_end", "window_order", "repair_seams", "engine", "lama", "clip_guidance_scale",
    "clip_guidance_model", "clip_guidance_cutouts", "clip_guidance_end",
}  # fmt: skip
HOLE = SAMPLE | {
    "mask_polarity", "invert_mask", "grow_mask", "soft_mask", "only_masked", "context",
    "context_box", "separate_holes",
}  # fmt: skip
CONTROL = DATA | {
    "image_dir", "pretrained_model_name_or_path", "controlnet_model_name_or_path", "conditioning",
    "cache_dir", "aspect_ratio_buckets", "batch_size", "num_epochs", "max_steps",
    "overfit_batches", "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_weight_decay",
    "use_8bit_adam", "ema_decay", "proportion_empty_prompts", "snr_gamma", "noise_offset",
    "hole_weight", "gradient_checkpointing", "enable_xformers_memory_efficient_attention",
    "torch_compile", "allow_tf32", "val_split", "validation_image", "validation_mask",
    "validation_prompt", "num_validation_images", "output_dir", "save_steps", "num_workers",
    "report_to", "push_to_hub", "hub_model_id", "resume_from_checkpoint", "text_box_weight",
    "text_loss", "text_loss_feature", "text_loss_ctc", "text_loss_weighting", "text_loss_max_t",
    "text_loss_labels", "text_loss_ocr", "rehearse",
}  # fmt: skip
TUNE = (CONTROL - {
    "image_dir", "controlnet_model_name_or_path", "conditioning", "text_box_weight", "text_loss",
    "text_loss_feature", "text_loss_ctc", "text_loss_weighting", "text_loss_max_t",
    "text_loss_labels", "text_loss_ocr",
}) | {
    "instance_data_dir", "unet", "instance_prompt", "with_prior_preservation", "class_data_dir",
    "class_prompt", "num_class_images", "prior_loss_weight", "train_text_encoder",
    "text_encoder_lr", "use_lora", "rank", "lora_alpha", "lora_target_modules",
}  # fmt: skip
ACCELERATE = {
    "gradient_accumulation_steps", "max_grad_norm", "set_grads_to_none", "mixed_precision",
    "checkpoints_total_limit", "log_steps", "log_images_steps", "validation_steps",
}  # fmt: skip
LIGHTNING = {
    "precision", "accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches",
    "gradient_clip_val", "save_every_n_epochs", "save_top_k", "log_every_n_steps",
    "log_images_every_n_steps", "early_stopping_patience", "lr_find", "profiler",
}  # fmt: skip
FLAGS = {
    "demo": {"output_dir", "max_steps", "num_samples", "seed"},
    "doctor": {"device"},
    "preview": DATA | {"data", "conditioning", "num_samples", "output"},
    "mask": {"out", "size", "kind", "area", "text", "seed"},
    "train": CONTROL | ACCELERATE,
    "train_lightning": CONTROL | LIGHTNING,
    "finetune": TUNE | ACCELERATE,
    "finetune_lightning": TUNE | LIGHTNING,
    "cache": DATA
    | {
        "data", "pretrained_model_name_or_path", "cache_dir", "aspect_ratio_buckets", "variants",
        "text", "mixed_precision", "batch_size", "num_workers", "device",
    },
    "prepare table": DATA | {"data", "out", "count", "make_hint", "image_format"},
    "prepare shards": DATA | {"data", "out", "count", "make_hint", "image_format", "per_shard"},
    "skin hint": {"layout", "size", "font", "out", "glyphs"},
    "skin compose": {"layout", "size", "parts", "out"},
    "skin slice": {"layout", "size", "image", "out", "pressed"},
    "skin render": {"layout", "size", "font", "image", "out"},
    "skin export": {"layout", "size", "image", "out", "labels"},
    "skin themes": {"layout", "size", "out", "count", "seed"},
    "skin check": {"layout", "size", "image"},
    "skin import": {"layout", "size", "source", "out", "parts"},
    "skin generate": SAMPLE
    | {
        "layout", "size", "font", "control", "base", "prompts", "hint", "labels", "theme", "slices",
    },
    "skin report": {
        "skins", "layout", "size", "labels", "font", "ocr", "loss_ocr", "output", "json",
    },
    "prepare skins": {
        "layout", "size", "font", "prefix", "suffix", "skins", "out", "hint", "shared_hint", "text",
        "picture_texts", "incomplete", "caption", "image_format",
    },
    "prepare canny": DATA | {"data", "out", "low", "high", "size", "count", "image_format"},
    "prepare captions": {
        "data", "prefix", "suffix", "model", "captions", "batch_size", "max_new_tokens", "device",
        "overwrite",
    },
    "prepare glyphs": {"data", "confidence", "font", "overwrite"},
    "generate": SAMPLE | {"hint", "control", "base", "lora"},
    "inpaint": HOLE | {"image", "mask", "control", "base", "unet", "lora"},
    "outpaint": SAMPLE
    | {"image", "control", "base", "unet", "lora"}
    | {"left", "right", "top", "bottom", "expand", "to", "anchor"},
    "batch": (HOLE - {"image", "mask", "num_images"})
    | {"data", "mask_dir", "control", "base", "unet", "lora"}
    | {"left", "right", "top", "bottom", "expand", "to", "anchor"},
    "zoom": (SAMPLE - {"num_images"})
    | {
        "image", "out", "control", "base", "unet", "lora", "num_zooms", "zoom_factor",
        "seconds_per_zoom", "fps", "zoom_in",
    },
    "infer": HOLE
    | {
        "checkpoint_path", "input_image", "input_mask", "pretrained_model_name_or_path",
    },
    "evaluate": DATA
    | {
        "data", "num_samples", "control", "base", "num_inference_steps", "scheduler",
        "guidance_scale", "classical", "objects", "eval_batch_size", "device", "output_dir",
        "conditioning",
    },
    "glid split": {"source", "out"},
    "glid join": {"source", "unet", "out"},
    "convert": {
        "source", "out", "layout", "dtype", "prediction_type", "tokenizer", "config_from",
    },
    "merge": {
        "models", "out", "method", "alpha", "weights", "block_alphas", "parts", "loras",
        "lora_scales", "rank", "conv_rank", "energy", "layout", "dtype",
    },
}  # fmt: skip


def test_the_list_of_options_is_frozen():
    found = {n: {f.name for f in dataclasses.fields(c)} for n, (c, _) in COMMANDS.items()}
    assert found == FLAGS


def test_defaults_are_those_users_know():
    train = opts.TrainOptions(image_dir="x")
    assert (train.batch_size, train.num_epochs, train.learning_rate) == (4, 100, 1e-5)
    assert (train.save_steps, train.log_steps, train.num_workers) == (1000, 50, 4)
    assert (train.seed, train.image_size, train.mask_area) == (42, 512, (0.1, 0.3))
    assert train.pretrained_model_name_or_path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    infer = read_options(
        opts.InferOptions, "infer",
        ["--checkpoint_path", "c", "--input_image", "i", "--input_mask", "m"],
    )  # fmt: skip
    assert (infer.num_inference_steps, str(infer.output_dir)) == (50, "outputs/inference")


def test_yaml_flags_and_hyphens_are_the_same_option(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("image_dir: photos\nbatch_size: 8\nmask_area: [0.2, 0.4]\nmask_kinds: [full]\n")
    read = read_options(opts.TrainOptions, "train", ["--config", str(file), "--batch-size", "2"])
    assert (read.image_dir, read.batch_size, read.mask_area) == ("photos", 2, (0.2, 0.4))
    assert read.mask_kinds == ("full",)
    again = read_options(opts.TrainOptions, "train", [f"--config={file}"])
    assert again.batch_size == 8


def test_other_names_for_the_same_option(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("image_dir: x\ncheckpointing_steps: 7\n")
    words = ["--config", str(file)]
    assert read_options(opts.TrainOptions, "train", words).save_steps == 7
    for flag in (["--checkpointing-steps", "9"], ["--checkpointing_steps=9"]):
        assert read_options(opts.TrainOptions, "train", [*words, *flag]).save_steps == 9


def test_both_engines_are_one_command():
    words = ["--image_dir", "x"]
    assert take_engine("train", words) == ("train", words)
    assert take_engine("train", ["--engine=lightning", *words]) == ("train_lightning", words)
    assert take_engine("train", [*words, "--engine", "accelerate"]) == ("train", words)
    with pytest.raises(UserError, match="--engine jax is none of: accelerate, lightning"):
        take_engine("train", ["--engine", "jax"])


def test_both_engines_mean_the_same_run():
    told = opts.LightningOptions(
        image_dir="x", accumulate_grad_batches=3, gradient_clip_val=0.5, precision="bf16-mixed",
        log_every_n_steps=7, log_images_every_n_steps=9, snr_gamma=5.0, save_steps=11,
    )  # fmt: skip
    assert told.as_train() == opts.TrainOptions(
        image_dir="x", gradient_accumulation_steps=3, max_grad_norm=0.5, mixed_precision="bf16",
        log_steps=7, log_images_steps=9, snr_gamma=5.0, save_steps=11, val_split=0.05,
    )  # fmt: skip


def test_an_unquoted_no_is_no_and_flags_keep_their_names(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("image_dir: x\nmixed_precision: no\nrandom_flip: true\n")
    words = ["--config", str(file)]
    assert read_options(opts.TrainOptions, "train", words).mixed_precision == "no"
    assert read_options(opts.TrainOptions, "train", [*words, "--random_flip"]).random_flip
    assert not read_options(opts.TrainOptions, "train", [*words, "--no_random_flip"]).random_flip


def test_numbers_have_their_least_value():
    checked = {f.name for c, _ in COMMANDS.values() for f in dataclasses.fields(c)}
    assert set(opts.LEAST) | set(opts.SHARES) <= checked
    for name, least in opts.LEAST.items():
        wrong = type("Wrong", (), {name: least - 1})()
        with pytest.raises(UserError, match=f"--{name} is {least - 1}; at least {least} is needed"):
            opts.check_numbers(wrong)
    opts.check_numbers(opts.TrainOptions(image_dir="x"))


def test_positional_options_may_come_from_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("image: a.png\nmask: b.png\nfeather: 3\n")
    read = read_options(opts.InpaintOptions, "inpaint", ["--config", str(file)])
    assert (str(read.image), read.feather) == ("a.png", 3)
    words = ["x.png", "--prompt", "cat", "y.png"]
    read = read_options(opts.InpaintOptions, "inpaint", words)
    assert (str(read.image), str(read.mask), read.prompt) == ("x.png", "y.png", "cat")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 8", "batchsize is no option; there are: "),
        ("batch_size: many", "batch_size: .*found 'many'"),
        ("crop: left", "crop: .*'random', 'center' or 'patch'"),
        ("just words", "holds no `option: value` lines"),
        ("a: [", "can't be read"),
    ],
)
def test_wrong_yaml_is_one_line(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_options(opts.TrainOptions, "train", ["--config", str(file)])
    assert "\n" not in str(caught.value)


def test_missing_yaml_is_named():
    with pytest.raises(UserError, match=r"none\.yaml can't be read"):
        read_options(opts.TrainOptions, "train", ["--config", "none.yaml"])
    with pytest.raises(UserError, match="needs a YAML file or one of"):
        read_options(opts.TrainOptions, "train", ["--config"])


def test_options_become_plain_values():
    values = opts.TrainOptions(image_dir="x").as_dict()
    assert values["output_dir"] == "outputs"
    assert values["mask_area"] == [0.1, 0.3]
    assert values["max_steps"] is None


@pytest.mark.parametrize("file", ["embedded_inpaint", "coco_inpaint", "folder_inpaint"])
def test_shipped_configs_are_read(file):
    read = read_options(opts.TrainOptions, "train", ["--config", f"configs/{file}.yaml"])
    assert read.image_dir


def test_presets_are_configs_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["i.png", "--left", "8"]
    read = {
        name: read_options(opts.OutpaintOptions, "outpaint", [*words, "--config", name])
        for name in presets()
    }
    assert sorted(read) == ["glid", "mk2", "mosaic", "poor-mans"]
    assert (read["mk2"].fill, read["mk2"].strength) == ("noise", 0.8)
    assert (read["glid"].window_order, read["glid"].scheduler) == ("rows", "ddim")
    assert (read["mosaic"].fill, read["poor-mans"].fill) == ("mosaic", "blur")
    flags = [*words, "--config", "mk2", "--strength", "0.5"]
    assert read_options(opts.OutpaintOptions, "outpaint", flags).strength == 0.5
    (tmp_path / "mk2").write_text("seed: 3")  # a file of that name is meant first
    assert read_options(opts.OutpaintOptions, "outpaint", [*words, "--config", "mk2"]).seed == 3

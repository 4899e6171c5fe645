"""Fine-tuning: two engines, one set of numbers, exact resumption, models that can be used."""

import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import finish, same_weights
from narrow import make_unet
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from controlfill.data.cache import TEXTS, open_cache
from controlfill.data.prepare import write_shards
from controlfill.data.sample import Sample
from controlfill.data.sources import Subset, open_source
from controlfill.diffusion.objective import step_rng
from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.inference.complete import inpaint
from controlfill.inference.pipeline import load
from controlfill.models.bundle import Bundle, hash_weights, load_bundle
from controlfill.models.controlnet import HEADER_KEY
from controlfill.models.embedded import FOLDERS
from controlfill.models.inpainter import widen
from controlfill.models.text import Text
from controlfill.options import (
    CacheOptions,
    DataOptions,
    FinetuneLightningOptions,
    FinetuneOptions,
    HoleOptions,
    TuneOptions,
)
from controlfill.reading import read_options, take_engine
from controlfill.training import caching
from controlfill.training.checkpoint import flatten_optimizer, load_optimizer
from controlfill.training.finetune import check_companions, prepare
from controlfill.training.lightning import LearnModule, train_lightning
from controlfill.training.loop import make_accelerator, make_team
from controlfill.training.optim import make_optimizer, set_learning_rate
from controlfill.training.start import quiet

# Without class pictures.
ALONE = {
    "with_prior_preservation": False, "class_prompt": "", "class_data_dir": None,
    "num_class_images": 100, "prior_loss_weight": 1.0,
}  # fmt: skip


@pytest.fixture
def tune(tmp_path, narrow):
    """Options of a small run with all that could tell engines apart, on class pictures too."""
    return FinetuneOptions(
        instance_data_dir="world:shapes", instance_prompt="a cat",
        pretrained_model_name_or_path=str(narrow("sd15", in_channels=9)),
        image_size=64, batch_size=1, max_train_samples=5, learning_rate=1e-3, max_steps=2,
        gradient_accumulation_steps=2, max_grad_norm=0.05, ema_decay=0.9, lr_warmup_steps=2,
        proportion_empty_prompts=0.3, save_steps=1, log_steps=2, log_images_steps=0,
        num_workers=0, train_text_encoder=True, text_encoder_lr=5e-4,
        with_prior_preservation=True, class_prompt="a mat", num_class_images=2,
        class_data_dir=class_folder(tmp_path / "class"), prior_loss_weight=0.5,
        output_dir=tmp_path / "outputs",
    )  # fmt: skip


@pytest.fixture
def lora(tune):
    """The same run with a LoRA."""
    return replace(tune, use_lora=True, rank=2, lora_alpha=3.0)


def class_folder(folder, count=3):
    """A folder of class pictures that nobody has to paint."""
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def for_lightning(options, **changes):
    """The same run in Lightning's words."""
    shared = {f.name: getattr(options, f.name) for f in fields(TuneOptions)}
    words = {
        "accumulate_grad_batches": options.gradient_accumulation_steps,
        "gradient_clip_val": options.max_grad_norm,
        "log_every_n_steps": options.log_steps,
        "log_images_every_n_steps": options.log_images_steps,
        "accelerator": "cpu",
    }
    return FinetuneLightningOptions(**{**shared, **words, **changes})


def finish_lightning(options, on_step=lambda step: None):
    losses = []

    def both(step):
        losses.append(float(step.loss))
        on_step(step)

    train_lightning(options, on_step=both)
    return losses


def final_folder(options):
    (folder,) = options.output_dir.glob("finetune_inpainting_*/final_model")
    return folder


def final_weights(options):
    folder = final_folder(options)
    files = folder.rglob("*.safetensors")
    return {f"{f.relative_to(folder)} {n}": t for f in files for n, t in load_file(f).items()
            if not f.name.startswith("finetune_")}  # fmt: skip


def prepared(options, source=None):
    return prepare(options, make_team(make_accelerator(options)), source, quiet)


@pytest.mark.parametrize("kind", ["tune", "lora"])
def test_both_engines_stopped_or_not_learn_the_same_to_the_last_bit(kind, request, tmp_path):
    options = request.getfixturevalue(kind)
    losses = finish(options)
    weights, (run,) = final_weights(options), options.output_dir.iterdir()
    assert len(losses) == options.max_steps
    told = for_lightning(options, output_dir=tmp_path / "lightning")

    def keep(step):
        (last,) = told.output_dir.glob("*/checkpoints/last.ckpt")
        shutil.copy(last, tmp_path / f"{step.index}.ckpt")

    assert finish_lightning(told, keep) == losses
    assert same_weights(final_weights(told), weights)
    for resumed, file, go_on in [
        (options, run / "checkpoint-1", finish),
        (told, tmp_path / "1.ckpt", finish_lightning),
    ]:
        other = replace(
            resumed, output_dir=tmp_path / f"after {file.name}", resume_from_checkpoint=str(file)
        )
        assert go_on(other) == losses[1:]
        assert same_weights(final_weights(other), weights)
    kept = torch.load(tmp_path / "1.ckpt", weights_only=True)[HEADER_KEY]
    for state in (kept, read_json(run / "checkpoint-1" / "state.json")):
        assert state["class_pictures"] == 3
    if kind == "lora":  # adapters and their moments alone, a small part of the base
        kept = [*load_file(run / "checkpoint-1" / "pytorch_lora_weights.safetensors")]
        kept += [*torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]]
        assert all(".lora_" in name for name in kept)


def test_a_trained_lora_paints_as_it_did_in_training(lora, photo, hole, tmp_path):
    unet = tmp_path / "unet"
    make_unet("sd15", 9).save_pretrained(unet)
    near = Path(os.path.relpath(unet))  # a LoRA is used from elsewhere, too
    options = replace(lora, ema_decay=0.0, learning_rate=0.05, max_steps=1, unet=near)
    finish(options)
    folder = final_folder(options)
    assert (folder / "README.md").is_file()
    names = sorted(f.name for f in folder.glob("*.safetensors"))
    assert names == [f"{folder.parent.name}.safetensors", "pytorch_lora_weights.safetensors"]
    sampling = HoleOptions(prompt="a cat", num_inference_steps=2)
    run = prepared(options)
    run.take(run.read(folder.parent / "checkpoint-1", "diffusion_pytorch_model.safetensors"))
    wanted = inpaint(run.pipeline(run.network), photo, hole, sampling).image
    base = options.pretrained_model_name_or_path
    plain = inpaint(load(base, unet=unet, device="cpu"), photo, hole, sampling).image
    assert not np.array_equal(wanted, plain)
    # The base that it was trained on, and the UNet in it, need not be named.
    for given, other, name in ((None, None, ""), (base, unet, names[0]), (base, None, names[1])):
        pair = {"base": given, "unet": other, "loras": [str(folder / name)]}
        got = inpaint(load(**pair, device="cpu"), photo, hole, sampling).image
        np.testing.assert_allclose(got.astype(int), wanted.astype(int), atol=1)
    with pytest.raises(UserError, match=f"{unet} in the place of .* name that or another UNet"):
        load("embedded-inpaint", loras=[str(folder)])
    unet.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"LoRA {folder}.* there no more; name where it is now"):
        load(loras=[str(folder)])


def test_a_finetuned_base_is_used_like_any_other(tune, photo, hole):
    options = replace(
        tune, pretrained_model_name_or_path="embedded", train_text_encoder=False,
        text_encoder_lr=None, max_steps=1, **ALONE,
    )  # fmt: skip
    finish(options)
    pipe = load(str(final_folder(options)), device="cpu")
    assert pipe.bundle.unet.config.in_channels == 9
    assert promises(final_folder(options)) == [True, True]
    sampling = HoleOptions(prompt="a red circle", num_inference_steps=2)
    result = inpaint(pipe, photo, hole, sampling)
    np.testing.assert_array_equal(result.image[hole == 0], photo[hole == 0])


def promises(folder):
    """Whether a folder's class and its card promise that diffusers fills holes with it."""
    named = read_json(folder / "model_index.json")["_class_name"]
    return ["Inpaint" in named, "AutoPipelineForInpainting" in (folder / "README.md").read_text()]


def test_another_unet_learns_in_the_place_of_the_bases(tune, tmp_path):
    other = load_bundle("embedded").unet
    widen(other, 8)
    other.save_pretrained(tmp_path / "unet")
    options = replace(
        tune, pretrained_model_name_or_path="embedded-inpaint", unet=tmp_path / "unet", **ALONE
    )
    run, final = prepared(options), tmp_path / "final_model"
    learned = {name: p.detach() + 1 for name, p in run.network.learned().items()}
    for there in (True, False):  # a file that was moved meanwhile costs no final model
        final.mkdir()
        run.finish(final, learned)
        bundle = load_bundle(str(final), inpainting=True)
        assert bundle.is_glid
        assert torch.equal(bundle.unet.conv_in.weight, other.conv_in.weight + 1)
        assert hash_weights(bundle.vae) == hash_weights(run.bundle.vae)
        assert promises(final) == [False, False]
        shutil.rmtree(final)
        if there:
            options.unet.rename(tmp_path / "moved")


def test_text_encoders_learn_at_a_rate_of_their_own_and_only_when_asked(tune):
    options = replace(tune, ema_decay=0.0, learning_rate=1e-3, max_steps=1, max_grad_norm=0.0)
    old = load_bundle(options.pretrained_model_name_or_path, inpainting=True)

    def moved(options):
        finish(options)
        new = load_bundle(str(final_folder(options)), inpainting=True)
        parts = [(old.unet, new.unet), (old.text.encoder, new.text.encoder)]
        return [
            max(
                float((a - b).abs().max())
                for a, b in zip(x.parameters(), y.parameters(), strict=True)
            )
            for x, y in parts
        ]

    unet, text = moved(replace(options, text_encoder_lr=1e-5))
    assert text < 0.1 * unet
    frozen = replace(
        options, train_text_encoder=False, text_encoder_lr=None, output_dir=options.output_dir / "2"
    )
    assert moved(frozen)[1] == 0


def first_losses(run, count=3):
    """The losses of the first pictures, and of those beside them, before anything is learned."""
    batches, objective = iter(run.batches(0, count)), run.objective()
    with torch.no_grad():
        costs = [
            objective.cost(run.network, next(batches).to("cpu"), step_rng(0, 0, n))
            for n in range(count)
        ]
    return torch.stack([cost.losses for cost in costs]).numpy()


def test_caches_hold_class_pictures_too_and_texts_of_frozen_encoders(tune, tmp_path, monkeypatch):
    folder = class_folder(tmp_path / "own")
    Image.new("RGB", (120, 60), "red").save(folder / "2.png")
    (folder / "1.txt").write_text("cat")
    (tune.class_data_dir / "0.txt").write_text("cat")
    options = replace(
        tune, pretrained_model_name_or_path="embedded-inpaint", instance_data_dir=str(folder),
        instance_prompt="a red {}", crop="center", aspect_ratio_buckets=True,
        max_train_samples=None, gradient_accumulation_steps=1, train_text_encoder=False,
        text_encoder_lr=None,
    )  # fmt: skip
    shared = {f.name: getattr(options, f.name) for f in fields(DataOptions)}
    base = options.pretrained_model_name_or_path
    cache = CacheOptions(
        **shared, data=str(folder), pretrained_model_name_or_path=base, aspect_ratio_buckets=True,
        cache_dir=tmp_path / "cache", num_workers=0,
    )  # fmt: skip
    caching.build_cache(cache, quiet)
    plain = first_losses(prepared(options))
    assert plain.shape == (3, 2)
    cached = replace(options, cache_dir=tmp_path / "cache")
    run = prepared(cached)
    asked, encode = [], Bundle.encode_moments
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "encode_moments", lambda *a: asked.append(1) or encode(*a))
        patch.setattr(Text, "encode_anew", lambda *_: pytest.fail("the text encoder was asked"))
        np.testing.assert_allclose(first_losses(run), plain, rtol=1e-3)
        # What is there is not encoded again.
        (made,) = cached.cache_dir.glob("class_pictures-*")
        assert caching.cache_classes(cached, run.bundle, run.data.learn, quiet) == made
    assert len(asked) == 3  # once per batch, for masked pictures, whose masks are new each time
    # A learning text encoder leaves the texts alone, and another class picture is noticed.
    # Words that the cache has already are not beside it again.
    assert set(open_cache(made, {}).texts.place) == {"", "a red", "a red cat", "a mat"}
    learning = prepared(replace(cached, train_text_encoder=True))
    assert learning.bundle.text.cache is None
    Image.new("RGB", (80, 70)).save(options.class_data_dir / "0.png")
    groups = []
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "encode_moments", lambda *a: groups.append(len(a[1])) or encode(*a))
        other = caching.cache_classes(cached, run.bundle, run.data.learn, quiet)
    assert set(groups) == {options.batch_size}
    assert len({made, other, *cached.cache_dir.glob("class_pictures-*")}) == 3
    old, new = (open_cache(where, {}).latents for where in (made, other))
    places = [int(key.partition(".")[0]) for key in old.shard_of]
    assert len(places) == 2 * 3  # the sizes that are met, times the class pictures
    assert {(n - 3) % 3 for n in places if (old.read(n, 0) != new.read(n, 0)).any()} == {0}
    # Texts of another number format are others.
    run.bundle.text.encoder.to(torch.bfloat16)
    half = caching.cache_classes(cached, run.bundle, run.data.learn, quiet)
    assert half not in (made, other)
    assert load_file(half / TEXTS)["texts"].dtype == torch.bfloat16


def test_streams_have_class_pictures_beside_them(tune, tmp_path):
    write_shards(Subset(open_source("world:shapes", tune), 3), tmp_path / "shards")
    shards = {"instance_data_dir": str(tmp_path / "shards"), "max_train_samples": None}
    run = prepared(replace(tune, **shards))
    batch = next(iter(run.batches(0, 1))).to("cpu")
    assert batch.prompts[1:] == ["a mat"]
    assert batch.weights.tolist() == [1.0, 0.5]
    assert run.class_pictures == 3


def test_panels_and_validation_show_the_base_that_learns(tune, tmp_path, photo, hole):
    Image.fromarray(photo).save(tmp_path / "p.png")
    Image.fromarray(hole).save(tmp_path / "m.png")
    options = replace(
        tune, max_steps=1, val_split=0.3, validation_steps=1, log_images_steps=1,
        validation_image=(tmp_path / "p.png",), validation_mask=(tmp_path / "m.png",),
        num_validation_images=1,
    )  # fmt: skip
    finish(options)
    (run,) = options.output_dir.iterdir()
    assert (run / "logs" / "panels.png").is_file()
    assert (run / "logs" / "validation-1.png").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_prompt": ""}, "--with_prior_preservation needs a --class_prompt"),
        ({"class_data_dir": None}, "--with_prior_preservation needs a --class_data_dir"),
        ({"with_prior_preservation": False}, "no effect without --with_prior_preservation"),
        ({"text_encoder_lr": 1e-6, "train_text_encoder": False}, "no effect without --train_text"),
        ({"learning_rate": 0.0}, "--text_encoder_lr 0.0005 is a share of --learning_rate, which"),
        ({"rank": 0}, "--rank is 0"),
        ({"rank": 4}, "--rank has no effect without --use_lora"),
        ({"lora_alpha": 4.0}, "--lora_alpha has no effect without --use_lora"),
        ({"lora_target_modules": ("to_q",)}, "--lora_target_modules has no effect without"),
        ({**ALONE, "num_class_images": 9}, "--num_class_images has no effect without --with_prior"),
        ({**ALONE, "prior_loss_weight": 0.5}, "--prior_loss_weight has no effect without"),
        ({"use_lora": True, "pretrained_model_name_or_path": "embedded"}, "needs an inpaint base"),
        (
            {
                "unet": FOLDERS["embedded"],
                "use_lora": True,
                "pretrained_model_name_or_path": "embedded-inpaint",
            },
            "and --unet .*embedded is a text-to-image one",
        ),
        ({"use_lora": True, "lora_target_modules": ("to_z",)}, "no layer of the UNet ends so"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(tune, change, words):
    with pytest.raises(UserError, match=words) as caught:
        prepared(replace(tune, **change))
    assert "\n" not in str(caught.value)


def test_own_and_class_pictures_lie_apart(tune, tmp_path):
    for folder in (tmp_path, tmp_path / "class", tmp_path / "class" / "own"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(UserError, match="must lie apart"):
            check_companions(replace(tune, instance_data_dir=str(folder)))
    (tmp_path / "class pictures").mkdir()
    check_companions(replace(tune, instance_data_dir=str(tmp_path / "class pictures")))


def test_own_data_goes_in_by_a_source(tune):
    picture = np.zeros((64, 64, 3), np.uint8)

    class Mine:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            words = {"prompt": ""} if index else {"prompt": "a mat", "weight": 0.5}
            return Sample(image=picture, hint=picture, **words)

    run = prepared(replace(tune, **ALONE, batch_size=2), Mine())
    batch = run.first_batch(2)
    assert batch.prompts == ["a mat", "a cat"]
    assert batch.weights.tolist() == [0.5, 1.0]
    assert float(batch.mask.mean()) < 1


@pytest.mark.parametrize("name", ["lora", "dreambooth", "full_glid_recipe", "embedded"])
def test_shipped_configs_are_read_and_can_be_rehearsed(name):
    words = ["--config", f"configs/finetune_{name}.yaml", "--rehearse"]
    options = read_options(FinetuneOptions, "finetune", words)
    small = options.rehearsed()
    assert (small.pretrained_model_name_or_path, small.image_size) == ("embedded", 64)
    assert (small.instance_data_dir, small.mixed_precision) == ("world:shapes", "no")
    assert small.rate == options.rate
    prior = small.with_prior_preservation
    assert prior == (name == "dreambooth")
    where = str(small.class_data_dir)
    assert where.startswith(str(Path("outputs/rehearsal/class_pictures-"))) == prior
    other = replace(options, class_prompt="a photo of a cat").rehearsed()
    assert (str(other.class_data_dir) != where) == prior
    check_companions(small)
    lightning = read_options(FinetuneLightningOptions, "finetune", ["--instance_data_dir", "x"])
    assert lightning.as_train() == FinetuneOptions(instance_data_dir="x")
    assert replace(lightning, val_split=0.3, rehearse=True).rehearsed().val_split == 0


def test_other_rates_count_where_either_engine_goes_on(tune, caplog):
    network = nn.ModuleDict({"unet": nn.Linear(1, 1), "encoders": nn.ModuleList([nn.Linear(1, 1)])})
    old = make_optimizer(network, tune)
    sum(p.sum() for p in network.parameters()).backward()
    old.step()
    now = replace(tune, text_encoder_lr=1e-4, adam_weight_decay=0.5)
    ours, theirs = make_optimizer(network, now), make_optimizer(network, now)
    load_optimizer(ours, flatten_optimizer(old))
    module = LearnModule(for_lightning(now), None, None, lambda step: None)
    module.network = network
    run = SimpleNamespace(total=9, steps_per_epoch=5, class_pictures=2)
    module.parts = (run, run, run)
    kept = {"options": tune.as_dict(), "number": 4, "average": None, "class_pictures": 3}
    places = {"epoch_progress": 1, "epoch_loop.batch_progress": 4}
    loops = {"fit_loop": {name: {"current": {"ready": n}} for name, n in places.items()}}
    states = [old.state_dict()]
    checkpoint = {HEADER_KEY: kept, "optimizer_states": states, "loops": loops}
    module.on_load_checkpoint(checkpoint)
    assert "there were 3 class pictures, now there are 2" in caplog.text
    theirs.load_state_dict(checkpoint["optimizer_states"][0])
    for optimizer in (ours, theirs):
        set_learning_rate(optimizer, 1e-3)
        groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        np.testing.assert_allclose(groups, [(1e-3, 0.5), (1e-4, 0.5)])
        assert len(optimizer.state) == 4


def test_the_rate_is_that_of_the_method_unless_given():
    bare = FinetuneOptions(instance_data_dir="x")
    assert (bare.rate, bare.alpha, bare.text_share) == (5e-6, 16.0, 1.0)
    assert replace(bare, use_lora=True).rate == 1e-4
    assert replace(bare, learning_rate=1e-3, text_encoder_lr=1e-4).text_share == 0.1
    assert take_engine("finetune", ["--engine", "lightning"]) == ("finetune_lightning", [])

"""Models from one layout to another: what `controlfill convert` does, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from controlfill.errors import UserError
from controlfill.files import check_empty, write_folder, write_json
from controlfill.models import configs, embedded
from controlfill.models.controlnet import AVERAGE, find_controlnet
from controlfill.models.formats import Model, Told, as_original, open_model
from controlfill.models.headers import CONFIG_KEY, CONFIGS_KEY, HEADER_KEY, ZEROS, spec
from controlfill.models.layout import Cast, InMemory, Renamed, Together, save
from controlfill.models.lora_alphas import ADAPTER_KEY, adapter_metadata, read_adapter
from controlfill.models.lora_names import from_kohya, pairs, to_kohya
from controlfill.models.recognise import CONTROL, UNET, VAE, recognise
from controlfill.models.single_file import Tokenizers, find_tokenizers
from controlfill.models.weights import Weights, find_weights, open_weights
from controlfill.options.models import ConvertOptions, Layout

Report = Callable[[str, int, int], None]
DTYPES = {"keep": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FILES = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Converted:
    """What was written: where, what it is, how many tensors, and what was left out."""

    path: Path
    what: str
    tensors: int
    notes: tuple[str, ...] = ()


def convert(options: ConvertOptions, report: Report | None = None) -> Converted:
    """Write the model of `options` in another layout. Raises UserError for what can't be done."""
    report = report or (lambda what, done, total: None)
    source, out = find_source(options.source), options.out
    if out.suffix in PICKLES:
        raise UserError(f"{out}: pickles are read, not written; name a .safetensors file")
    if out.exists() and out.resolve() == source.resolve():
        raise UserError(f"{out} is what is read; name another file to write")
    in_file = out.suffix in FILES
    if in_file and out.exists():
        raise UserError(f"{out} exists already; name a new file for the result")
    if not in_file:
        if options.layout not in (None, "diffusers"):
            raise UserError(f"--layout {options.layout} is one file; name a .safetensors file")
        check_empty(out, "converted model")
    told = Told(config_from=options.config_from, prediction_type=options.prediction_type)
    if source.is_file():
        weights = open_weights(source)
        what = recognise(weights)
        if what.kind == "lora":
            check_used(options, "lora", source)
            return convert_lora(source, weights, options)
        if what.kind == "checkpoint" and in_file and options.layout != "diffusers":
            check_used(options, "checkpoint", source)
            model = open_model(source, told) if options.config_from else None
            return copy_checkpoint(weights, what.family, options, report, model)
    model = open_model(source, told)
    check_used(options, model.kind, source)
    model = predicting(model, options.prediction_type)
    if in_file:
        return write_single(model, options, report)
    return write_diffusers(model, source, options, report)


def check_used(options: ConvertOptions, kind: str, source: Path) -> None:
    """Raise UserError for options that would do nothing for such a source and result."""
    into = "file" if options.out.suffix in FILES else "folder"
    case = (kind, "file" if source.is_file() else "folder", into)
    for name, (cases, words) in USED_BY.items():
        if getattr(options, name) is not None and case not in cases:
            raise UserError(
                f"--{name} is for {words}; of {describe(kind, '')} from a {case[1]} into a {into} "
                "it changes nothing"
            )


def find_source(path: Path) -> Path:
    """The file or diffusers folder that `path` means, also that of a run or of `embedded`."""
    path = embedded.FOLDERS.get(str(path), path)
    if (path / AVERAGE).is_file():
        return path / AVERAGE  # a run with averaged weights means those
    if not path.is_dir() or (path / "model_index.json").is_file():
        return path
    if (path / "config.json").is_file():
        return path
    try:
        return find_weights(path)
    except UserError:
        return find_controlnet(str(path))


def predicting(model: Model, prediction_type: str | None) -> Model:
    """The model with what the user says that it predicts. Raises UserError for what doesn't."""
    if prediction_type and model.kind not in ("checkpoint", "unet"):
        raise UserError(
            f"--prediction_type is for checkpoints and UNets; this is {describe(model.kind, '')}"
        )
    if model.kind == "checkpoint" and prediction_type:
        model.configs["scheduler"]["prediction_type"] = prediction_type
    return replace(model, prediction=prediction_type) if prediction_type else model


def write_single(model: Model, options: ConvertOptions, report: Report) -> Converted:
    """Write a model as one file under the names of `options.layout`."""
    layout = options.layout or "original"
    if model.kind == "checkpoint":
        weights = checkpoint_weights(model, layout)
    else:
        weights = lone_weights(model, layout)
    about = dict(model.metadata)
    about.pop("format", None)
    if model.kind == "controlnet":
        about[CONFIG_KEY] = json.dumps(model.configs["controlnet"], default=str)
    else:
        about[CONFIGS_KEY] = json.dumps(plain_configs(model), default=str)
    if model.kind == "unet" or configs.SPEC_KEY in about:
        schedule = model.configs.get("scheduler", {})
        about |= spec(model.prediction or schedule.get("prediction_type"))
    count = write(weights, options, about, report)
    what = f"{describe(model.kind, model.family)} in the {layout} layout"
    return Converted(options.out, what, count, model.notes)


def checkpoint_weights(model: Model, layout: Layout) -> Weights:
    """A whole checkpoint under the names that Stable Diffusion gave its parts."""
    if layout == "diffusers":
        raise UserError(
            "a whole checkpoint in one file has original names; give --layout original, or name a "
            "folder to write"
        )
    places: list[tuple[str, Weights]] = [
        (UNET, as_original(model.parts["unet"], "unet")),
        (VAE, as_original(model.parts["vae"], "vae")),
    ]
    first = model.parts["text_encoder"]
    if "text_encoder_2" in model.parts:
        second = as_original(model.parts["text_encoder_2"], "text_encoder_2", opened=True)
        places.append(("conditioner.embedders.0.transformer.", first))
        places.append(("conditioner.embedders.1.model.", second))
    elif model.configs["text_encoder"].get("hidden_act") == configs.OPEN_CLIP["hidden_act"]:
        opened = as_original(first, "text_encoder", opened=True)
        places.append(("cond_stage_model.model.", opened))
    else:
        places.append(("cond_stage_model.transformer.", first))
    return Together([*places, ("", configs.marks(model.configs["scheduler"]))])


def lone_weights(model: Model, layout: Layout) -> Weights:
    """A ControlNet, UNet or autoencoder under the names of `layout`."""
    weights = model.parts[model.kind]
    # kohya's tools keep diffusers' names in ControlNets of SDXL.
    named = model.kind == "controlnet" and layout == "kohya" and model.family.startswith("sdxl")
    if layout == "diffusers" or named:
        return weights
    weights = as_original(weights, model.kind)
    prefix = CONTROL if model.kind == "controlnet" and layout == "original" else ""
    return Together([(prefix, weights)])


def copy_checkpoint(
    weights: Weights, family: str, options: ConvertOptions, report: Report, model: Model | None
) -> Converted:
    """Write a single-file checkpoint as another, every tensor of it, in another number format.

    `model` is the same opened, where its configs are told and written into the header.
    """
    about = {k: v for k, v in weights.metadata.items() if k != "format"}
    if model:
        about[CONFIGS_KEY] = json.dumps(plain_configs(model), default=str)
    if options.prediction_type and CONFIGS_KEY in about:
        told = json.loads(about[CONFIGS_KEY])
        if "scheduler" in told:
            told["scheduler"]["prediction_type"] = options.prediction_type
        about[CONFIGS_KEY] = json.dumps(told)
    about |= spec(options.prediction_type)
    if options.prediction_type == "epsilon":
        weights = Renamed(weights, {name: name for name in weights.names if name != "v_pred"})
    wanted = configs.marks({"prediction_type": options.prediction_type})
    extra = [name for name in wanted.names if name not in weights]
    both = Together([("", weights), ("", InMemory({name: wanted[name] for name in extra}))])
    count = write(both, options, about, report)
    return Converted(options.out, f"{describe('checkpoint', family)} in the original layout", count)


def write(weights: Weights, options: ConvertOptions, about: dict[str, str], report: Report) -> int:
    """Write a file tensor by tensor; returns how many."""
    total = len(weights.names)
    save(Cast(weights, DTYPES[options.dtype]), options.out, about, counting(report, total))
    return total


def counting(report: Report, total: int) -> Callable[[], None]:
    """A function that reports one more tensor each time it is called."""
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        report("tensors", done, total)

    return told


def write_diffusers(
    model: Model, source: Path, options: ConvertOptions, report: Report
) -> Converted:
    """Write a model as a diffusers folder."""
    total = sum(len(weights.names) for weights in model.parts.values())
    told = counting(report, total)
    whole = model.kind == "checkpoint"
    tokenizers = find_tokenizers(model, options.tokenizer, source) if whole else None
    with write_folder(options.out) as folder:
        for part, weights in model.parts.items():
            place = folder / part if whole else folder
            place.mkdir(exist_ok=True)
            cast = Cast(weights, DTYPES[options.dtype])
            text = part.startswith("text_encoder")
            name = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
            about = carried(weights.metadata)
            if model.kind == "unet":
                about |= spec(model.prediction)  # nothing else in the folder says it
            save(cast, place / name, about, told)
            write_json(place / "config.json", plain_config(model.configs[part], options.dtype))
        if tokenizers:
            write_pipeline(model, tokenizers, folder)
    what = f"{describe(model.kind, model.family)} as a diffusers folder"
    return Converted(options.out, what, total, model.notes)


def carried(metadata: dict[str, str]) -> dict[str, str]:
    """What of a header goes on into a folder: our own words, without configs."""
    return {k: v for k, v in metadata.items() if k.startswith(HEADER_KEY) and k != CONFIGS_KEY}


def plain_config(config: configs.Config, dtype: str) -> configs.Config:
    """A config without the number format that its weights had before."""
    if dtype == "keep":
        return config
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}


def plain_configs(model: Model) -> dict[str, Any]:
    """What a header says: configs, and of the pipeline what neither channels nor defaults tell."""
    pipeline: dict[str, Any] = {}
    if model.configs.get("unet", {}).get("in_channels") == configs.PAIR_CHANNELS and model.pipeline:
        pipeline["_class_name"] = model.pipeline
    if not model.empty_is_zero:
        pipeline[ZEROS] = False
    return model.configs | ({"pipeline": pipeline} if pipeline else {})


def write_pipeline(model: Model, tokenizers: Tokenizers, folder: Path) -> None:
    """Write what a diffusers pipeline has beside its networks."""
    import diffusers

    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    scheduler = model.configs["scheduler"]
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    two = "text_encoder_2" in model.parts
    index: dict[str, Any] = {
        "_class_name": model.pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if two:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            ZEROS: model.empty_is_zero,
        }
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", index)


def convert_lora(source: Path, weights: Weights, options: ConvertOptions) -> Converted:
    """Write a LoRA under kohya's names, or under diffusers'; `source` is where it lies."""
    in_file = options.out.suffix in FILES
    layout = options.layout or ("kohya" if in_file else "diffusers")
    if layout == "original":
        raise UserError("a LoRA has kohya's or diffusers' names; give --layout kohya or diffusers")
    if options.prediction_type:
        raise UserError("--prediction_type is for checkpoints and UNets; this is a LoRA")
    dtype = DTYPES[options.dtype]
    # What alphas make of numbers may need the format that is written.
    wide = Cast(weights, dtype and torch.float32)
    state = {name: wide[name] for name in weights.names}
    about = {k: v for k, v in weights.metadata.items() if k not in ("format", ADAPTER_KEY)}
    try:
        found = pairs(state)
        told = adapter_metadata(source, weights.metadata, {m.partition(".")[0] for m in found})
        # Alphas stay in the header, all of them, or are all multiplied into the matrices.
        kept = layout == "diffusers" and all(alpha is None for *_, alpha in found.values())
        if kept and (adapter := read_adapter(told)):
            about[ADAPTER_KEY] = json.dumps(adapter)
        rest = {} if kept else told
        plain = from_kohya(state, rest) if layout == "diffusers" else to_kohya(state, rest)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    cast = Cast(InMemory(plain), dtype)
    tensors = {n: t if n.endswith(".alpha") else cast[n] for n, t in plain.items()}
    out = options.out if in_file else options.out / LORA_FILE
    save(InMemory(tensors), out, about)
    return Converted(out, f"a LoRA under {layout} names", len(plain))


def describe(kind: str, family: str) -> str:
    """A model in words."""
    return f"a {KINDS[kind]}{f' of {family}' if family else ''}"


KINDS = {
    "checkpoint": "checkpoint", "controlnet": "ControlNet", "unet": "UNet", "vae": "VAE",
    "lora": "LoRA",
}  # fmt: skip
# Options, with the kinds, sources and results for which they do anything.
USED_BY = {
    "tokenizer": (
        {("checkpoint", "file", "folder"), ("checkpoint", "folder", "folder")},
        "checkpoints that become folders",
    ),
    "config_from": (
        {(kind, "file", into) for kind in KINDS if kind != "lora" for into in ("file", "folder")},
        "checkpoints, ControlNets, UNets and VAEs in single files",
    ),
}

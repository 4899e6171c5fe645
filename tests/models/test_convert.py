"""`controlfill convert` gives every tensor back, carries what it knows, and needs little memory."""

import json
import re
import struct
import subprocess
import sys
from shutil import copytree

import pytest
import torch
from safetensors.torch import save_file

from controlfill.cli import run
from controlfill.data.hints import HINTS
from controlfill.errors import UserError
from controlfill.models import configs, glid
from controlfill.models import controlnet as controls
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import Header, load_controlnet, read_control_header
from controlfill.models.convert import convert, find_source
from controlfill.models.formats import Told, open_model
from controlfill.models.headers import ZEROS
from controlfill.models.layout import Cast, InMemory
from controlfill.models.lora_alphas import ADAPTER_KEY
from controlfill.models.recognise import recognise
from controlfill.models.single_file import load_checkpoint
from controlfill.models.weights import open_weights
from controlfill.options import ConvertOptions

HEADER = Header(
    conditioning="masked-image/1", base="some", base_family="sd-32", prediction_type="epsilon",
)  # fmt: skip


def same(a, b):
    """Whether two models have the same tensors, to the last bit."""
    return a.parts.keys() == b.parts.keys() and all(
        set(a.parts[part].names) == set(b.parts[part].names)
        and all(torch.equal(a.parts[part][n], b.parts[part][n]) for n in a.parts[part].names)
        for part in a.parts
    )


@pytest.mark.parametrize(
    ("family", "channels", "pipeline"),
    [
        ("sd15", 9, "StableDiffusionInpaintPipeline"),
        ("sd2", 4, "StableDiffusionPipeline"),
        ("sdxl", 4, "StableDiffusionXLPipeline"),
    ],
)
def test_bases_go_into_one_file_and_back(family, channels, pipeline, narrow, tmp_path):
    base, file, back = narrow(family, channels), tmp_path / "x.safetensors", tmp_path / "back"
    if family == "sdxl":
        base = copytree(base, tmp_path / "base")
        index = json.loads((base / "model_index.json").read_text()) | {ZEROS: False}
        (base / "model_index.json").write_text(json.dumps(index))
    told = []
    done = convert(ConvertOptions(source=base, out=file), lambda *report: told.append(report))
    assert (done.path, done.tensors) == (file, len(open_weights(file).names))
    assert told[-1] == ("tensors", done.tensors, done.tensors)
    # Its header knows the narrow configs; the words it does not.
    done = convert(ConvertOptions(source=file, out=back, tokenizer=str(base)))
    assert not done.notes
    first, second = open_model(base), open_model(back)
    assert same(first, second)
    for part, config in first.configs.items():
        assert second.configs[part] == config
    index = json.loads((back / "model_index.json").read_text())
    assert index["_class_name"] == pipeline
    assert index.get(ZEROS) == (False if family == "sdxl" else None)
    assert second.empty_is_zero == (family != "sdxl")
    assert index.keys() >= json.loads((base / "model_index.json").read_text()).keys() - {
        "requires_aesthetics_score"
    }
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    assert second.configs["scheduler"]["prediction_type"] == prediction
    assert ("v_pred" in open_weights(file)) == (family == "sd2")


def test_converted_folders_are_pipelines_of_diffusers(narrow, tmp_path):
    from diffusers import StableDiffusionPipeline

    base, file = narrow("sd15", 4), tmp_path / "x.safetensors"
    convert(ConvertOptions(source=base, out=file))
    convert(ConvertOptions(source=file, out=tmp_path / "back", tokenizer=str(base / "tokenizer")))
    pictures = []
    for folder in (base, tmp_path / "back"):
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        made = pipe("a red cat", num_inference_steps=2, height=64, width=64, generator=rng,
                    output_type="pt")  # fmt: skip
        pictures.append(made.images)
    assert torch.equal(*pictures)


def test_one_file_is_loaded_as_the_folder_is(narrow, tmp_path):
    base, file = narrow("sdxl", 4), tmp_path / "x.safetensors"
    convert(ConvertOptions(source=base, out=file, dtype="fp16"))
    parts = load_checkpoint(file, tokenizer=str(base))
    assert parts.keys() == {
        "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
        "pipeline", "empty_is_zero",
    }  # fmt: skip
    assert parts["empty_is_zero"] is True
    for part, weights in open_model(base).parts.items():
        state = {controls_name(n): t for n, t in parts[part].state_dict().items()}
        assert state.keys() == {controls_name(name) for name in weights.names}
        for name in weights.names:
            assert torch.equal(state[controls_name(name)], weights[name].half())
    assert not parts["unet"].training
    assert parts["tokenizer"]("a red cat").input_ids == parts["tokenizer_2"]("a red cat").input_ids
    unet = narrow("sd15", 4) / "unet"
    convert(ConvertOptions(source=unet, out=tmp_path / "u.safetensors"))
    with pytest.raises(UserError, match="is a unet, no whole checkpoint"):
        load_checkpoint(tmp_path / "u.safetensors")


def controls_name(name):
    """A tensor's name in all versions of transformers."""
    return name.removeprefix("text_model.")


@pytest.mark.parametrize("layout", [None, "original", "diffusers", "kohya"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_lone_networks_come_back(part, layout, narrow, tmp_path):
    source, file = narrow("sd15", 9) / part, tmp_path / "x.safetensors"
    convert(ConvertOptions(source=source, out=file, layout=layout))
    what = recognise(open_weights(file))
    assert (what.kind, what.prefix) == (part, "")
    assert (what.layout == "diffusers") == (layout == "diffusers")
    convert(ConvertOptions(source=file, out=tmp_path / "back"))
    assert same(open_model(source), open_model(tmp_path / "back"))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def control(request, narrow, tmp_path_factory):
    """A saved ControlNet of ours, on a narrow base."""
    folder = tmp_path_factory.mktemp("control") / "final_model"
    folder.mkdir()
    bundle = load_bundle(str(narrow(request.param, 4)))
    network = controls.make_controlnet(bundle, HINTS["masked-image"].channels)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    controls.save_controlnet(network, folder, HEADER, names=(controls.WEIGHTS, controls.SINGLE))
    return folder, network, bundle


@pytest.mark.parametrize("layout", ["original", "kohya", "diffusers"])
def test_controlnets_carry_what_they_were_trained_on(layout, control, tmp_path):
    folder, network, bundle = control
    file = tmp_path / "x.safetensors"
    convert(ConvertOptions(source=folder.parent, out=file, layout=layout))  # a run
    assert read_control_header(file) == HEADER
    loaded = load_controlnet(file, bundle, 3).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in network.state_dict().items())
    convert(ConvertOptions(source=file, out=tmp_path / "back"))
    assert read_control_header(tmp_path / "back" / controls.WEIGHTS) == HEADER
    assert same(open_model(folder), open_model(tmp_path / "back"))


@pytest.mark.parametrize("layout", ["original", "kohya", "diffusers"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_controlnets_of_other_tools_are_loaded(layout, suffix, control, tmp_path):
    folder, network, bundle = control
    convert(ConvertOptions(source=folder, out=tmp_path / "x.safetensors", layout=layout))
    file = tmp_path / f"foreign.{suffix}"
    read = open_weights(tmp_path / "x.safetensors")
    tensors = {name: read[name] for name in read.names}  # without our header
    if layout == "original":  # as lllyasviel's first releases, whole checkpoints
        tensors["first_stage_model.x"] = torch.zeros(1)
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    assert read_control_header(file) is None
    loaded = load_controlnet(file, bundle, 3).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in network.state_dict().items())
    # Without a bundle, a narrow one's heads must be told.
    if layout != "diffusers":
        with pytest.raises(
            UserError, match="is of no release.*`controlfill convert` .* --config_from"
        ):
            convert(ConvertOptions(source=file, out=tmp_path / "back"))
    notes = convert(ConvertOptions(source=file, out=tmp_path / "told", config_from=folder)).notes
    left = "left out 1 tensors that diffusers has no place for"
    assert notes == ((left,) if layout == "original" else ())
    assert same(open_model(folder), open_model(tmp_path / "told"))


def test_controlnets_of_another_base_are_named(control, pipe, tmp_path):
    folder, _, _ = control
    convert(ConvertOptions(source=folder, out=tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="belongs to a base with text width"):
        load_controlnet(tmp_path / "x.safetensors", pipe.bundle, 3)


def test_averaged_weights_are_meant_where_there_are_any(control, tmp_path):
    folder, network, _ = control
    copytree(folder, tmp_path / "checkpoint-5")
    zeros = {n: torch.zeros_like(t) for n, t in network.state_dict().items()}
    controls.save_controlnet(
        network, tmp_path / "checkpoint-5", HEADER, zeros, names=(controls.AVERAGE,)
    )
    for source in (tmp_path / "checkpoint-5", tmp_path):
        file = tmp_path / f"{source.name}.safetensors"
        convert(ConvertOptions(source=source, out=file))
        assert not any(t.any() for t in open_model(file).state("controlnet").values())


def test_what_a_merge_says_travels(narrow, tmp_path):
    base = tmp_path / "base"
    copytree(narrow("sd15", 4), base)
    unet = base / "unet" / "diffusion_pytorch_model.safetensors"
    read = open_weights(unet)
    tensors = {name: read[name] for name in read.names}
    save_file(tensors, unet, {"format": "pt", "controlfill_merge": "recipe"})
    file = tmp_path / "x.safetensors"
    convert(ConvertOptions(source=base, out=file))
    assert open_weights(file).metadata["controlfill_merge"] == "recipe"
    convert(ConvertOptions(source=file, out=tmp_path / "back", tokenizer=str(base)))
    assert open_weights(tmp_path / "back" / "unet").metadata == {
        "format": "pt", "controlfill_merge": "recipe",
    }  # fmt: skip


def test_checkpoints_of_our_engine_are_converted(control, tmp_path):
    _, network, _ = control
    own = {"header": HEADER.__dict__, "config": dict(network.config), "average": None}
    weights = {f"network.{n}": t for n, t in network.state_dict().items()}
    torch.save({"state_dict": weights, "controlfill": own}, tmp_path / "last.ckpt")
    convert(ConvertOptions(source=tmp_path / "last.ckpt", out=tmp_path / "x.safetensors"))
    assert read_control_header(tmp_path / "x.safetensors") == HEADER
    read = open_model(tmp_path / "x.safetensors").state("controlnet")
    assert all(torch.equal(read[name], t) for name, t in network.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("fp16", torch.half), ("bf16", torch.bfloat16), ("fp32", torch.float), ("keep", torch.float)],
)
def test_number_formats(dtype, kind, narrow, tmp_path):
    source = narrow("sd15", 4)
    convert(ConvertOptions(source=source, out=tmp_path / "x.safetensors", dtype=dtype))
    convert(ConvertOptions(source=source, out=tmp_path / "x", dtype=dtype))
    for model in (open_model(tmp_path / "x.safetensors"), open_model(tmp_path / "x")):
        for part, weights in model.parts.items():
            assert {weights.dtype(name) for name in weights.names} == {kind}
            name = weights.names[0]
            assert torch.equal(weights[name], open_model(source).parts[part][name].to(kind))


def test_old_checkpoints_lose_what_has_no_place_and_say_so(narrow, tmp_path, capsys):
    base, file = narrow("sd2", 4), tmp_path / "old.ckpt"
    convert(ConvertOptions(source=base, out=tmp_path / "x.safetensors"))
    read = open_weights(tmp_path / "x.safetensors")
    tensors = {name: read[name] for name in read.names if name != "v_pred"}
    block = "cond_stage_model.model.transformer.resblocks"
    more = {name.replace(f"{block}.22.", f"{block}.23."): t for name, t in tensors.items()
            if name.startswith(f"{block}.22.")}  # fmt: skip
    more |= {"cond_stage_model.model.text_projection": torch.zeros(32, 32), "betas": torch.ones(9)}
    more |= {"cond_stage_model.model.logit_scale": torch.tensor(1.0)}
    more |= {f"model_ema.x{n}": torch.ones(1) for n in range(3)}
    torch.save({"state_dict": tensors | more, "global_step": 3}, file)
    out = [str(tmp_path / "back"), "--tokenizer", str(base), "--config_from", str(base)]
    words = ["convert", str(file), *out, "--prediction_type", "v_prediction"]
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "left out the 3 averages of training" in said
    assert f"left out {len(more) - 3} tensors that diffusers has no place for" in said
    assert "a checkpoint of sd-32 as a diffusers folder" in said
    back = open_model(tmp_path / "back")
    assert same(open_model(base), back)
    assert back.configs["scheduler"]["prediction_type"] == "v_prediction"
    # From file to file nothing is lost.
    copy = tmp_path / "copy.safetensors"
    convert(ConvertOptions(source=file, out=copy, prediction_type="v_prediction", config_from=base))
    assert set(open_weights(copy).names) == {*tensors, *more, "v_pred"}
    # What was told is in its header, and needs not be told again.
    assert open_model(copy).configs["unet"] == back.configs["unet"]


def test_text_encoders_of_the_first_tools_are_read(narrow, tmp_path):
    """They were called without `text_model.`, and had their positions beside them."""
    base, file = narrow("sd15", 4), tmp_path / "old.pt"
    convert(ConvertOptions(source=base, out=tmp_path / "x.safetensors"))
    read = open_weights(tmp_path / "x.safetensors")
    tensors = {name.replace("text_model.", ""): read[name] for name in read.names}
    tensors["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)
    torch.save(tensors, file)
    with pytest.raises(UserError, match="--config_from .*none is no folder"):
        convert(ConvertOptions(source=file, out=tmp_path / "b", config_from=tmp_path / "none"))
    options = ConvertOptions(
        source=file, out=tmp_path / "back", config_from=base, tokenizer=str(base)
    )
    assert convert(options).notes == ("left out 1 tensors that diffusers has no place for",)
    assert same(open_model(base), open_model(tmp_path / "back"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_loras_go_both_ways(family, tmp_path):
    module = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    module = module if family == "sdxl" else module.replace("blocks.1.attn1", "blocks.0.attn1")
    lora = {f"unet.{module}.lora_A.weight": torch.randn(2, 8),
            f"unet.{module}.lora_B.weight": torch.randn(8, 2)}  # fmt: skip
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(lora, folder / "pytorch_lora_weights.safetensors")
    file = tmp_path / "kohya.safetensors"
    assert "under kohya names" in convert(ConvertOptions(source=folder, out=file)).what
    names = {"sd15": "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
             "sdxl": "input_blocks_4_1_transformer_blocks_1_attn1_to_q"}  # fmt: skip
    start = f"lora_unet_{names[family]}"
    assert set(open_weights(file).names) == {
        f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha",
    }  # fmt: skip
    done = convert(ConvertOptions(source=file, out=tmp_path / "back"))
    read = open_weights(done.path)
    assert done.path == tmp_path / "back" / "pytorch_lora_weights.safetensors"
    assert all(torch.equal(read[name], tensor) for name, tensor in lora.items())
    with pytest.raises(UserError, match="a LoRA has kohya's or diffusers' names"):
        convert(ConvertOptions(source=file, out=tmp_path / "x.safetensors", layout="original"))


def lora_of(alpha):
    """A small LoRA under PEFT's names, and diffusers' header of its alpha."""
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{module}.lora_A.weight": torch.randn(2, 8),
             f"{module}.lora_B.weight": torch.randn(8, 2)}  # fmt: skip
    return state, {"format": "pt", ADAPTER_KEY: json.dumps({"unet.lora_alpha": alpha})}


def test_alphas_of_loras_are_kept(tmp_path):
    state, about = lora_of(alpha=1)
    file = tmp_path / "x.safetensors"
    save_file(state, file, about)
    convert(ConvertOptions(source=file, out=tmp_path / "same.safetensors", layout="diffusers"))
    read = open_weights(tmp_path / "same.safetensors")
    assert read.metadata[ADAPTER_KEY] == about[ADAPTER_KEY]
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    convert(ConvertOptions(source=file, out=tmp_path / "kohya.safetensors"))
    read = open_weights(tmp_path / "kohya.safetensors")
    assert [float(read[n]) for n in read.names if n.endswith(".alpha")] == [1.0]
    # What has its alphas in its matrices tells none.
    convert(ConvertOptions(source=tmp_path / "kohya.safetensors", out=tmp_path / "back"))
    assert ADAPTER_KEY not in open_weights(tmp_path / "back").metadata
    # Where some are tensors and one is told, all are in the matrices.
    module = "unet.mid_block.resnets.0.time_emb_proj"
    mixed = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.alpha": torch.tensor(6.0),
             f"{module}.lora_B.weight": torch.ones(8, 2)}  # fmt: skip
    save_file(state | mixed, tmp_path / "mixed.safetensors", about)
    convert(ConvertOptions(source=tmp_path / "mixed.safetensors", out=tmp_path / "both"))
    read = open_weights(tmp_path / "both")
    assert ADAPTER_KEY not in read.metadata
    for matrices, scale in ((state, 1 / 2), (mixed, 6 / 2)):
        down, up = (name for name in matrices if name.endswith(".weight"))
        wanted = matrices[up] @ matrices[down] * scale
        torch.testing.assert_close(read[up] @ read[down], wanted)
    save_file(state | mixed | {f"{module}.alpha": torch.tensor(torch.nan)}, file)
    with pytest.raises(UserError, match=r"x.safetensors: .*alpha is nan; an alpha is one finite"):
        convert(ConvertOptions(source=file, out=tmp_path / "nan"))


def test_products_of_alphas_may_need_the_format_that_is_asked_for(tmp_path):
    state = {"lora_unet_conv_in.lora_down.weight": torch.full((2, 3), 3e4).half(),
             "lora_unet_conv_in.lora_up.weight": torch.ones(3, 2).half(),
             "lora_unet_conv_in.alpha": torch.tensor(16.03)}  # fmt: skip
    file = tmp_path / "x.safetensors"
    save_file(state, file)
    options = {"source": file, "layout": "diffusers"}
    with pytest.raises(UserError, match="too large for float16; use --dtype bf16 or fp32"):
        convert(ConvertOptions(**options, out=tmp_path / "keep.safetensors"))
    convert(ConvertOptions(**options, out=tmp_path / "wide.safetensors", dtype="fp32"))
    read = open_weights(tmp_path / "wide.safetensors")
    torch.testing.assert_close(read["unet.conv_in.lora_A.weight"], torch.full((2, 3), 240450.0))
    convert(ConvertOptions(source=file, out=tmp_path / "kohya.safetensors", dtype="fp16"))
    again = open_weights(tmp_path / "kohya.safetensors")["lora_unet_conv_in.alpha"]
    assert torch.equal(again, state["lora_unet_conv_in.alpha"])


def test_alphas_in_a_folder_of_peft_are_read(tmp_path):
    state, _ = lora_of(alpha=1)
    folder = tmp_path / "peft"
    folder.mkdir()
    names = {f"base_model.model.{n.removeprefix('unet.')}": t for n, t in state.items()}
    save_file(names, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"r": 2, "lora_alpha": 8, "newer": 1, "rank_pattern": None}))
    convert(ConvertOptions(source=folder, out=tmp_path / "kohya.safetensors"))
    read = open_weights(tmp_path / "kohya.safetensors")
    assert [float(read[n]) for n in read.names if n.endswith(".alpha")] == [8.0]
    done = convert(ConvertOptions(source=folder, out=tmp_path / "diffusers"))
    told = json.loads(open_weights(done.path).metadata[ADAPTER_KEY])
    assert told == {"unet.r": 2, "unet.lora_alpha": 8}
    # It tells nothing of other LoRAs beside it, and is a mapping.
    save_file(names, folder / "other.safetensors")
    convert(ConvertOptions(source=folder / "other.safetensors", out=tmp_path / "o.safetensors"))
    read = open_weights(tmp_path / "o.safetensors")
    assert [float(read[n]) for n in read.names if n.endswith(".alpha")] == [2.0]
    config.write_text("[]")
    with pytest.raises(UserError, match="PEFT writes a mapping there"):
        convert(ConvertOptions(source=folder, out=tmp_path / "x.safetensors"))
    # A pickle of PEFT is found too.
    (folder / "adapter_model.safetensors").unlink()
    (folder / "other.safetensors").unlink()
    torch.save(names, folder / "adapter_model.bin")
    config.write_text(json.dumps({"lora_alpha": 6}))
    convert(ConvertOptions(source=folder, out=tmp_path / "b.safetensors"))
    read = open_weights(tmp_path / "b.safetensors")
    assert [float(read[n]) for n in read.names if n.endswith(".alpha")] == [6.0]


def test_numbers_too_large_for_a_format_are_refused(tmp_path):
    numbers = {"large": torch.tensor([1.0, -1e5]), "lost": torch.tensor([float("inf"), 1.0]),
               "both": torch.tensor([float("nan"), 1e5])}  # fmt: skip
    cast = Cast(InMemory(numbers), torch.float16)
    with pytest.raises(
        UserError, match=r"large has numbers of up to 1e\+05, too large for float16"
    ):
        cast["large"]
    with pytest.raises(UserError, match="both has numbers of up to .*, too large for float16"):
        cast["both"]
    assert torch.equal(cast["lost"], numbers["lost"].half())  # it was so before
    assert torch.equal(
        Cast(InMemory(numbers), torch.bfloat16)["large"], numbers["large"].bfloat16()
    )


def test_eight_channels_keep_what_they_are_for(narrow, tmp_path):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    base, file = tmp_path / "base", tmp_path / "x.safetensors"
    copytree(narrow("sd15", 8), base)
    index = json.loads((base / "model_index.json").read_text())
    pix2pix = StableDiffusionInstructPix2PixPipeline.__name__
    for name in ("StableDiffusionPipeline", pix2pix):
        (base / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        file.unlink(missing_ok=True)
        convert(ConvertOptions(source=base, out=file))
        assert open_model(file).pipeline == open_model(base).pipeline == name
    convert(ConvertOptions(source=file, out=tmp_path / "back", tokenizer=str(base)))
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "back")
    assert pipe.unet.config.in_channels == 8
    assert (
        json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == pix2pix
    )
    (base / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"is a {pix2pix}, whose UNet of 8 channels fills no"):
        load_bundle(str(file), inpainting=True)
    joined = tmp_path / "joined.safetensors"
    glid.join(file, narrow("sd15", 8) / "unet", joined)
    assert open_model(joined).pipeline == "StableDiffusionPipeline"
    # Of files that say nothing, InstructPix2Pix's are by far the most.
    read = open_weights(file)
    save_file({name: read[name] for name in read.names}, tmp_path / "untold.safetensors")
    # A class that somebody else's header names is none that diffusers shall load.
    odd = {"controlfill_configs": json.dumps({"pipeline": {"_class_name": "OddPipeline"}})}
    save_file({name: read[name] for name in read.names}, tmp_path / "odd.safetensors", odd)
    for name in ("untold", "odd"):
        untold = open_model(tmp_path / f"{name}.safetensors", Told(config_from=base))
        assert untold.pipeline == pix2pix
        assert "is taken for InstructPix2Pix's" in untold.notes[0]
    wide = configs.pipeline_class(configs.PAIR_CHANNELS, two=True)
    assert wide == "StableDiffusionXLInstructPix2PixPipeline"


def test_whole_models_of_other_channels_are_refused(narrow, tmp_path):
    """Such as SD 2's depth model and upscaler, as a folder and as a file."""
    base, file = copytree(narrow("sd15", 8), tmp_path / "base"), tmp_path / "x.safetensors"
    convert(ConvertOptions(source=base, out=file))
    read, first = open_weights(file), "model.diffusion_model.input_blocks.0.0.weight"
    state = {name: read[name] for name in read.names}
    config = json.loads((base / "unet" / "config.json").read_text()) | {"in_channels": 5}
    (base / "unet" / "config.json").write_text(json.dumps(config))
    told = {"controlfill_configs": json.dumps(open_configs(read) | {"unet": config})}
    save_file(state | {first: state[first][:, :5].clone()}, tmp_path / "five.safetensors", told)
    for source in (base, tmp_path / "five.safetensors"):
        with pytest.raises(UserError, match=r"its UNet takes 5 channels, as that of SD 2's depth"):
            open_model(source)


def open_configs(weights):
    """The configs in a header of ours."""
    return json.loads(weights.metadata["controlfill_configs"])


def test_marks_of_a_unet_alone_are_not_lost(narrow, tmp_path):
    unet, file = narrow("sd15", 4) / "unet", tmp_path / "x.safetensors"
    convert(ConvertOptions(source=unet, out=file))
    read, state = open_weights(file), {"v_pred": torch.zeros(0)}
    for number, prefix in enumerate(("model.diffusion_model.", "")):
        marked = tmp_path / f"marked{number}.safetensors"
        save_file(state | {f"{prefix}{n}": read[n] for n in read.names}, marked, read.metadata)
        for out in (tmp_path / f"again{number}.safetensors", tmp_path / f"folder{number}"):
            convert(ConvertOptions(source=marked, out=out, dtype="fp16"))
            assert open_weights(out).metadata["modelspec.prediction_type"] == "v"
            assert set(open_model(out).parts["unet"].names) == set(open_weights(unet).names)


def test_unets_alone_say_what_they_predict_when_told(narrow, tmp_path):
    unet, file = narrow("sd15", 4) / "unet", tmp_path / "v.safetensors"
    convert(ConvertOptions(source=unet, out=file, prediction_type="v_prediction"))
    assert open_weights(file).metadata["modelspec.prediction_type"] == "v"
    convert(ConvertOptions(source=file, out=tmp_path / "back"))
    assert open_weights(tmp_path / "back").metadata["modelspec.prediction_type"] == "v"
    convert(ConvertOptions(source=unet, out=tmp_path / "untold.safetensors"))
    assert "modelspec.prediction_type" not in open_weights(tmp_path / "untold.safetensors").metadata
    save_file(lora_of(alpha=1)[0], tmp_path / "lora.safetensors")
    for source in (narrow("sd15", 4) / "vae", tmp_path / "lora.safetensors"):
        options = {"source": source, "out": tmp_path / "x.safetensors"}
        with pytest.raises(UserError, match="--prediction_type is for checkpoints and UNets; this"):
            convert(ConvertOptions(**options, prediction_type="v_prediction"))
    with pytest.raises(UserError, match="--config_from is for .*; of a LoRA from a file into a fi"):
        convert(ConvertOptions(**options, config_from=unet))


def test_epsilon_takes_the_marks_of_v_away(narrow, tmp_path):
    base, file = narrow("sd2", 4), tmp_path / "x.safetensors"
    convert(ConvertOptions(source=base, out=file))
    read = open_weights(file)
    assert "v_pred" in read
    state, about = {name: read[name] for name in read.names}, read.metadata
    spec = {"modelspec.prediction_type": "v"}
    for number, header in enumerate((about | spec, spec)):
        source, out = tmp_path / f"in{number}.safetensors", tmp_path / f"out{number}.safetensors"
        save_file(state, source, header)
        convert(ConvertOptions(source=source, out=out, prediction_type="epsilon"))
        made = open_weights(out)
        assert "v_pred" not in made
        assert set(made.names) == state.keys() - {"v_pred"}
        assert made.metadata["modelspec.prediction_type"] == "epsilon"
        options = {"prediction_type": "v_prediction", "source": out}
        convert(ConvertOptions(**options, out=tmp_path / f"v{number}.safetensors"))
        made = open_weights(tmp_path / f"v{number}.safetensors")
        assert "v_pred" in made
        assert made.metadata["modelspec.prediction_type"] == "v"
        # As a base such a file predicts v, also where nothing else is told in it.
        model = open_model(tmp_path / f"v{number}.safetensors", Told(config_from=base))
        assert model.configs["scheduler"]["prediction_type"] == "v_prediction"


def test_a_file_that_is_there_is_not_lost(narrow, tmp_path):
    base = tmp_path / "base"
    copytree(narrow("sd15", 4), base)
    (tmp_path / "there.safetensors").write_bytes(b"old")
    inside = base / "unet" / "diffusion_pytorch_model.safetensors"
    for out in (tmp_path / "there.safetensors", inside):
        before = out.read_bytes()
        with pytest.raises(UserError, match="exists already; name a new file") as caught:
            convert(ConvertOptions(source=base, out=out))
        assert "\n" not in str(caught.value)
        assert out.read_bytes() == before


def test_what_cannot_be_written_is_refused_before_anything_is(narrow, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base, file = narrow("sd15", 4), tmp_path / "x.safetensors"
    convert(ConvertOptions(source=base, out=file))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    for options, words in [
        ({"out": tmp_path / "x.ckpt"}, "pickles are read, not written"),
        ({"out": file, "source": file}, "is what is read; name another"),
        ({"out": tmp_path / "full"}, "is not empty; name a new folder"),
        ({"out": tmp_path / "full" / "a"}, "is a file; name a new folder"),
        (
            {"out": tmp_path / "d.safetensors", "source": file, "tokenizer": str(base)},
            "--tokenizer is for checkpoints that become folders; of a checkpoint from a file in",
        ),
        (
            {"out": tmp_path / "d", "config_from": tmp_path / "none"},
            "--config_from is for .* in single files; of a checkpoint from a folder into a folder",
        ),
        ({"out": tmp_path / "d", "layout": "original"}, "--layout original is one file"),
        ({"out": tmp_path / "d.safetensors", "layout": "diffusers"}, "has original names"),
        ({"out": tmp_path / "d", "source": file, "tokenizer": "none"}, "none can't be loaded"),
        (
            {"out": tmp_path / "d", "source": file, "tokenizer": "a/b"},
            "holds no tokenizer, .*put its folder `tokenizer` beside it, or run `controlfill conv",
        ),
        ({"out": tmp_path / "d", "source": tmp_path / "none"}, "does not exist"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            convert(ConvertOptions(**{"source": base, **options}))
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "x.safetensors"]


def test_vocabularies_must_fit(narrow, tmp_path):
    from controlfill.models.embedded import make_tokenizer

    file = tmp_path / "x.safetensors"
    convert(ConvertOptions(source=narrow("sd15", 4), out=file))
    words = [f"word{n}" for n in range(30)]
    make_tokenizer(words, tmp_path / "tokenizer")  # beside the file, where it is found
    with pytest.raises(UserError, match=r"has 5\d\d words, the text encoder 520"):
        convert(ConvertOptions(source=file, out=tmp_path / "back"))


def test_embedded_is_a_source_and_has_its_own_architecture(tmp_path):
    assert (find_source("embedded") / "model_index.json").is_file()
    with pytest.raises(UserError, match="add_embedding.* has no name in the original layout"):
        convert(ConvertOptions(source="embedded", out=tmp_path / "x.safetensors"))
    done = convert(ConvertOptions(source="embedded", out=tmp_path / "x", dtype="fp16"))
    assert "checkpoint of embedded" in done.what
    assert load_bundle(str(tmp_path / "x")).family == "embedded"


MEASURE = """
import resource, sys
from pathlib import Path
import diffusers, transformers
from controlfill.models.convert import convert
from controlfill.options import ConvertOptions
diffusers.ControlNetModel, diffusers.UNet2DConditionModel, transformers.CLIPTextModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(ConvertOptions(source=Path(sys.argv[1]), out=Path(sys.argv[2])))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_large_files_need_little_memory(tmp_path):
    """A ControlNet as large as a release's, from a sparse file."""
    from controlfill.models.formats import part_shapes

    config = {"cross_attention_dim": 768, "conditioning_channels": 3}
    shapes = part_shapes("controlnet", config)
    about, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        about[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(about).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    largest = max(2 * torch.Size(shape).numel() for shape in shapes.values())
    words = [sys.executable, "-c", MEASURE, tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    grown = int(re.findall(r"\d+", told)[-1])
    assert end > 700e6
    assert grown < 1.5 * largest + 300e6
    assert (tmp_path / "y.safetensors").stat().st_size > 700e6

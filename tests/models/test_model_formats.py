"""The original layouts are those that diffusers, ComfyUI and A1111 read, both ways exactly."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders import single_file_utils as theirs
from narrow import make_unet

from controlfill.errors import UserError
from controlfill.models import formats
from controlfill.models.convert import checkpoint_weights, lone_weights
from controlfill.models.formats import Model, Told, open_model, part_shapes
from controlfill.models.layout import AsDiffusers, InMemory, Together
from controlfill.models.layout_text import full_name
from controlfill.models.layout_vae import newer_name
from controlfill.models.recognise import recognise
from controlfill.models.weights import open_weights

FAMILIES = ("sd15", "sd2", "sdxl")
# What decides names and shapes in the configs of the releases.
UNETS = {
    "sd15": {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8,
             "cross_attention_dim": 768, "sample_size": 64},
    "sd2": {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024, "use_linear_projection": True, "sample_size": 96},
    "sdxl": {"block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
             "cross_attention_dim": 2048, "use_linear_projection": True, "sample_size": 128,
             "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
             "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
             "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}  # fmt: skip
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
       "down_block_types": ["DownEncoderBlock2D"] * 4,
       "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
CLIPS = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768},
    "sd2": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512},
    "sdxl": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
             "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280},
}  # fmt: skip
ONES = {"vocab_size": 49408, "max_position_embeddings": 77}


def state(weights):
    """All tensors of some weights."""
    return {name: weights[name] for name in weights.names}


def released(family, in_channels=4):
    """A checkpoint with the widths of a release, whose tensors have shapes only."""
    clips = {"text_encoder": CLIPS[family]}
    if family == "sdxl":
        clips = {"text_encoder": CLIPS["sd15"], "text_encoder_2": CLIPS["sdxl"]}
    configs = {
        "unet": UNETS[family] | {"in_channels": in_channels}, "vae": VAE,
        **{part: config | ONES for part, config in clips.items()},
    }  # fmt: skip
    parts = {
        part: InMemory({n: torch.empty(s, device="meta") for n, s in part_shapes(part, c).items()})
        for part, c in configs.items()
    }
    return Model(
        kind="checkpoint", layout="diffusers", family=family, parts=parts,
        configs={**configs, "scheduler": {"prediction_type": "epsilon"}},
    )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request):
    """A release's shapes, and the same in one file."""
    model = released(request.param)
    return model, checkpoint_weights(model, "original")


def comfy_unet(weights, prefix="model.diffusion_model."):
    """What ComfyUI reads off a UNet: the keys by which it tells families apart."""
    first = f"{prefix}input_blocks.0.0.weight"
    depths, context, linear = [], None, None
    for number in range(1, 20):
        start = f"{prefix}input_blocks.{number}."
        if f"{start}0.in_layers.0.weight" not in weights:
            continue
        blocks = f"{start}1.transformer_blocks."
        depth = len({n[len(blocks) :].split(".")[0] for n in weights.names if n.startswith(blocks)})
        depths.append(depth)
        if depth and context is None:
            context = weights.shape(f"{blocks}0.attn2.to_k.weight")[1]
            linear = len(weights.shape(f"{start}1.proj_in.weight")) == 2
    framing = f"{prefix}label_emb.0.0.weight"
    return {
        "model_channels": weights.shape(first)[0], "in_channels": weights.shape(first)[1],
        "context_dim": context, "use_linear_in_transformer": linear, "transformer_depth": depths,
        "adm_in_channels": weights.shape(framing)[1] if framing in weights else None,
        "out_channels": weights.shape(f"{prefix}out.2.weight")[0],
    }  # fmt: skip


COMFY = {
    "sd15": {"context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None,
             "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]},
    "sd2": {"context_dim": 1024, "use_linear_in_transformer": True, "adm_in_channels": None,
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]},
    "sdxl": {"context_dim": 2048, "use_linear_in_transformer": True, "adm_in_channels": 2816,
             "transformer_depth": [0, 0, 2, 2, 10, 10]},
}  # fmt: skip


def a1111_config(weights):
    """The config file that A1111 chooses for a checkpoint, by its keys and shapes."""
    channels = weights.shape("model.diffusion_model.input_blocks.0.0.weight")[1]
    paint = "-inpainting" if channels == 9 else ""
    if "conditioner.embedders.1.model.ln_final.weight" in weights:
        return f"sdxl{paint}"
    attention = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    if attention in weights and weights.shape(attention)[1] == 1024:
        return f"sd2{paint}"
    return f"sd15{paint}" if channels != 8 else "instruct-pix2pix"


def comfy_control(names):
    """How ComfyUI tells ControlNets apart, in its order (FINDINGS, section 4)."""
    marks = ("lora_controlnet", "controlnet_cond_embedding.conv_in.weight",
             "control_model.zero_convs.0.0.weight", "zero_convs.0.0.weight")  # fmt: skip
    return next((mark for mark in marks if mark in names), None)


def test_releases_are_recognised_by_the_rules_of_other_tools(whole):
    model, weights = whole
    found = comfy_unet(weights)
    assert found.items() >= COMFY[model.family].items()
    assert (found["model_channels"], found["out_channels"]) == (320, 4)
    assert a1111_config(weights) == model.family
    what = recognise(weights)
    assert (what.kind, what.layout, what.family) == ("checkpoint", "original", model.family)


def test_releases_have_as_many_tensors_as_they_do(whole):
    model, weights = whole
    prefixes = ("model.diffusion_model.", "first_stage_model.")
    counts = [sum(name.startswith(prefix) for name in weights.names) for prefix in prefixes]
    assert counts == [{"sdxl": 1680}.get(model.family, 686), 248]


def test_configs_are_read_off_the_shapes_of_releases(whole, monkeypatch):
    model, weights = whole
    monkeypatch.setattr(formats, "open_weights", lambda path: weights)
    prediction = "v_prediction" if model.family == "sd2" else "epsilon"
    read = open_model(Path("x.safetensors"), Told(prediction_type=prediction))
    for part, config in model.configs.items():
        if part == "scheduler":
            continue
        wanted = dict(config)
        assert read.configs[part].items() >= wanted.items()
        shapes = {name: read.parts[part].shape(name) for name in read.parts[part].names}
        assert shapes == {n: model.parts[part].shape(n) for n in model.parts[part].names}
    assert read.configs["vae"]["scaling_factor"] == (0.13025 if model.family == "sdxl" else 0.18215)
    assert read.configs["scheduler"]["prediction_type"] == prediction
    assert not read.notes


def test_diffusers_reads_the_shapes_of_releases(whole):
    """Its converters, run as a reference on tensors that have shapes only."""
    model, weights = whole
    them = state(weights)
    config = {"addition_embed_type": None, "layers_per_block": 2} | model.configs["unet"]
    for part, read in (
        ("unet", theirs.convert_ldm_unet_checkpoint(dict(them), config)),
        ("vae", theirs.convert_ldm_vae_checkpoint(dict(them), model.configs["vae"])),
    ):
        ours = model.parts[part]
        assert {n: tuple(t.shape) for n, t in read.items()} == {
            n: ours.shape(n) for n in ours.names
        }


@pytest.mark.parametrize("channels", [8, 9])
def test_unets_of_other_channels_are_recognised(channels):
    weights = checkpoint_weights(released("sd15", channels), "original")
    assert comfy_unet(weights)["in_channels"] == channels
    wanted = {8: "instruct-pix2pix", 9: "sd15-inpainting"}[channels]
    assert a1111_config(weights) == wanted


@pytest.mark.parametrize(("family", "channels"), [("sd15", 4), ("sd2", 9), ("sdxl", 4)])
def test_diffusers_gives_our_tensors_back(family, channels, narrow):
    """Every tensor of a narrow base, through our export and their converters."""
    model = open_model(narrow(family, channels))
    them = state(checkpoint_weights(model, "original"))
    read = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(them), model.configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(them), model.configs["vae"]),
    }
    clip = theirs.convert_ldm_clip_checkpoint(dict(them))
    if family != "sd2":
        read["text_encoder"] = clip
    opened = {"sd2": ("text_encoder", "cond_stage_model.model."),
              "sdxl": ("text_encoder_2", "conditioner.embedders.1.model.")}  # fmt: skip
    if family in opened:
        part, prefix = opened[family]
        encoder = torch.nn.Module()
        encoder.config = type("Config", (), {"hidden_size": 32})
        read[part] = theirs.convert_open_clip_checkpoint(encoder, dict(them), prefix)
    for part, tensors in read.items():
        ours = state(model.parts[part])
        assert tensors.keys() == ours.keys()
        assert all(torch.equal(tensors[name], ours[name]) for name in ours)
    assert read.keys() == model.parts.keys()


@pytest.fixture(scope="module", params=FAMILIES)
def control(request):
    """A narrow ControlNet of a family, opened as a lone model."""
    network = ControlNetModel.from_unet(make_unet(request.param))
    weights = InMemory(network.state_dict())
    return request.param, Model(
        kind="controlnet", layout="diffusers", parts={"controlnet": weights},
        family={"sdxl": "sdxl"}.get(request.param, "sd15"),
        configs={"controlnet": dict(network.config)},
    )  # fmt: skip


def test_diffusers_gives_our_controlnets_back(control):
    family, model = control
    ours = state(model.parts["controlnet"])
    for layout in ("original", "kohya"):
        them = state(lone_weights(model, layout))
        read = theirs.convert_controlnet_checkpoint(them, model.configs["controlnet"])
        # Its converter forgets the embedding of SDXL's size and crop.
        lost = {name for name in ours if name.startswith("add_embedding")}
        assert read.keys() >= ours.keys() - (lost if layout == "original" else set())
        assert all(torch.equal(read[n], ours[n]) for n in ours if n in read and read[n] is not None)
        if family == "sdxl" and layout == "original":
            assert all(f"control_model.label_emb.0.{n}.weight" in them for n in (0, 2))


def test_controlnets_are_recognised_by_comfyui(control):
    family, model = control
    marks = {layout: comfy_control(lone_weights(model, layout).names)
             for layout in ("original", "kohya", "diffusers")}  # fmt: skip
    diffusers = "controlnet_cond_embedding.conv_in.weight"
    assert marks["original"] == "control_model.zero_convs.0.0.weight"
    assert marks["kohya"] == (diffusers if family == "sdxl" else "zero_convs.0.0.weight")
    assert marks["diffusers"] == diffusers


@pytest.mark.parametrize("layout", ["original", "kohya", "diffusers"])
def test_controlnets_come_back(control, layout):
    _, model = control
    ours, view = state(model.parts["controlnet"]), lone_weights(model, layout)
    what = recognise(view)
    assert what.kind == "controlnet"
    if what.layout == "diffusers":
        back = view
    else:
        named = formats.without_prefix(view, what.prefix)
        back, _ = formats.to_diffusers(named, "controlnet", model.configs["controlnet"], "x")
    assert set(back.names) == set(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert all(back.shape(name) == tuple(ours[name].shape) for name in ours)


def test_configs_of_controlnets_are_read_off_their_shapes(monkeypatch):
    from controlfill.models.configs import controlnet_config

    with torch.device("meta"):
        network = ControlNetModel(
            conditioning_channels=4, conditioning_embedding_out_channels=(16, 24, 32, 40)
        )  # that of SD 1.5, cross-attention of another width
    shapes = {n: torch.empty(t.shape, device="meta") for n, t in network.state_dict().items()}
    model = Model(kind="controlnet", layout="diffusers", family="sd-1280",
                  parts={"controlnet": InMemory(shapes)}, configs={})  # fmt: skip
    view = lone_weights(model, "kohya")
    read = controlnet_config(view, "sd15")
    assert read["conditioning_channels"] == 4
    assert read["conditioning_embedding_out_channels"] == [16, 24, 32, 40]
    assert read["attention_head_dim"] == 8
    narrow = InMemory({n: torch.empty(s, device="meta") for n, s in narrow_shapes().items()})
    with pytest.raises(UserError, match="a network 16 wide is of no release"):
        controlnet_config(narrow, "sd15")
    like = {"attention_head_dim": 2, "norm_num_groups": 4}
    assert controlnet_config(narrow, "sd15", like)["norm_num_groups"] == 4


def narrow_shapes():
    """The original names and shapes of a narrow ControlNet."""
    network = ControlNetModel.from_unet(make_unet("sd15"))
    model = Model(kind="controlnet", layout="diffusers", family="sd15",
                  parts={"controlnet": InMemory(network.state_dict())}, configs={})  # fmt: skip
    weights = lone_weights(model, "kohya")
    return {name: weights.shape(name) for name in weights.names}


def test_what_a_file_predicts():
    from controlfill.models.configs import V_BIAS, marks, told_prediction
    from controlfill.models.headers import CONFIGS_KEY, file_prediction

    first = {"input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    plain = InMemory(first | {V_BIAS: torch.zeros(320)})
    spread = InMemory(first | {V_BIAS: torch.linspace(-1, 1, 320)})
    assert told_prediction(plain, plain, "sd2") == "epsilon"
    assert told_prediction(spread, spread, "sd2") == "v_prediction"
    assert told_prediction(spread, spread, "sd15") == "epsilon"
    marked = Together([("", plain), ("", marks({"prediction_type": "v_prediction"}))])
    assert told_prediction(marked, plain, "sdxl") == "v_prediction"
    kohya = InMemory({}, {"modelspec.prediction_type": "v"})
    assert told_prediction(kohya, plain, "sd15") == "v_prediction"
    for told in ("[1]", '{"scheduler": "x"}', "{", "null"):
        with pytest.raises(UserError, match="the header of the file is damaged"):
            file_prediction(InMemory({}, {CONFIGS_KEY: told}))
    assert marks({"rescale_betas_zero_snr": True}).names == ("ztsnr",)
    assert marks({"prediction_type": "epsilon"}).names == ()


def test_names_of_older_versions_are_read(narrow, tmp_path):
    """Older diffusers' autoencoder and newer transformers' text encoder."""
    folder = narrow("sd15", 4)
    today = open_weights(folder / "vae").names
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for name in today:
        old = name
        for new, before in older.items():
            old = old.replace(new, before) if ".attentions." in name else old
        assert newer_name(old) == newer_name(name) == name
    bare = "encoder.layers.0.mlp.fc1.weight"
    assert full_name(bare) == full_name(f"text_model.{bare}") == f"text_model.{bare}"
    assert full_name("text_projection.weight") == "text_projection.weight"


def test_what_is_no_model_is_one_line(tmp_path, narrow):
    from safetensors.torch import save_file

    def write(**tensors):
        save_file({n.replace("__", "."): t for n, t in tensors.items()}, tmp_path / "x.safetensors")
        return tmp_path / "x.safetensors"

    unet = {"model__diffusion_model__input_blocks__0__0__weight": torch.zeros(16, 4, 3, 3)}
    vae = {"first_stage_model__quant_conv__weight": torch.zeros(1)}
    for tensors, words in [
        ({"zero_convs__0__0__weight": torch.zeros(1), "lora_controlnet": torch.zeros(0)},
         "holds no Stable Diffusion checkpoint"),
        ({"a": torch.zeros(1)}, "holds no Stable Diffusion checkpoint.*first tensor is a"),
        ({"a__lora_A__weight": torch.zeros(1)}, "is a LoRA"),
        (unet | vae, "has no text encoder beside its UNet"),
        (unet | {"cond_stage_model__transformer__x": torch.zeros(1)}, "has no autoencoder"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            open_model(write(**tensors))
    edm = (
        unet | vae | {"cond_stage_model__transformer__x": torch.zeros(1), "edm_mean": torch.ones(1)}
    )
    with pytest.raises(UserError, match="EDM"):
        open_model(write(**edm))
    with pytest.raises(UserError, match="holds a .*CLIPTextModel.*are converted"):
        open_model(narrow("sd15", 4) / "text_encoder")
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline", "text_encoder": ["a", "b"]}))
    with pytest.raises(UserError, match="is a FluxPipeline, no Stable Diffusion"):
        open_model(tmp_path)


def test_what_is_missing_or_misshapen_is_named(narrow):
    model = open_model(narrow("sd15", 4))
    original = state(formats.as_original(model.parts["unet"], "unet"))
    config = model.configs["unet"]

    def read(tensors):
        return formats.to_diffusers(InMemory(tensors), "unet", config, "x.ckpt")

    read(original)
    name = "input_blocks.1.0.in_layers.2.weight"
    with pytest.raises(UserError, match=f"x.ckpt lacks {name} of its unet"):
        read({n: t for n, t in original.items() if n != name})
    with pytest.raises(UserError, match="down_blocks.0.resnets.0.conv1.weight has the shape"):
        read(original | {name: torch.zeros(1, 2, 3, 3)})
    with pytest.raises(UserError, match="x.ckpt has strange.weight, which no architecture"):
        read(original | {"strange.weight": torch.zeros(1)})
    embedded = InMemory({"add_embedding.pool.q_proj.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="has no name in the original layout"):
        formats.as_original(embedded, "unet")


def test_fused_attention_is_split_and_joined(narrow):
    from controlfill.models.layout_text import open_clip_rows

    weights = open_model(narrow("sdxl", 4)).parts["text_encoder_2"]
    joined = formats.as_original(weights, "text_encoder_2", opened=True)
    name = "transformer.resblocks.3.attn.in_proj_weight"
    assert (joined.shape(name), tuple(joined[name].shape)) == ((96, 32), (96, 32))
    layer = "text_model.encoder.layers.3.self_attn."
    assert torch.equal(joined[name][32:64], weights[f"{layer}k_proj.weight"])
    assert torch.equal(joined["text_projection"], weights["text_projection.weight"].T)
    back = AsDiffusers(joined, open_clip_rows(weights.names)[0])
    for name in weights.names:
        assert torch.equal(back[name], weights[name])
        assert back[name].is_contiguous()
        assert back.dtype(name) == weights.dtype(name)

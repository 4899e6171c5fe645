"""LoRAs under PEFT's and kohya's names are the same LoRA, also to diffusers."""

import json

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from narrow import make_unet

from controlfill.errors import UserError
from controlfill.models.layout import InMemory
from controlfill.models.lora_alphas import ADAPTER_KEY
from controlfill.models.lora_names import from_kohya, pairs, split_scale, to_kohya
from controlfill.models.recognise import recognise

RANK = 4


def unet_modules(family):
    """The names and shapes of all layers of a narrow UNet that a LoRA may change."""
    with torch.device("meta"):
        unet = make_unet(family)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        f"unet.{name}": module.weight.shape
        for name, module in unet.named_modules()
        if isinstance(module, kinds)
    }


def text_modules(part):
    """The layers of a CLIP text encoder, by the names that files have."""
    layers = [f"{part}.text_model.encoder.layers.{n}." for n in (0, 11)]
    tails = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    return {layer + tail: (8, 8) for layer in layers for tail in tails}


def make_lora(modules):
    """A random LoRA of `modules` under PEFT's names."""
    rng = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in modules.items():
        ends = (1,) * (len(shape) - 2)
        made[f"{name}.lora_A.weight"] = torch.randn(RANK, shape[1], *shape[2:], generator=rng)
        made[f"{name}.lora_B.weight"] = torch.randn(shape[0], RANK, *ends, generator=rng)
    return made


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def lora(request):
    """A LoRA of everything in a base of one family."""
    modules = unet_modules(request.param) | text_modules("text_encoder")
    if request.param == "sdxl":
        modules |= text_modules("text_encoder_2")
    return request.param, make_lora(modules)


def test_names_go_to_kohya_and_back(lora):
    family, made = lora
    kohya = to_kohya(made)
    layouts = [recognise(InMemory(state)).layout for state in (made, kohya)]
    assert layouts == ["diffusers", "kohya"]
    assert len(kohya) == len(made) * 3 // 2
    back = from_kohya(kohya)
    assert back.keys() == made.keys()
    assert all(torch.equal(back[name], made[name]) for name in made)
    attention = {
        "sd15": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "sdxl": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
    }[family]
    text = "lora_te1_" if family == "sdxl" else "lora_te_"
    for name in (attention, f"{text}text_model_encoder_layers_11_mlp_fc1"):
        assert float(kohya[f"{name}.alpha"]) == RANK
        assert f"{name}.lora_down.weight" in kohya
    if family == "sdxl":
        assert "lora_unet_output_blocks_5_2_conv.lora_up.weight" in kohya
        assert "lora_unet_input_blocks_3_0_op.lora_up.weight" in kohya
        assert "lora_unet_middle_block_2_out_layers_3.lora_up.weight" in kohya


def as_diffusers_reads(kohya, family):
    """What diffusers makes of a kohya file, and its alphas."""
    unet = type("Config", (), {"layers_per_block": 2})
    state = dict(kohya)
    if family == "sdxl":
        state = _maybe_map_sgm_blocks_to_diffusers(state, unet)
    return _convert_non_diffusers_lora_to_diffusers(state)


def test_diffusers_reads_what_we_write(lora):
    family, made = lora
    read, alphas = as_diffusers_reads(to_kohya(made), family)
    # Its text encoders' attention is called after the UNet's at this point.
    names = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    found = {}
    for name, tensor in read.items():
        for old, new in names.items() if name.startswith("text_encoder") else ():
            name = name.replace(f"{old}_lora.", f"{new}.lora.")  # noqa: PLW2901
        found[name] = tensor
    assert set(alphas.values()) == {float(RANK)}
    back = from_kohya(found)
    assert back.keys() == made.keys()
    assert all(torch.equal(back[name], made[name]) for name in made)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0, 8.0])
def test_alphas_scale_the_product(alpha):
    made = make_lora({"unet.mid_block.attentions.0.proj_in": (6, 6)})
    kohya = to_kohya(made)
    (name,) = (n for n in kohya if n.endswith(".alpha"))
    kohya[name] = torch.tensor(alpha)
    down, up = from_kohya(kohya).values()
    first, second = made.values()
    torch.testing.assert_close(up @ down, second @ first * alpha / RANK)
    # Eight bits know no product, but hold this one.
    small = {n: torch.ones_like(t).to(torch.float8_e4m3fn) for n, t in kohya.items()}
    down, up = from_kohya(small | {name: torch.tensor(alpha)}).values()
    assert {down.dtype, up.dtype} == {torch.float8_e4m3fn}
    assert float(up.float()[0] @ down.float()[:, 0]) == pytest.approx(alpha, rel=0.05)


def test_products_that_a_format_cannot_hold_are_refused():
    stem = "lora_unet_mid_block_resnets_0_conv1"
    made = {f"{stem}.lora_down.weight": torch.full((2, 3, 1, 1), 3e4).half(),
            f"{stem}.lora_up.weight": torch.ones(3, 2, 1, 1).half()}  # fmt: skip
    large = torch.full((2, 2, 3, 3), 2.0).half()
    for more in ({f"{stem}.alpha": torch.tensor(8.0)}, {f"{stem}.lora_mid.weight": large}):
        with pytest.raises(UserError, match=r"numbers of up to 1.2e\+05, too large for float16"):
            from_kohya(made | more)
        assert all(
            torch.isfinite(tensor).all()
            for tensor in from_kohya({n: t.float() for n, t in (made | more).items()}).values()
        )


def test_alphas_have_their_precision_whatever_the_format():
    half = {n: t.bfloat16() for n, t in make_lora({"unet.conv_in": (6, 4)}).items()}
    about = {ADAPTER_KEY: json.dumps({"unet.lora_alpha": 16.03})}
    alpha = to_kohya(half, about)["lora_unet_conv_in.alpha"]
    assert torch.equal(alpha, torch.tensor(16.03))


def test_scales_are_split_so_that_half_precision_keeps_them():
    for scale in (1.0, 2.0, 0.5, 1 / 128, 0.3):
        down, up = split_scale(scale)
        assert down * up == scale
        assert scale > 1 or up / 2 <= down <= up * 2
    made = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.full(
            (1, 1), 1e-3
        ).half(),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.full((1, 1), 1e-3).half(),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1 / 128),
    }
    down, up = (tensor.double() for tensor in from_kohya(made).values())
    exact = float(made["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]) ** 2 / 128
    assert abs(float(down * up) / exact - 1) < 2e-3


def test_alphas_of_diffusers_headers_are_kept():
    module = "unet.down_blocks.0.attentions.0.proj_in"
    made = make_lora({module: (6, 6), "unet.conv_in": (6, 4, 3, 3)})
    told = {"unet.lora_alpha": 16, "unet.alpha_pattern": {"attentions.0.proj_in": 2}}
    kohya = to_kohya(made, {ADAPTER_KEY: json.dumps(told)})
    assert float(kohya["lora_unet_conv_in.alpha"]) == 16
    assert float(kohya["lora_unet_down_blocks_0_attentions_0_proj_in.alpha"]) == 2
    kohya = to_kohya(made, {ADAPTER_KEY: json.dumps(told | {"unet.use_rslora": True})})
    assert float(kohya["lora_unet_conv_in.alpha"]) == 16 * RANK**0.5
    # PEFT's patterns are regular expressions of the ends of names, up to a dot.
    told["unet.alpha_pattern"] = {"in": 3, r"attentions\.\d+\.proj_(in|out)": 5}
    kohya = to_kohya(made, {ADAPTER_KEY: json.dumps(told)})
    assert [float(t) for n, t in kohya.items() if n.endswith(".alpha")] == [5, 16]


@pytest.mark.parametrize(
    "text",
    ["{", "null", "[]", "3", '{"unet.lora_alpha": "8"}', '{"unet.lora_alpha": NaN}',
     '{"unet.lora_alpha": true}', '{"unet.alpha_pattern": [2]}', '{"unet.use_rslora": "no"}',
     '{"unet.alpha_pattern": {"to_q": null}}', '{"unet.alpha_pattern": {"(": 2}}'],
)  # fmt: skip
def test_damaged_headers_are_one_line(text):
    made = make_lora({"unet.conv_in": (6, 4, 3, 3)})
    for read in (to_kohya, from_kohya):
        with pytest.raises(UserError, match="the LoRA's header is damaged: ") as caught:
            read(made, {ADAPTER_KEY: text})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("unet.mid_block.attentions.0.attn1.processor.to_q_lora.{}.weight",
         "unet.mid_block.attentions.0.attn1.to_q"),
        ("unet.mid_block.attentions.0.attn1.processor.to_out_lora.{}.weight",
         "unet.mid_block.attentions.0.attn1.to_out.0"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        ("text_encoder_2.encoder.layers.0.mlp.fc1.lora.{}.weight",
         "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("base_model.model.down_blocks.0.resnets.0.conv1.lora.{}.weight",
         "unet.down_blocks.0.resnets.0.conv1"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora.{}.weight",
         "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("lora_unet_time_embedding_linear_1.lora_{}.weight", "unet.time_embedding.linear_1"),
        ("lora_unet_time_embed_0.lora_{}.weight", "unet.time_embedding.linear_1"),
        ("lora_te2_text_projection.lora_{}.weight", "text_encoder_2.text_projection"),
    ],
)  # fmt: skip
def test_other_names_that_are_read(name, meant):
    made = {name.format("down"): torch.ones(2, 3), name.format("up"): torch.ones(3, 2)}
    assert list(from_kohya(made)) == [f"{meant}.lora_A.weight", f"{meant}.lora_B.weight"]
    stem = name.partition("_lora.{}" if "_lora.{}" in name else ".lora")[0]
    ends = (".alpha", ".lora.alpha", "_lora.alpha") if "_lora.{}" in name else (".alpha",)
    for end in (*ends, *((".lora.alpha",) if ".lora.{}" in name else ())):
        assert pairs(made | {f"{stem}{end}": torch.tensor(7.0)})[meant][2] == 7


def test_attention_processors_of_old_files_are_read_as_diffusers_does():
    """`to_out_lora` is a layer's first in the UNet, and `out_proj` in a text encoder."""
    layers = {"unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor",
              "text_encoder": "text_model.encoder.layers.3.self_attn"}  # fmt: skip
    old, theirs = {}, {}
    for part, layer in layers.items():
        convert = convert_unet_state_dict_to_peft if part == "unet" else convert_state_dict_to_peft
        own = {f"{layer}.to_{x}_lora.{way}.weight": torch.randn(3, 3)
               for x in ("q", "k", "v", "out") for way in ("down", "up")}  # fmt: skip
        old |= {f"{part}.{name}": tensor for name, tensor in own.items()}
        theirs |= {f"{part}.{name}": tensor for name, tensor in convert(own).items()}
    assert recognise(InMemory(old)).kind == "lora"
    read = from_kohya(old)
    assert read.keys() == theirs.keys()
    assert all(read[name] is theirs[name] for name in theirs)
    # Their scale is 1: alpha is the rank.
    alphas = [float(tensor) for name, tensor in to_kohya(old).items() if name.endswith(".alpha")]
    assert alphas == [3.0] * 8
    # UNets saved alone have no prefix.
    bare = {n.removeprefix("unet."): t for n, t in old.items() if n.startswith("unet.")}
    assert from_kohya(bare).keys() == {name for name in read if name.startswith("unet.")}


def test_convolutions_of_three_matrices_are_folded_into_two():
    stem, x = "lora_unet_mid_block_resnets_0_conv1", torch.randn(1, 5, 6, 6)
    down, middle, up = torch.randn(4, 5, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(7, 4, 1, 1)
    made = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": middle,
            f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(4.0)}  # fmt: skip
    ((first, second, alpha),) = pairs(made).values()
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(x, down), middle, padding=1), up)
    torch.testing.assert_close(conv(conv(x, first, padding=1), second), wanted, rtol=0, atol=1e-4)
    assert alpha == 4
    with pytest.raises(UserError, match="has no other matrix of its rank 4"):
        pairs(made | {f"{stem}.lora_mid.weight": torch.randn(2, 4, 3, 3)})


@pytest.mark.parametrize(
    ("tail", "method"),
    [("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr"), ("dora_scale", "a DoRA"),
     ("oft_blocks", "an OFT"), ("on_input", "an IA3"), ("diff", "differences of whole weights"),
     ("lora_magnitude_vector.weight", "a DoRA"), ("a1.weight", "a GLoRA")],
)  # fmt: skip
def test_other_methods_are_named(tail, method):
    weights = {f"lora_unet_mid_block_attentions_0_proj_in.{tail}": torch.ones(2, 3)}
    assert recognise(InMemory(weights)).kind == "lora"
    with pytest.raises(UserError, match=f"no plain LoRA but to {method}, which is not read"):
        pairs(weights)


def test_what_is_no_lora_is_one_line():
    down, up = "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"
    two = torch.ones(2, 3)
    for weights, words in [
        ({"lora_unet_conv_in.hada_w1_a": two}, "hada_w1_a belongs to no plain LoRA"),
        ({down: two}, "has no other matrix of its rank 2"),
        ({down: two, up: torch.ones(3, 5)}, "has no other matrix of its rank 2"),
        ({"conv_in.weight": two}, "no LoRA is found"),
        # What a checkpoint is called must be no mark of another method.
        ({"model.diffusion_model.out.2.weight": two}, "no LoRA is found"),
        ({down: two, up: two.T, "bundle_emb.x": two}, "bundle_emb.x is no part of a plain LoRA"),
        ({down: two, up: two.T, "unet.conv_in.lora_A.weight": two,
          "unet.conv_in.lora_B.weight": two.T}, "are both of unet.conv_in"),
        ({down.replace("conv_in", "input_blocks_11_1_proj_in"): two,
          up.replace("conv_in", "input_blocks_11_1_proj_in"): two.T}, "is no layer of SDXL"),
        ({down: two, up: two.T, "lora_unet_conv_out.alpha": two[0, 0]}, "conv_out.alpha is no pa"),
        ({down: two, up: torch.ones(2)}, r"lora_up.weight has the shape \[2\]; a matrix of a LoRA"),
        ({down: torch.ones(0, 3), up: torch.ones(3, 0)}, r"has the shape \[0, 3\]"),
        ({down: two, up: torch.ones(3, 2, 3, 3)}, "are convolutions that don't go together"),
        ({down: two, up: two.T, down.replace("down", "mid"): torch.ones(2, 2)}, "don't go togethe"),
        *(({down: two, up: two.T, "lora_unet_conv_in.alpha": alpha}, f"alpha is {words}; an alpha")
          for alpha, words in ((torch.ones(0), "0 numbers"), (torch.tensor(torch.nan), "nan"))),
        *(({f"{stem}.lora_A.weight": two, f"{stem}.lora_B.weight": two.T},
           f"{stem} is no layer of a Stable Diffusion's UNet or text encoder")
          for stem in (
            "lora_unet_double_blocks_0_img_attn_proj", "lora_te3_encoder_block_0_layer_0_wo",
            "transformer.single_transformer_blocks.0.attn.to_q", "model.layers.0.self_attn.q_proj",
            "lora_prior_unet_down_blocks_0_proj_in", "text_encoder.encoder.block.0.layer.0.wo")),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            from_kohya(weights)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pipelines_of_diffusers_take_both_and_predict_the_same(family):
    """The UNet's prediction with a PEFT-named and a kohya-named file of one LoRA."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    wanted = ("attn1.to_q", "attn2.to_v", "ff.net.2", "conv1")
    modules = {n: s for n, s in unet_modules(family).items() if n.endswith(wanted)}
    made = make_lora(modules)
    mixin = {"sd15": StableDiffusionLoraLoaderMixin, "sdxl": StableDiffusionXLLoraLoaderMixin}
    results = []
    for state in (made, to_kohya(made), None):
        torch.manual_seed(0)
        unet = make_unet(family).eval()
        if state is not None:
            loader = mixin[family]
            read = loader.lora_state_dict(dict(state), unet_config=unet.config)
            loader.load_lora_into_unet(read[0], read[1], unet=unet)
        text = torch.ones(1, 3, unet.config.cross_attention_dim)
        framing = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
        with torch.no_grad():
            results.append(unet(torch.ones(1, 4, 8, 8), 10, text, added_cond_kwargs=framing).sample)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert (results[0] - results[2]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("width", "family"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl"), (32, "sd-32")]
)
def test_the_base_of_a_lora_is_recognised(width, family):
    made = make_lora({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (6, width)})
    for weights, layout in ((made, "diffusers"), (to_kohya(made), "kohya")):
        what = recognise(InMemory(weights))
        assert (what.kind, what.layout, what.family) == ("lora", layout, family)
    assert recognise(InMemory(make_lora({"unet.conv_in": (6, 4)}))).family == ""
    # Its text encoder is the first of two for SDXL, whatever else it leaves alone.
    text = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 8)}
    start = "lora_te1_" if family == "sdxl" else "lora_te_"
    assert any(n.startswith(start) for n in to_kohya(made | make_lora(text)))


def test_modules_have_their_alpha():
    made = make_lora({"unet.conv_in": (6, 4)})
    assert pairs(made)["unet.conv_in"][2] is None
    assert pairs(to_kohya(made))["unet.conv_in"][2] == RANK

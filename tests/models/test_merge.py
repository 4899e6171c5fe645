"""Merges are the arithmetic they claim to be, keep what isn't merged, and refuse what can't be."""

import hashlib
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlfill.cli import run
from controlfill.errors import UserError
from controlfill.files import read_header
from controlfill.models import merge_sources
from controlfill.models.bundle import load_bundle
from controlfill.models.convert import convert
from controlfill.models.layout import InMemory
from controlfill.models.layout_unet import unet_rows
from controlfill.models.merge import add_difference, merge, weighted_sum
from controlfill.models.merge_blocks import find_blocks
from controlfill.models.weights import open_weights, write_weights
from controlfill.options import ConvertOptions, MergeOptions

CONV_IN = "conv_in.weight"
SHAPES = {
    CONV_IN: (6, 4, 3, 3), "conv_in.bias": (6,), "time_embedding.linear_1.weight": (5, 6),
    "down_blocks.0.resnets.0.conv1.weight": (6, 6, 3, 3),
    "down_blocks.0.resnets.1.conv1.weight": (6, 6, 3, 3),
    "down_blocks.0.downsamplers.0.conv.weight": (6, 6, 3, 3),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (6, 8),
    "mid_block.resnets.0.conv1.weight": (6, 6, 3, 3),
    "up_blocks.0.resnets.2.conv1.weight": (6, 6, 3, 3),
    "up_blocks.1.resnets.1.conv1.weight": (6, 6, 3, 3), "conv_out.weight": (4, 6, 3, 3),
}  # fmt: skip


def write(file, state):
    """A weights file of `state`; its path as users give it."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_weights(file, shapes, state.items(), {})
    return str(file)


@pytest.fixture
def make(tmp_path):
    """Makes small UNets in single files: `make("b", channels=9, dtype=torch.float16)`."""

    def made(name, channels=4, dtype=torch.float32, **changed):
        rng = torch.Generator().manual_seed(ord(name[0]))
        shapes = SHAPES | {CONV_IN: (6, channels, 3, 3)}
        state = {k: torch.randn(s, generator=rng).to(dtype) for k, s in shapes.items()}
        return write(tmp_path / f"{name}.safetensors", state | changed)

    return made


def do(tmp_path, *models, **options):
    """What a merge writes, as tensors by name."""
    out = tmp_path / "out.safetensors"
    out.unlink(missing_ok=True)
    merge(MergeOptions(models=models, out=out, **options))
    return load_file(out)


def recipe_of(file):
    return json.loads(read_header(file)[merge_sources.RECIPE_KEY])


def same(one, other):
    """Equal to the last bit: -0.0 is not 0.0 here."""
    return one.dtype == other.dtype and torch.equal(*(t.view(torch.uint8) for t in (one, other)))


def test_add_difference_is_the_formula_in_float32(make, tmp_path):
    files = make("a", dtype=torch.float16), make("b", dtype=torch.bfloat16), make("c")
    made = do(tmp_path, *files, alpha=0.3, dtype="fp32")
    a, b, c = (load_file(f) for f in files)
    for name, tensor in made.items():
        assert torch.equal(tensor, 0.3 * (b[name].float() - c[name].float()) + a[name].float())


def test_weighted_sums_are_means_of_any_number_of_models(make, tmp_path):
    files = [make(letter) for letter in "abcd"]
    states = [load_file(f) for f in files]
    made = do(tmp_path, *files, method="weighted_sum", weights=(1, 2, 4, 1))
    for name, tensor in made.items():
        shares = zip((0.125, 0.25, 0.5, 0.125), states, strict=True)
        torch.testing.assert_close(tensor, sum(w * s[name] for w, s in shares))
    two = do(tmp_path, *files[:2], method="weighted_sum", alpha=0.25)
    weighed = do(tmp_path, *files[:2], method="weighted_sum", weights=(0.75, 0.25))
    for name, tensor in two.items():
        assert torch.equal(tensor, weighed[name])
        torch.testing.assert_close(tensor, 0.75 * states[0][name] + 0.25 * states[1][name])
    half = do(tmp_path, *files[:2], method="weighted_sum")
    torch.testing.assert_close(half[CONV_IN], (states[0][CONV_IN] + states[1][CONV_IN]) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_alpha_zero_is_a_to_the_last_bit(make, tmp_path, dtype):
    zeros = torch.full((6,), -0.0).to(dtype)
    a, b = make("a", dtype=dtype, **{"conv_in.bias": zeros}), make("b", dtype=dtype)
    expected = load_file(a)
    for options in ({"method": "add_difference", "models": (b, b)}, {"method": "weighted_sum",
                                                                      "models": (b,)}):  # fmt: skip
        made = do(tmp_path, a, *options["models"], method=options["method"], alpha=0.0)
        assert made.keys() == expected.keys()
        assert all(same(made[name], expected[name]) for name in made)


def test_a_plain_model_becomes_an_inpaint_model(make, tmp_path):
    custom, inpaint, base = make("a"), make("b", channels=9), make("c")
    made = do(tmp_path, custom, inpaint, base, alpha=0.5)[CONV_IN]
    a, b, c = (load_file(f)[CONV_IN] for f in (custom, inpaint, base))
    assert torch.equal(made[:, :4], 0.5 * (b[:, :4] - c) + a)
    assert torch.equal(made[:, 4:], 0.5 * b[:, 4:])


def test_an_inpaint_model_takes_on_a_difference_as_in_a1111(make, tmp_path):
    inpaint, custom, base = make("a", channels=9), make("b"), make("c")
    made = do(tmp_path, inpaint, custom, base, alpha=0.5)[CONV_IN]
    a, b, c = (load_file(f)[CONV_IN] for f in (inpaint, custom, base))
    assert torch.equal(made[:, :4], 0.5 * (b - c) + a[:, :4])
    assert torch.equal(made[:, 4:], a[:, 4:])


def test_a_mean_leaves_the_channels_of_masks_to_those_that_have_them(make, tmp_path):
    files = make("a"), make("b", channels=9), make("c", channels=9)
    a, b, c = (load_file(f)[CONV_IN] for f in files)
    made = do(tmp_path, *files, method="weighted_sum", weights=(2, 1, 1))[CONV_IN]
    torch.testing.assert_close(made[:, :4], 0.5 * a + 0.25 * b[:, :4] + 0.25 * c[:, :4])
    torch.testing.assert_close(made[:, 4:], 0.5 * b[:, 4:] + 0.5 * c[:, 4:])
    made = do(tmp_path, *files[:2], method="weighted_sum", alpha=0.0)[CONV_IN]
    assert torch.equal(made, torch.cat([a, b[:, 4:]], dim=1))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_folders_become_inpaint_pipelines(narrow, tmp_path, family):
    plain, inpaint, out = narrow(family), narrow(family, in_channels=9), tmp_path / "made"
    merge(MergeOptions(models=(str(plain), str(inpaint), str(plain)), out=out))
    xl = "XL" if family == "sdxl" else ""
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == f"StableDiffusion{xl}InpaintPipeline"
    bundle = load_bundle(str(out), inpainting=True)
    wanted = load_file(inpaint / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in bundle.unet.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)
    for part in ("vae", "text_encoder"):
        (file,) = (out / part).glob("*.safetensors")
        mine, own = load_file(file), load_file(plain / part / file.name)
        assert mine.keys() == own.keys()
        assert all(same(mine[name], tensor) for name, tensor in own.items())


def test_diffusers_opens_what_was_made(narrow, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline

    plain, inpaint = str(narrow("sd15")), str(narrow("sd15", in_channels=9))
    merge(MergeOptions(models=(plain, inpaint, plain), out=tmp_path / "made"))
    made = DiffusionPipeline.from_pretrained(tmp_path / "made")
    assert type(made) is StableDiffusionInpaintPipeline
    assert made.unet.config["in_channels"] == 9
    picture, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    made.set_progress_bar_config(disable=True)
    assert made(
        "a cat", picture, mask, height=64, width=64, num_inference_steps=1, output_type="np"
    ).images.shape == (1, 64, 64, 3)  # fmt: skip


def test_other_parts_are_those_of_a_unless_asked_for(narrow, tmp_path):
    a, b = narrow("sd15"), narrow("sd15", in_channels=9)
    texts = {}
    for parts in (("unet",), ("text_encoder", "vae")):
        out = tmp_path / parts[0]
        options = {"method": "weighted_sum", "alpha": 0.5, "parts": parts, "dtype": "bf16"}
        merge(MergeOptions(models=(str(a), str(b)), out=out, **options))
        texts[parts[0]] = load_file(out / "text_encoder" / "model.safetensors")
        unet = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
        assert unet[CONV_IN].shape[1] == (9 if parts == ("unet",) else 4)
        assert {t.dtype for t in unet.values()} == {torch.bfloat16}
    mine, theirs = (load_file(f / "text_encoder" / "model.safetensors") for f in (a, b))
    for name, tensor in mine.items():
        assert torch.equal(texts["unet"][name], tensor.bfloat16())
        mean = ((tensor + theirs[name]) / 2).bfloat16()
        torch.testing.assert_close(texts["text_encoder"][name], mean, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_blocks_are_the_same_in_both_layouts(narrow, family):
    file = narrow(family) / "unet" / "diffusion_pytorch_model.safetensors"
    with open_weights(file) as weights:
        rows, _ = unet_rows(weights.names)
    ours = find_blocks(row.diffusers for row in rows)
    original = find_blocks(f"model.diffusion_model.{row.original}" for row in rows)
    for row in rows:
        assert ours[row.diffusers] == original[f"model.diffusion_model.{row.original}"], row
    count = 12 if family == "sd15" else 9
    inputs, outputs = ([f"{w}{n:02}" for n in range(count)] for w in ("IN", "OUT"))
    base = {"BASE"} if family == "sdxl" else set()  # what SDXL embeds beside the time
    assert set(ours.values()) == {*inputs, "M00", *outputs} | base


@pytest.mark.parametrize(
    ("line", "block"),
    [("IN01", ("IN01",)), ("down_blocks.0", ("IN01", "IN02", "IN03")), ("mid_block", ("M00",)),
     ("OUT04", ("OUT04",)), ("up_blocks.0", ("OUT02",)), ("IN00", ("IN00",))],
)  # fmt: skip
def test_alphas_of_blocks_touch_only_them(make, tmp_path, line, block):
    file = tmp_path / "blocks.yaml"
    file.write_text(f"{line}: 1\n")
    a, b = make("a"), make("b")
    options = {"method": "weighted_sum", "alpha": 0.0, "block_alphas": str(file)}
    made, blocks = do(tmp_path, a, b, **options), find_blocks(SHAPES)
    mine, theirs = load_file(a), load_file(b)
    changed = {name for name in made if blocks[name] in block}
    assert changed
    for name, tensor in made.items():
        assert torch.equal(tensor, (theirs if name in changed else mine)[name])


def test_lists_of_alphas_are_in_the_order_of_the_community(make, tmp_path):
    a, b = make("a"), make("b")
    order = ["IN00", "IN01", "IN02", "IN03", "IN04", "M00", "OUT02", "OUT04"]
    blocks = find_blocks(SHAPES)
    assert sorted(set(blocks.values())) == order
    alphas = {block: number / 16 for number, block in enumerate(order)}
    words = ",".join(str(alpha) for alpha in alphas.values())
    made = do(tmp_path, a, b, method="weighted_sum", block_alphas=words)
    mine, theirs = load_file(a), load_file(b)
    for name, tensor in made.items():
        alpha = alphas[blocks[name]]
        torch.testing.assert_close(tensor, (1 - alpha) * mine[name] + alpha * theirs[name])
    again = do(tmp_path, a, b, method="weighted_sum", block_alphas=f"0.9,{words}")
    assert all(torch.equal(again[name], tensor) for name, tensor in made.items())
    (tmp_path / "list.yaml").write_text(f"[{words}]")
    third = do(tmp_path, a, b, method="weighted_sum", block_alphas=str(tmp_path / "list.yaml"))
    assert all(torch.equal(third[name], tensor) for name, tensor in made.items())


def test_base_is_what_is_no_block(make, tmp_path):
    names = {"cond_stage_model.x.weight": torch.ones(3), "model_ema.decay": torch.ones(1),
             "cond_stage_model.x.position_ids": torch.arange(3)}  # fmt: skip
    unet = {"model.diffusion_model.input_blocks.0.0.bias": torch.zeros(3)}
    a, b = (write(tmp_path / n, names | unet) for n in ("a.safetensors", "b.safetensors"))
    other = {k: v + 1 for k, v in (names | unet).items() if not k.endswith("position_ids")}
    write(tmp_path / "b.safetensors", other)
    (tmp_path / "x.yaml").write_text("BASE: 1\n")
    made = do(
        tmp_path, a, b, method="weighted_sum", alpha=0.0, parts=("unet", "text_encoder"),
        block_alphas=str(tmp_path / "x.yaml"),
    )  # fmt: skip
    assert torch.equal(made["cond_stage_model.x.weight"], torch.full((3,), 2.0))
    assert torch.equal(made["model.diffusion_model.input_blocks.0.0.bias"], torch.zeros(3))
    assert torch.equal(made["cond_stage_model.x.position_ids"], torch.arange(3))
    assert "model_ema.decay" not in made


def test_number_formats(make, tmp_path):
    a, b = make("a", dtype=torch.float16), make("b")
    for dtype, kind in (("keep", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        made = do(tmp_path, a, b, method="weighted_sum", dtype=dtype)
        assert {tensor.dtype for tensor in made.values()} == {kind}
    large = make("l", **{"conv_in.bias": torch.full((6,), 1e5)})
    with pytest.raises(UserError, match=r"conv_in.bias has numbers of up to 1e\+05, too large"):
        do(tmp_path, large, b, method="weighted_sum", alpha=0.0, dtype="fp16")


def test_old_checkpoints_and_folders_of_one_network_are_merged(make, narrow, tmp_path):
    a, b = make("a"), make("b")
    torch.save({"state_dict": load_file(b)}, tmp_path / "b.ckpt")
    one = do(tmp_path, a, b, method="weighted_sum")
    other = do(tmp_path, a, str(tmp_path / "b.ckpt"), method="weighted_sum")
    assert all(torch.equal(one[name], other[name]) for name in one)
    folders = [str(narrow("sd15", in_channels=n) / "unet") for n in (4, 9)]
    made = merge(MergeOptions(models=tuple(folders), method="weighted_sum", out=tmp_path / "unet"))
    from diffusers import UNet2DConditionModel

    assert UNet2DConditionModel.from_pretrained(made.path).config.in_channels == 9


def test_names_of_older_transformers_are_understood(tmp_path):
    key = "embeddings.token_embedding.weight"
    new = write(tmp_path / "new.safetensors", {key: torch.zeros(2, 2)})
    old = write(tmp_path / "old.safetensors", {f"text_model.{key}": torch.ones(2, 2)})
    made = do(tmp_path, old, new, method="weighted_sum", parts=("text_encoder",))
    assert torch.equal(made[f"text_model.{key}"], torch.full((2, 2), 0.5))


def test_headers_tell_the_recipe(make, tmp_path):
    a, b, c = make("a"), make("b"), make("c")
    do(tmp_path, a, b, c, alpha=0.7, block_alphas="0,0,0,0,0,1,0,0")
    first = tmp_path / "first.safetensors"
    (tmp_path / "out.safetensors").rename(first)
    told = recipe_of(first)
    assert (told["method"], told["alpha"], told["block_alphas"]["M00"]) == (
        "add_difference", 0.7, 1.0,
    )  # fmt: skip
    assert told["version"]
    assert told["parts"] == ["unet"]
    assert [m["name"] for m in told["models"]] == [f"{x}.safetensors" for x in "abc"]
    digest = hashlib.sha256(Path(a).read_bytes()).hexdigest()
    assert told["models"][0]["sha256"] == {"a.safetensors": digest}
    do(tmp_path, str(first), b, method="weighted_sum", weights=(3, 1))
    again = recipe_of(tmp_path / "out.safetensors")
    assert again["weights"] == [0.75, 0.25]
    assert again["models"][0]["recipe"] == told
    assert "recipe" not in again["models"][1]


def test_shards_are_hashed_one_after_the_other(narrow, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(narrow("sd15") / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="1MB")
    whole, parts = str(narrow("sd15") / "unet"), str(tmp_path / "unet")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    merge(MergeOptions(models=(parts, whole), method="weighted_sum", out=tmp_path / "made"))
    assert sorted(f.name for f in (tmp_path / "made").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    digest = hashlib.sha256()
    for file in sorted((tmp_path / "unet").glob("*.safetensors")):
        digest.update(file.read_bytes())
    told = recipe_of(tmp_path / "made" / "diffusion_pytorch_model.safetensors")
    assert told["models"][0]["sha256"] == {"unet": digest.hexdigest()}


def test_two_tensors_are_in_memory_at_a_time(make, tmp_path, monkeypatch):
    alive, most = [0], [0]

    def gone():
        alive[0] -= 1

    plain_read = merge_sources.Source.read

    def counted(self, name):
        tensor = plain_read(self, name)
        weakref.finalize(tensor, gone)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return tensor

    monkeypatch.setattr(merge_sources.Source, "read", counted)
    files = [make(letter) for letter in "abc"]
    do(tmp_path, *files, alpha=0.5)
    assert most[0] == 2
    do(tmp_path, *files, method="weighted_sum", weights=(1, 1, 1))
    assert (most[0], alive[0]) == (2, 0)


def test_formulas_read_what_they_need_only():
    read = []

    def tensor(index):
        read.append(index)
        return torch.ones(2)

    add_difference(tensor, 0.0, (2,))
    weighted_sum(tensor, (0.0, 1.0), [(2,), (2,)])
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        ("ab", {}, "add_difference takes three models, A B C; found 2"),
        ("a", {"method": "weighted_sum"}, "takes two to 26 models; found 1"),
        ("ab", {"method": "weighted_sum", "loras": (Path("x"),)}, "--loras is for --method lora"),
        ("ab", {"method": "weighted_sum", "rank": 3}, "--rank is for --method extract_lora"),
        ("abc", {"weights": (1, 2, 3)}, "--weights is for --method weighted_sum, not for add"),
        ("abc", {"method": "weighted_sum"}, "--weights has 0 numbers for 3 models"),
        ("ab", {"method": "weighted_sum", "weights": (1, 1), "alpha": 0.5}, "and no --alpha"),
        ("ab", {"method": "weighted_sum", "weights": (1, -1)}, "sum to 0"),
        ("abc", {"alpha": float("nan")}, "finite numbers"),
        ("ab", {"method": "weighted_sum", "weights": (1, 1), "block_alphas": "1"}, "not --weights"),
        ("abc", {"block_alphas": "1,2"}, "has 2 numbers; this UNet takes 9"),
        ("abc", {"block_alphas": "1,2,3,4,5,6,7,x"}, "OUT04 is 'x'; give a finite number"),
        ("abc", {"block_alphas": "1,2,3,4,5,6,,7"}, "OUT02 is empty; give a finite number"),
        ("abc", {"block_alphas": "1,2,3,4,-inf,6,7,8"}, "IN04 is '-inf'; give a finite number"),
        ("abc", {"block_alphas": "nan"}, "number 1 is 'nan'; give a finite number"),
        ("abc", {"block_alphas": " "}, "--block_alphas is empty; give numbers"),
        ("abc", {"block_alphas": "none.yaml"}, "none.yaml can't be read"),
        ("abc", {"parts": ("vae",)}, "has no vae to merge; it is a UNet with diffusers' names"),
        ("ax?", {}, "n.safetensors does not exist"),
        ("abw", {}, "takes prompts of width 8, .*w.safetensors.* of 9"),
        ("abm", {}, "lacks conv_out.weight, which A .* has; models of one architecture merge"),
        ("mab", {}, "B .* has; models of one architecture"),
        ("abs", {}, "conv_out.weight is 4x6x3x3 and 4x6x1x1 in these models"),
        ("abt", {}, "conv_in.weight is 6x4x3x3 and 6x8x3x3 in these models"),
        ("abo", {}, "is a file in the original layout; bring them to one layout"),
        ("abv", {}, "is a VAE; bring them"),
        ("abk", {}, "is a ControlNet; bring them"),
        ("abp", {}, "is an IP-Adapter, which is not merged"),
        ("ee", {"method": "weighted_sum", "parts": ("vae",), "block_alphas": "1,1"},
         "names blocks of the UNet, which --parts leaves out; name BASE"),
        ("nbc", {}, r"n.safetensors: conv_out.weight holds NaN or infinite numbers"),
        ("aic", {}, r"i.safetensors: conv_out.weight holds NaN or infinite numbers"),
        ("99a", {}, "the UNets of A and B take 9 channels and the others 4"),
        ("aa9", {}, "the UNets of C take 9"),
    ],
)  # fmt: skip
def test_what_is_refused(make, tmp_path, models, options, words):
    out = torch.zeros(SHAPES["conv_out.weight"])
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    changed = {
        "w": {key: torch.zeros(6, 9)}, "s": {"conv_out.weight": torch.zeros(4, 6, 1, 1)},
        "n": {"conv_out.weight": out * float("nan")}, "i": {"conv_out.weight": out + float("inf")},
    }  # fmt: skip
    made = {}
    for letter in models:
        if letter in "ekmopv":
            state = {
                "o": {"model.diffusion_model.out.2.bias": torch.zeros(2)},
                "v": {"decoder.conv_in.weight": torch.zeros(2, 2)},
                "e": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4, 3, 3),
                      "first_stage_model.x": torch.zeros(2)},
                "k": {n: torch.zeros(2, 2)
                      for n in ("zero_convs.0.0.weight", "time_embed.0.weight")},
                "p": {"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)},
                "m": {n: torch.zeros(s) for n, s in SHAPES.items() if n != "conv_out.weight"},
            }[letter]  # fmt: skip
            made[letter] = write(tmp_path / f"{letter}.safetensors", state)
        elif letter == "?":
            made[letter] = str(tmp_path / "n.safetensors")
        else:
            channels = {"9": 9, "t": 8}.get(letter, 4)
            made[letter] = make(letter, channels=channels, **changed.get(letter, {}))
    with pytest.raises(UserError, match=words) as caught:
        do(tmp_path, *(made[letter] for letter in models), **options)
    assert "\n" not in str(caught.value)
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {Path(f).name for f in made.values() if Path(f).exists()}


def test_v_and_epsilon_do_not_mix(narrow, tmp_path):
    a, b = narrow("sd15"), tmp_path / "b"
    shutil.copytree(a, b)
    config = b / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    options = {"models": (str(a), str(b)), "method": "weighted_sum", "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"predicts epsilon, B \(.*\) v_prediction"):
        merge(MergeOptions(**options))
    assert merge(MergeOptions(**options, parts=("vae",))).path.is_dir()


def test_a_folder_that_tells_no_prediction_means_epsilon(narrow, tmp_path):
    a, b = narrow("sd2"), tmp_path / "b"
    shutil.copytree(a, b)
    config = b / "scheduler" / "scheduler_config.json"
    told = json.loads(config.read_text())
    assert told.pop("prediction_type") == "v_prediction"
    config.write_text(json.dumps(told))
    models = (str(a), str(b))
    with pytest.raises(UserError, match=r"predicts v_prediction, B \(.*\) epsilon"):
        merge(MergeOptions(models=models, method="weighted_sum", out=tmp_path / "out"))


@pytest.mark.parametrize("mark", ["header", "tensor", "modelspec"])
def test_v_and_epsilon_files_do_not_mix(narrow, tmp_path, mark):
    epsilon, v = tmp_path / "epsilon.safetensors", tmp_path / "v.safetensors"
    convert(ConvertOptions(source=narrow("sd15"), out=epsilon))
    state, about = load_file(epsilon), read_header(epsilon)
    write(tmp_path / "bare.safetensors", state)
    if mark == "header":
        configs = json.loads(about["controlfill_configs"])
        configs["scheduler"]["prediction_type"] = "v_prediction"
        about = {"controlfill_configs": json.dumps(configs)}
    else:
        about = {"modelspec.prediction_type": "v"} if mark == "modelspec" else {}
    save_file(state | ({"v_pred": torch.zeros(0)} if mark == "tensor" else {}), v, about)
    for other in (epsilon, tmp_path / "bare.safetensors"):
        options = {"models": (str(other), str(v)), "method": "weighted_sum"}
        with pytest.raises(UserError, match=r"predicts epsilon, B \(.*\) v_prediction"):
            merge(MergeOptions(**options, out=tmp_path / "out.safetensors"))
    both = (str(epsilon), str(tmp_path / "bare.safetensors"))
    out = tmp_path / "out.safetensors"
    assert merge(MergeOptions(models=both, method="weighted_sum", out=out)).path.is_file()


def test_what_a_unet_alone_predicts_is_told_on_and_never_made_up(make, tmp_path):
    plain, marked, other = make("a"), make("b"), make("c")
    for file, spec in ((marked, "v"), (other, "epsilon")):
        save_file(load_file(file), file, {"modelspec.prediction_type": spec})
    spec_of = "modelspec.prediction_type"
    out, options = tmp_path / "out.safetensors", {"method": "weighted_sum"}
    for models, spec in (
        ((plain, plain), None),
        ((plain, marked), "v"),
        ((other, plain), "epsilon"),
    ):
        do(tmp_path, *models, **options)
        assert read_header(out).get(spec_of) == spec
    with pytest.raises(
        UserError, match=r"B \(.*\) predicts v_prediction, C \(.*\) epsilon; .*conv"
    ):
        do(tmp_path, plain, marked, other)
    assert not out.exists()
    # The first release's names tell no more than diffusers'; whole checkpoints mean epsilon.
    alone = {
        "time_embed.0.weight": torch.ones(2),
        "input_blocks.0.0.weight": torch.ones(2, 4, 1, 1),
    }
    assert merge_sources.file_prediction(InMemory(alone)) is None
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in alone.items()}
    assert merge_sources.file_prediction(InMemory(whole)) is None
    whole["first_stage_model.encoder.conv_in.bias"] = torch.ones(2)
    assert merge_sources.file_prediction(InMemory(whole)) == "epsilon"


def test_an_index_leads_out_of_no_folder(narrow, tmp_path):
    base, other = tmp_path / "in" / "base", narrow("sd15")
    shutil.copytree(other, base)
    for foreign in (tmp_path / "in" / "near", tmp_path / "far"):
        shutil.copytree(other / "unet", foreign)
    index = json.loads((base / "model_index.json").read_text())
    odd = {"../near": ["diffusers", "X"], str(tmp_path / "far"): ["diffusers", "X"],
           "..": [], ".": [], "": []}  # fmt: skip
    (base / "model_index.json").write_text(json.dumps(index | odd))
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    out = tmp_path / "made" / "out"
    out.parent.mkdir()
    merge(MergeOptions(models=(str(base), str(base)), method="weighted_sum", out=out))
    after = {f for f in tmp_path.rglob("*") if f.is_file() and out not in f.parents}
    assert after == before.keys()
    assert all(f.stat().st_mtime_ns == time for f, time in before.items())
    assert {f.name for f in out.iterdir()} == {f.name for f in other.iterdir()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere: 1", "nowhere is no block; there are: BASE, IN00, .*down_blocks.0"),
        ("IN00: much", "IN00 is 'much'; give a finite number"),
        ("IN00:", "IN00 is empty; give a finite number"),
        ("IN00: true", "IN00 is True; give a finite number"),
        ("IN01: 1\nIN02: 1\nIN03: 1\ndown_blocks.0: .nan", "down_blocks.0 is nan; give a finite"),
        ("just words", "holds neither a list nor"),
        ("a: [", "can't be read"),
    ],
)
def test_wrong_files_of_alphas(make, tmp_path, text, words):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        do(tmp_path, make("a"), make("b"), method="weighted_sum", block_alphas=str(file))


def test_what_is_there_is_not_lost(make, narrow, tmp_path):
    a, b = make("a"), make("b")
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"old")
    for out, words in (
        (there, "there.safetensors exists already; name a new file"),
        (tmp_path / "x.ckpt", "a file whose name ends in .safetensors"),
    ):
        with pytest.raises(UserError, match=words):
            merge(MergeOptions(models=(a, b), method="weighted_sum", out=out))
    assert there.read_bytes() == b"old"
    folder = str(narrow("sd15"))
    for out, words in (
        (tmp_path, "is not empty; name a new folder for the result"),
        (tmp_path / "x.safetensors", "is a folder, so the result is one"),
    ):
        with pytest.raises(UserError, match=words):
            merge(MergeOptions(models=(folder, folder), method="weighted_sum", out=out))


def test_the_command_says_what_it_wrote(make, tmp_path, capsys):
    words = [make("a"), make("b"), make("c"), "--out", str(tmp_path / "o.safetensors")]
    assert run(["merge", *words, "--alpha", "0.5"]) == 0
    assert "o.safetensors: 11 of 11 tensors merged" in capsys.readouterr().out
    assert run(["merge", *words]) == 2
    assert "exists already" in capsys.readouterr().err

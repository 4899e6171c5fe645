"""LoRAs taken out of two models are the best of their rank, and load wherever LoRAs load."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlfill.errors import UserError
from controlfill.files import read_header
from controlfill.models.lora_extract import decompose
from controlfill.models.merge import merge
from controlfill.models.merge_sources import RECIPE_KEY
from controlfill.options import MergeOptions

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
SHAPES = {
    "conv_in.weight": (6, 4, 3, 3), "time_embedding.linear_1.weight": (12, 5),
    "time_embedding.linear_1.bias": (12,), "down_blocks.0.resnets.0.conv1.weight": (6, 6, 3, 3),
    "mid_block.attentions.0.proj_in.weight": (6, 6, 1, 1),
}  # fmt: skip


def extract(tmp_path, *models, **options):
    """The LoRA taken out of two models, and its path."""
    out = tmp_path / "lora.safetensors"
    out.unlink(missing_ok=True)
    done = merge(MergeOptions(models=models, method="extract_lora", out=out, **options))
    return load_file(out), done


@pytest.fixture
def small(tmp_path):
    """Two small UNets in single files: the tuned one and the one it was made from."""
    files = []
    for seed, name in enumerate(("tuned", "base")):
        rng = torch.Generator().manual_seed(seed)
        state = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_file(state, files[-1])
    return files


def difference(files, module):
    tuned, base = (load_file(file)[f"{module}.weight"] for file in files)
    return (tuned - base).flatten(1)


def product(lora, module):
    down, up = (lora[f"unet.{module}.lora_{side}.weight"] for side in "AB")
    return up.flatten(1) @ down.flatten(1)


MODULES = [name.removesuffix(".weight") for name in SHAPES if name.endswith(".weight")]


def test_full_rank_is_the_whole_difference(small, tmp_path):
    lora, done = extract(tmp_path, *small, rank=100)
    for module in MODULES:
        wanted = difference(small, module)
        torch.testing.assert_close(product(lora, module), wanted, rtol=0, atol=1e-5)
        assert lora[f"unet.{module}.lora_A.weight"].shape[0] == min(wanted.shape)
    assert "100.0% of their difference" in done.what
    assert done.notes == ("1 tensors differ that this LoRA doesn't hold, such as norms and biases",)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_smaller_ranks_miss_just_the_tail_of_singular_values(small, tmp_path, rank):
    lora, done = extract(tmp_path, *small, rank=rank)
    kept = total = 0.0
    for module in MODULES:
        wanted = difference(small, module)
        values = torch.linalg.svdvals(wanted.double())
        missed = torch.linalg.matrix_norm(wanted - product(lora, module))
        assert float(missed) == pytest.approx(float(values[rank:].norm()), rel=1e-5)
        kept, total = kept + float((values[:rank] ** 2).sum()), total + float((values**2).sum())
    assert f"{kept / total:.1%} of their difference" in done.what


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
def test_energy_chooses_the_least_rank_that_keeps_it(small, tmp_path, energy):
    lora, _ = extract(tmp_path, *small, rank=5, energy=energy)
    ranks = {m: lora[f"unet.{m}.lora_A.weight"].shape[0] for m in MODULES}
    for module, rank in ranks.items():
        squares = torch.linalg.svdvals(difference(small, module).double()) ** 2
        shares = (squares.cumsum(0) / squares.sum()).tolist()
        least = next(number for number, share in enumerate(shares, 1) if share >= energy)
        assert rank == min(least, 5)
    told = json.loads(read_header(tmp_path / "lora.safetensors")["lora_adapter_metadata"])
    for module, rank in ranks.items():
        assert told["unet.rank_pattern"].get(module, told["unet.r"]) == rank
        assert told["unet.alpha_pattern"].get(module, told["unet.lora_alpha"]) == rank


def test_a_matrix_of_zeros_has_no_pair_and_noise_no_rank():
    assert decompose(torch.zeros(3, 4), 2) is None
    one = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 8))
    pair = decompose(one, 4)
    assert pair.up.shape == (4, 1)
    torch.testing.assert_close(pair.up @ pair.down, one)


def test_large_convolutions_may_have_another_rank_or_none(small, tmp_path):
    lora, _ = extract(tmp_path, *small, rank=3, conv_rank=1)
    ranks = {m: lora[f"unet.{m}.lora_A.weight"].shape[0] for m in MODULES}
    assert ranks == {MODULES[0]: 1, MODULES[1]: 3, MODULES[2]: 1, MODULES[3]: 3}
    lora, done = extract(tmp_path, *small, rank=3, conv_rank=0, dtype="fp16")
    assert {name.split(".lora_")[0] for name in lora} == {
        f"unet.{MODULES[1]}",
        f"unet.{MODULES[3]}",
    }
    assert {tensor.dtype for tensor in lora.values()} == {torch.float16}
    assert done.notes[0].startswith("3 tensors differ")


def test_what_does_not_differ_is_left_out(small, tmp_path):
    state = load_file(small[1])
    state[f"{MODULES[1]}.weight"] += 1
    save_file(state, tmp_path / "near.safetensors")
    lora, done = extract(tmp_path, str(tmp_path / "near.safetensors"), small[1], rank=2)
    assert {name.split(".lora_")[0] for name in lora} == {f"unet.{MODULES[1]}"}
    assert not done.notes
    with pytest.raises(UserError, match="don't differ where a LoRA could hold it"):
        extract(tmp_path, small[1], small[1])


def test_the_header_tells_the_recipe(small, tmp_path):
    extract(tmp_path, *small, rank=2, layout="kohya")
    told = json.loads(read_header(tmp_path / "lora.safetensors")[RECIPE_KEY])
    assert (told["method"], told["rank"], told["energy"]) == ("extract_lora", 2, 1.0)
    assert [model["name"] for model in told["models"]] == ["tuned.safetensors", "base.safetensors"]


@pytest.mark.parametrize(("family", "layout"), [("sd15", "diffusers"), ("sdxl", "kohya")])
def test_taken_out_and_baked_in_again_is_the_tuned_model(narrow, tmp_path, family, layout):
    from narrow import make_base

    base, tuned = narrow(family), make_base(family, tmp_path / "tuned", seed=7)
    parts = ("unet", "text_encoder")
    extract(tmp_path, str(tuned), str(base), rank=1000, layout=layout, parts=parts)
    lora = tmp_path / "lora.safetensors"
    out = tmp_path / "out"
    merge(MergeOptions(models=(str(base),), method="lora", loras=(lora,), out=out))
    for name in (UNET_FILE, "text_encoder/model.safetensors"):
        wanted, before, found = (load_file(folder / name) for folder in (tuned, base, out))
        for key, tensor in found.items():
            held = key.endswith(".weight") and tensor.ndim > 1 and "embeddings." not in key
            right = wanted[key] if held else before[key]
            torch.testing.assert_close(tensor, right, rtol=0, atol=1e-5)


def test_diffusers_loads_mixed_ranks_at_scale_one(narrow, tmp_path):
    from diffusers import StableDiffusionPipeline
    from narrow import make_base

    base, tuned = narrow("sd15"), make_base("sd15", tmp_path / "tuned", seed=7)
    parts = ("unet", "text_encoder")
    lora, _ = extract(tmp_path, str(tuned), str(base), rank=64, energy=0.9, parts=parts)
    assert len({t.shape[0] for name, t in lora.items() if "lora_A" in name}) > 3
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora()
    file, out = tmp_path / "lora.safetensors", tmp_path / "out"
    merge(MergeOptions(models=(str(base),), method="lora", loras=(file,), out=out))
    for network, file in (("unet", UNET_FILE), ("text_encoder", "text_encoder/model.safetensors")):
        state = getattr(pipe, network).state_dict()
        fused = {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}
        for name, tensor in load_file(out / file).items():
            torch.testing.assert_close(tensor, fused[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        ("tb", {"parts": ("vae",)}, "has no vae"),
        ("tb", {"rank": 0}, "--rank is 0; at least 1 is needed"),
        ("tb", {"energy": 1.5}, "--energy is 1.5; it lies between"),
        ("tn", {}, r"mid_block.attentions.0.proj_in.weight is 6x6x1x1 in .* and not there in"),
        ("tw", {}, "conv_in.weight is 6x4x3x3 in .* and 6x9x3x3 in .*; a LoRA is taken out of"),
        ("xb", {}, "conv_in.weight holds NaN"),
        ("t", {}, "takes two models, the tuned one and the one it was made from; found 1"),
        ("tb", {"alpha": 0.5}, "--alpha is for --method add_difference and weighted_sum"),
        ("tb", {"out": Path("lora")}, "--out lora: the result is a file whose name ends in"),
    ],
)
def test_what_is_refused(small, tmp_path, models, options, words):
    state = load_file(small[1])
    wide, bad = torch.zeros(6, 9, 3, 3), state["conv_in.weight"] * math.nan
    save_file({k: v for k, v in state.items() if "proj_in" not in k}, tmp_path / "n.safetensors")
    save_file(state | {"conv_in.weight": wide}, tmp_path / "w.safetensors")
    save_file(state | {"conv_in.weight": bad}, tmp_path / "x.safetensors")
    paths = {"t": small[0], "b": small[1]} | {n: str(tmp_path / f"{n}.safetensors") for n in "nwx"}
    options = {"out": tmp_path / "lora.safetensors"} | options
    with pytest.raises(UserError, match=words) as caught:
        merge(
            MergeOptions(
                models=tuple(paths[letter] for letter in models), method="extract_lora", **options
            )
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "lora.safetensors").exists()

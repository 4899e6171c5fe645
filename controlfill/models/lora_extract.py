"""What a LoRA can hold of the difference between two checkpoints: its best approximation of a rank.

That is the truncated singular value decomposition (Eckart and Young 1936). It is found by the
eigenvectors of the smaller Gram matrix in float64: U U^T D, with the leading eigenvectors U of
D D^T, needs no division by small singular values.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from controlfill.errors import UserError
from controlfill.models.formats import open_model
from controlfill.models.layout_text import NESTED
from controlfill.models.lora_alphas import ADAPTER_KEY
from controlfill.models.lora_bake import Layer, layer_of
from controlfill.models.lora_names import to_kohya
from controlfill.models.merge_sources import (
    PARTS,
    RECIPE_KEY,
    Merged,
    Report,
    Source,
    cast,
    check_out_file,
    make_recipe,
    open_sources,
    wanted_dtype,
)
from controlfill.models.weights import write_weights
from controlfill.options.models import MergeOptions

# Directions this much weaker than the strongest are rounding errors of float32.
NOISE = 1e-7
# The one layer of a text encoder that lies outside its inner model.
PROJECTION = "text_projection"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two matrices of a layer's LoRA, float32: `up @ down` is its difference.

    `kept` and `energy` are sums of squared singular values, of the pair's and of all.
    """

    up: Tensor
    down: Tensor
    kept: float
    energy: float


def extract_lora(options: MergeOptions, report: Report) -> Merged:
    """Write the LoRA that makes A (nearly) of B. Raises UserError."""
    check_out_file(options.out)
    with open_sources(options.models) as opened:
        tuned, base = (as_diffusers(source) for source in opened)
        places = find_pairs(tuned, base, options)
        pairs: dict[Layer, Pair] = {}
        for number, (layer, name) in enumerate(places.items()):
            with torch.no_grad():
                pair = decompose_weight(tuned.read(name).float() - base.read(name).float(), options)
            if pair:
                # Kept in the format that is written: for a large model that is half of it.
                dtype = wanted_dtype(tuned.dtype(name), options.dtype)
                pairs[layer] = Pair(
                    up=cast(pair.up, dtype, name), down=cast(pair.down, dtype, name),
                    kept=pair.kept, energy=pair.energy,
                )  # fmt: skip
            report("layers", number + 1, len(places))
        if not pairs:
            raise UserError(f"{tuned.path} and {base.path} don't differ where a LoRA could hold it")
        recipe = make_recipe(
            "extract_lora", rank=options.rank, conv_rank=options.conv_rank, energy=options.energy,
            parts=list(options.parts), dtype=options.dtype,
            models=[source.about(options.parts, report) for source in (tuned, base)],
        )  # fmt: skip
        write_pairs(pairs, options, recipe)
        lost = find_lost(tuned, base, options, set(places.values()))
    kept, energy = sum(p.kept for p in pairs.values()), sum(p.energy for p in pairs.values())
    ranks = [pair.down.shape[0] for pair in pairs.values()]
    what = (
        f"a LoRA of {len(pairs)} layers, ranks {min(ranks)} to {max(ranks)}, with "
        f"{kept / energy:.1%} of their difference"
    )
    note = f"{lost} tensors differ that this LoRA doesn't hold, such as norms and biases"
    return Merged(path=options.out, what=what, notes=(note,) if lost else ())


def as_diffusers(source: Source) -> Source:
    """The source with diffusers' names, whatever its layout."""
    return Source(source.path, open_model(source.path).parts) if source.is_original else source


def find_pairs(tuned: Source, base: Source, options: MergeOptions) -> dict[Layer, str]:
    """The weights to decompose, by layer. Raises UserError unless both models are of one kind."""
    found = ((layer_of(tuned, name), name) for name in tuned.names)
    wanted = {
        layer: name for layer, name in found if layer and PARTS[layer.network] in options.parts
    }
    if not wanted:
        raise UserError(f"{tuned.path} has no {' or '.join(options.parts)}")
    for name in wanted.values():
        shapes = [s.shape(name) if name in s else () for s in (tuned, base)]
        if shapes[0] != shapes[1]:
            seen = ["x".join(map(str, shape)) or "not there" for shape in shapes]
            raise UserError(
                f"{name} is {seen[0]} in {tuned.path} and {seen[1]} in {base.path}; a LoRA is "
                "taken out of models of one architecture"
            )
    spatial = options.rank if options.conv_rank is None else options.conv_rank
    return {
        layer: name
        for layer, name in wanted.items()
        if spatial or tuned.shape(name)[2:] in ((), (1, 1))
    }


def find_lost(tuned: Source, base: Source, options: MergeOptions, held: set[str]) -> int:
    """How many tensors differ beside those in the LoRA."""
    names = (
        name
        for name in tuned.names
        if tuned.part(name) in options.parts and name not in held and name in base
    )
    return sum(not torch.equal(tuned.read(name), base.read(name)) for name in names)


def decompose_weight(difference: Tensor, options: MergeOptions) -> Pair | None:
    """The pair of a linear layer's difference (out, in) or a convolution's (out, in, k, k)."""
    kernel = difference.shape[2:]
    spatial = kernel.numel() > 1 and options.conv_rank is not None
    rank = options.conv_rank if spatial else options.rank
    pair = decompose(difference.flatten(1), rank or 0, options.energy)
    if pair is None or not kernel:
        return pair
    up = pair.up.reshape(*pair.up.shape, 1, 1)
    down = pair.down.reshape(pair.down.shape[0], difference.shape[1], *kernel)
    return Pair(up=up, down=down, kept=pair.kept, energy=pair.energy)


def decompose(difference: Tensor, rank: int, energy: float = 1.0) -> Pair | None:
    """The best pair of at most `rank` for a matrix (out, in), or of less that keeps `energy`.

    `energy` is a share of the sum of squared singular values. None for a matrix of zeros.
    """
    matrix = difference.double()
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    total = float(squares.sum())
    if total == 0:
        return None
    rank = min(rank, int((squares > squares[0] * NOISE**2).sum()))
    if energy < 1:
        shares = squares.cumsum(0) / total
        rank = min(rank, int((shares < energy).sum()) + 1)
    leading = vectors[:, :rank]
    # Each takes the root of a singular value, so that both suit half precision.
    root = squares[:rank].pow(0.25)
    if rows <= columns:
        up, down = leading * root, (leading.T @ matrix) / root[:, None]
    else:
        up, down = (matrix @ leading) / root, (leading * root).T
    kept = float(squares[:rank].sum())
    return Pair(up=up.float().contiguous(), down=down.float().contiguous(), kept=kept, energy=total)


def write_pairs(pairs: dict[Layer, Pair], options: MergeOptions, recipe: str) -> None:
    """Write a LoRA file with names of diffusers or kohya; alpha is the rank everywhere."""
    tensors: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        nested = NESTED if layer.network != "unet" and layer.module != PROJECTION else ""
        stem = f"{layer.network}.{nested}{layer.module}"
        tensors[f"{stem}.lora_A.weight"] = pair.down
        tensors[f"{stem}.lora_B.weight"] = pair.up
    about = {RECIPE_KEY: recipe}
    if options.layout == "kohya":
        tensors = to_kohya(tensors)
    else:
        about[ADAPTER_KEY] = json.dumps(adapter_config(pairs))
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_weights(options.out, shapes, tensors.items(), about)


def adapter_config(pairs: dict[Layer, Pair]) -> dict[str, Any]:
    """PEFT's description of a LoRA whose layers differ in rank, as diffusers reads it."""
    config: dict[str, Any] = {}
    for network in dict.fromkeys(layer.network for layer in pairs):
        ranks = {
            layer.module: pair.down.shape[0]
            for layer, pair in pairs.items()
            if layer.network == network
        }
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in ranks.items() if rank != usual}
        values = {
            "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": sorted(ranks),
        }  # fmt: skip
        config |= {f"{network}.{key}": value for key, value in values.items()}
    return config

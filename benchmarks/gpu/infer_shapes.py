"""Denoising steps at full size on a GPU: the loop of diffusers' pipelines and ours, in one call.

    python -m benchmarks.gpu.infer_shapes sd15 --batches 1 8
    python -m benchmarks.gpu.infer_shapes sd15 --tiny          (the same code on a CPU, seconds)

Networks have the real shapes and random weights made on the device; a step is one prediction of
ControlNet and UNet under guidance. The stock loop is the body of diffusers' ControlNet pipelines:
the hint goes through its embedding at every step, twice. All sides are checked to predict the same
before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, shapes
from benchmarks.common import Result
from benchmarks.gpu.device import (
    WARM,
    add_options,
    free,
    name_of,
    peak_gib,
    pick,
    report,
    timed,
)
from controlfill.diffusion.condition import Condition
from controlfill.diffusion.denoiser import ControlDenoiser
from controlfill.diffusion.reuse import embed_hint, share_halves
from controlfill.diffusion.sampler import Denoise, Guidance
from controlfill.models.text import Words

SCALE = 7.5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
SIDES = ("stock", "ours", "ours, compiled", "ours, CUDA graphs")
MODES = {"ours, compiled": "default", "ours, CUDA graphs": "reduce-overhead"}
Step = Callable[[Tensor, Tensor], Tensor]


def stock(networks: shapes.Networks, text: Tensor, hint: Tensor) -> Step:
    """A step as diffusers' pipelines write it."""
    control, unet = networks.told(networks.control), networks.told(networks.unet)
    words, hints = torch.cat([torch.zeros_like(text), text]), torch.cat([hint] * 2)

    def step(latents: Tensor, t: Tensor) -> Tensor:
        twice = torch.cat([latents] * 2)
        down, middle = control(
            twice, t, encoder_hidden_states=words, controlnet_cond=hints,
            conditioning_scale=1.0, return_dict=False,
        )  # fmt: skip
        prediction = unet(
            twice, t, encoder_hidden_states=words, down_block_additional_residuals=down,
            mid_block_additional_residual=middle, return_dict=False,
        )[0]  # fmt: skip
        without, with_ = prediction.chunk(2)
        return without + SCALE * (with_ - without)

    return step


def ours(networks: shapes.Networks, text: Tensor, hint: Tensor, mode: str | None) -> Step:
    """A step of controlfill's sampler, its networks compiled if a `mode` is given."""
    unet, control, family = networks.unet, networks.control, networks.family
    pooled = text.new_zeros(len(text), family.pooled) if family.pooled else None
    words, framing = Words(text, pooled), shapes.framing(family, len(text), text.device)
    condition = Condition(text=words, hint=hint, framing=framing)
    guidance = Guidance(scale=SCALE, without=words.each(torch.zeros_like))
    denoise = Denoise(ControlDenoiser(unet), control, condition, guidance)
    if mode is not None:
        # Without remembered keys and values: CUDA graphs would write over them.
        unet, control = (share_halves(part) for part in (unet, embed_hint(control, condition)[0]))
        denoise.twice = partial(ControlDenoiser(compiled(unet, mode)), compiled(control, mode))
    return denoise


def compiled(network: Any, mode: str) -> Any:
    """`network`, compiled; it keeps its dtype, which a wrapper of torch would hide."""
    made: Any = torch.compile(network, mode=mode)
    made.dtype = network.dtype
    return made


def make_step(networks: shapes.Networks, batch: int, side: str) -> tuple[Step, Tensor]:
    """A side's step and the latents that go into it."""
    family, place = networks.family, networks.unet.device
    dtype, cells = networks.unet.dtype, family.side // 8
    torch.manual_seed(0)
    shape = (batch, shapes.CLIP_TOKENS, family.text)
    text, latents = (
        torch.randn(s, device=place, dtype=dtype) for s in (shape, (batch, 4, cells, cells))
    )
    hint = torch.rand((batch, 3, family.side, family.side), device=place, dtype=dtype)
    step = (
        stock(networks, text, hint)
        if side == "stock"
        else ours(networks, text, hint, MODES.get(side))
    )
    return step, latents


@torch.no_grad()
def measure(networks: shapes.Networks, batch: int, side: str, steps: int) -> tuple[Result, Tensor]:
    """Steps per second and memory of a side, and what it predicts."""
    device = str(networks.unet.device)
    free(device)
    step, latents = make_step(networks, batch, side)
    t = torch.tensor(500, device=latents.device)
    predicted = step(latents, t).clone()
    took = list(timed((step(latents, t) for _ in range(WARM + steps)), device))[WARM:]
    rate = 1 / common.spread(took)["median"]
    found = {"steps_per_second": rate, "images_steps_per_second": batch * rate}
    return {**found, "memory_gib": peak_gib(device)}, predicted


def make_networks(family: str, device: str, dtype: torch.dtype) -> shapes.Networks:
    """All networks frozen and in `dtype`; the ControlNet says something."""
    networks = shapes.make_networks(family, device)
    torch.manual_seed(1)
    shapes.perturb(networks.control)
    for part in (networks.unet, networks.control):
        nn.Module.to(part.eval().requires_grad_(False), dtype=dtype)
    networks.vae = networks.vae.to("cpu")
    return networks


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=["sd15"])
    add_options(parser, [1, 8], 30)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    return parser.parse_args()


def main() -> None:
    """Check, time, report; what was found so far is reported when time is up."""
    options, began = parse(), time.perf_counter()
    device, family = pick(options)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    networks, name = make_networks(family, device, dtype), name_of(device)
    lines = [f"{options.family} on {name}, {dtype}, guidance, steps per second:"]
    figures: Result = {"device": name, "cases": []}
    for batch in options.batches:
        wanted, base = None, None
        for side in options.sides:
            if time.perf_counter() - began > options.seconds:
                lines.append(f"  batch {batch:2} {side:18} left out: time is up")
                continue
            found, predicted = measure(networks, batch, side, options.steps)
            wanted, base = (predicted, found) if wanted is None else (wanted, base)
            apart = float((predicted - wanted).abs().max() / wanted.abs().max())
            equal = apart <= TOLERANCE[dtype]
            figures["cases"].append({"batch": batch, "side": side, "apart": apart, **found})
            ratio = found["steps_per_second"] / base["steps_per_second"] if base else 1.0
            verdict = f"{'equal' if equal else 'NOT EQUAL: void'} ({apart:.0e})"
            lines.append(
                f"  batch {batch:2} {side:18}{found['steps_per_second']:8.2f}  {ratio:5.2f}x "
                f"{found['memory_gib']:6.1f} GiB  {verdict}"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    report(f"infer_shapes_{options.family}", figures, lines, options)


if __name__ == "__main__":
    main()

"""Training steps at full size on a GPU: the stock formula's loop and ours, in one call.

    python -m benchmarks.gpu.train_shapes sd15 --batches 4 16 32
    python -m benchmarks.gpu.train_shapes sdxl --batches 1 4 8
    python -m benchmarks.gpu.train_shapes sd15 --tiny          (the same code on a CPU, seconds)

Networks have the real shapes and random weights made on the device. The stock loop is the body of
diffusers' train_controlnet.py with bf16; ours is controlfill's own loop, with and without latents
known beforehand. Both are checked to compute the same loss before anything is timed. Pictures lie
on the device already: reading them is another benchmark.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common, guard, shapes
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
from controlfill.data.hints import open_spec
from controlfill.diffusion.objective import Objective, step_rng
from controlfill.options import TrainOptions
from controlfill.training.loop import Plan, make_accelerator, train_loop
from controlfill.training.optim import make_optimizer

# TFLOP of one picture's step, latents known; what an encode adds; counted by benchmarks.flops.
WORK = {"sd15": (2.265, 1.117), "sdxl": (20.02, 4.879)}
# Dense bf16 TFLOP/s that data sheets promise, by a part of the device's name.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40": 181.0, "4090": 165.0}
DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time."""

    family: str
    batch: int
    side: str  # "stock", "ours" or "ours, latents known"
    steps: int
    device: str


def stock_steps(networks: shapes.Networks, batch: Any, case: Case) -> Iterator[Tensor]:
    """The loss after each step of the stock loop, as its script writes it."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(**shapes.SCHEDULE)
    control, unet, vae = networks.told(networks.control), networks.told(networks.unet), networks.vae
    optimizer = torch.optim.AdamW(control.parameters(), lr=1e-5, weight_decay=1e-2)
    text = networks.bundle().text
    pixels = batch.image * 2 - 1
    for _ in range(case.steps):
        latents = vae.encode(pixels.to(DTYPE)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents.float(), noise.float(), timesteps).to(DTYPE)
        words = text.encode(batch.prompts).tokens.to(DTYPE)
        with torch.autocast(torch.device(case.device).type, DTYPE):
            down, middle = control(
                noisy, timesteps, encoder_hidden_states=words,
                controlnet_cond=batch.hint.to(DTYPE), return_dict=False,
            )  # fmt: skip
        prediction = unet(
            noisy, timesteps, encoder_hidden_states=words,
            down_block_additional_residuals=[d.to(DTYPE) for d in down],
            mid_block_additional_residual=middle.to(DTYPE), return_dict=False,
        )[0]  # fmt: skip
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the script's default
        loss.item()  # it logs the loss of every step
        yield loss


def our_steps(networks: shapes.Networks, batch: Any, case: Case) -> Iterator[Tensor]:
    """The loss after each step of controlfill's loop."""
    options = TrainOptions(
        image_dir="-", mixed_precision="bf16", batch_size=case.batch, max_steps=case.steps
    )
    accelerator = make_accelerator(options)
    control = networks.control
    objective = Objective(networks.bundle(), open_spec("image"))
    wrapped, optimizer = accelerator.prepare(control, make_optimizer(control, options))
    batches = (batch for _ in range(case.steps))
    plan = Plan(start=0, total=case.steps, options=options)
    for step in train_loop(accelerator, objective, wrapped, optimizer, batches, plan):
        yield step.loss


def with_latents(networks: shapes.Networks, batch: Any) -> Any:
    """`batch` with its posterior, as a latent cache brings it."""
    with torch.no_grad():
        known = networks.vae.encode((batch.image * 2 - 1).to(networks.vae.dtype)).latent_dist
    return replace(batch, moments=torch.stack([known.mean, known.std], dim=1).float())


def measure(case: Case) -> Result:
    """Pictures per second, memory and share of the peak, or that memory was too little."""
    networks = shapes.make_networks(case.family, case.device)
    # Our trainer keeps frozen weights in single precision where it runs on a CPU.
    dtype = torch.float32 if case.side != "stock" and case.device == "cpu" else DTYPE
    for part in (networks.unet, networks.vae):
        nn.Module.to(part, dtype=dtype)
    free(case.device)
    batch = shapes.make_batch(networks.family, case.batch, case.device)
    if case.side == "ours, latents known":
        batch = with_latents(networks, batch)
        networks.vae = networks.vae.to("cpu")
    steps: Callable[..., Iterator[Tensor]] = stock_steps if case.side == "stock" else our_steps
    try:
        took = list(timed(steps(networks, batch, case), case.device))
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    return summarise(case, took[min(WARM, len(took) - 1) :])


def summarise(case: Case, took: list[float]) -> Result:
    """The figures of one case."""
    middle = common.spread(took)
    rate = case.batch / middle["median"]
    memory = peak_gib(case.device)
    found = {"seconds": middle, "images_per_second": rate, "memory_gib": memory}
    name = name_of(case.device)
    peak = next((v for k, v in PEAKS.items() if k in name), None)
    if peak and case.family in WORK:
        step, encode = WORK[case.family]
        done = step + (0 if case.side == "ours, latents known" else encode)
        found["share_of_peak"] = rate * done / peak
    return found


def check_equal(family: str, device: str) -> Result:
    """Our loss and gradient against the stock formula's, in float32 on one picture."""
    networks = shapes.make_networks(family, device)
    control = networks.control
    shapes.perturb(control)
    bundle, batch = networks.bundle(), shapes.make_batch(networks.family, 1, device)
    draws: list[Tensor] = []
    with guard.recorded(draws):
        ours = Objective(bundle, open_spec("image"))(control, batch, step_rng(0, 0, 0)).mean()
    our_gradient = guard.gradients(control, ours)
    told = replace(bundle, unet=networks.told(networks.unet))
    stock = guard.stock_loss(told, networks.told(control), batch, [d.to(device) for d in draws])
    found = guard.differences(ours, stock, our_gradient, guard.gradients(control, stock))
    del networks, control, bundle
    free(device)
    return found


def line_of(case: Case, found: Result, stock: Result | None) -> str:
    """One case for people."""
    start = f"  batch {case.batch:3} {case.side:22}"
    if "out_of_memory" in found:
        return f"{start}out of memory"
    share = f"{found['share_of_peak']:6.1%} of peak" if "share_of_peak" in found else ""
    base = (stock or {}).get("images_per_second")
    against = f"{found['images_per_second'] / base:6.2f}x" if base else ""
    rate, memory = found["images_per_second"], found["memory_gib"]
    return f"{start}{rate:8.2f} images/s {against:8}{memory:6.1f} GiB {share}"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=["sd15", "sdxl"])
    add_options(parser, [4, 16, 32], 15)
    parser.add_argument("--allow_tf32", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Check, time, report; what was found so far is reported when time is up."""
    options, began = parse(), time.perf_counter()
    device, family = pick(options)
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    equal = check_equal(family, device)
    name = name_of(device)
    verdict = "" if equal["equal"] else ": NOT EQUAL, ALL RATIOS BELOW ARE VOID"
    lines = [f"{options.family} on {name}, bf16; loss differs by {equal['loss_error']:.1e}, "
             f"gradient by {equal['gradient_error']:.1e}{verdict}"]  # fmt: skip
    figures: Result = {"device": name, "guard": equal, "cases": []}
    for batch in options.batches:
        stock: Result | None = None
        for side in ("stock", "ours", "ours, latents known"):
            if time.perf_counter() - began > options.seconds:
                lines.append(f"  batch {batch:3} {side:22}left out: time is up")
                continue
            case = Case(family=family, batch=batch, side=side, steps=options.steps, device=device)
            found = measure(case)
            free(device)
            stock = found if side == "stock" else stock
            figures["cases"].append({"batch": batch, "side": side, **found})
            lines.append(line_of(case, found, stock))
            print(lines[-1], file=sys.stderr, flush=True)
    report(f"train_shapes_{options.family}", figures, lines, options)


if __name__ == "__main__":
    main()

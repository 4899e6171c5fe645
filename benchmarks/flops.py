"""Counters that need no clock: operations and saved bytes of a training step.

    python -m benchmarks.flops

Counts the multiply-adds (as two operations) of SD 1.5 at 512 pixels without its weights, through
our own objective, and compares them with the known table; counts the bytes that autograd keeps on a
narrow model, ours against one whose UNet was not frozen; and checks that nothing frozen learns. It
fails when the work of a step has grown, whatever the machine.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, shapes
from benchmarks.common import Result
from controlfill.data.hints import open_spec
from controlfill.diffusion.objective import Objective, step_rng

TERA = 1e12
# Operations of one picture in tera: full-size models of diffusers 0.42 without weights.
SD15_512 = {
    "VAE encode": 1.117, "ControlNet forward": 0.283, "UNet encoder forward": 0.261,
    "UNet decoder forward": 0.542, "text encoder": 0.0133, "step, latents known": 2.265,
    "step": 3.395, "step, UNet not frozen": 4.385,
}  # fmt: skip
TOLERANCE = 0.01


def count(work: Callable[[], Any]) -> float:
    """Operations of `work`, in tera."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / TERA


def count_parts(work: Callable[[], Any]) -> dict[str, float]:
    """Operations of `work` by module, in tera."""
    with FlopCounterMode(display=False) as counter:
        work()
    parts = counter.get_flop_counts()
    return {name: sum(kinds.values()) / TERA for name, kinds in parts.items()}


def count_step(networks: shapes.Networks) -> float:
    """Operations of our whole step without the text encoder: encode, noise, predict, learn."""
    objective = Objective(networks.bundle(), open_spec("image"))
    batch = shapes.make_batch(networks.family, 1, "meta")
    return count(lambda: objective(networks.control, batch, step_rng(0, 0, 0)).mean().backward())


def count_networks(name: str) -> dict[str, float]:
    """Operations of the parts and of the step of family `name`, one picture."""
    networks = shapes.make_networks(name, "meta")
    family = networks.family
    with torch.device("meta"):
        image = torch.rand(1, 3, family.side, family.side)
        latents = torch.rand(1, 4, family.side // 8, family.side // 8)
        told = {"timestep": torch.zeros(1), "encoder_hidden_states": torch.rand(1, 77, family.text)}
    unet, control = networks.told(networks.unet), networks.told(networks.control)
    with torch.no_grad():
        found = {
            "VAE encode": count(lambda: networks.vae.encode(image)),
            "ControlNet forward": count(lambda: control(latents, controlnet_cond=image, **told)),
        }
        parts = count_parts(lambda: unet(latents, **told))
    found["UNet decoder forward"] = sum(v for k, v in parts.items() if is_decoder(k))
    found["UNet encoder forward"] = parts["Global"] - found["UNet decoder forward"]
    step = count_step(networks)
    networks.unet.requires_grad_(True)
    found |= {"step": step, "step, latents known": step - found["VAE encode"]}
    return found | {"step, UNet not frozen": count_step(networks)}


def is_decoder(module: str) -> bool:
    """Whether `module` is a decoder block of the UNet or its last convolution."""
    return bool(re.search(r"\.(up_blocks\.\d+|conv_out)$", module))


def count_text() -> float:
    """Operations of SD 1.5's text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=shapes.CLIP_LAYERS,
        num_attention_heads=12, vocab_size=49408, max_position_embeddings=shapes.CLIP_TOKENS,
    )  # fmt: skip
    with torch.device("meta"), torch.no_grad():
        encoder = CLIPTextModel(config)
        ids = torch.zeros(1, shapes.CLIP_TOKENS, dtype=torch.long)
        return count(lambda: encoder(ids))


@contextmanager
def saved_bytes(skip: list[nn.Module]) -> Iterator[dict[int, int]]:
    """Bytes by storage that autograd keeps meanwhile, weights of `skip` left out."""
    weights = {p.untyped_storage().data_ptr() for m in skip for p in m.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def step_bytes(networks: shapes.Networks, pictures: int) -> int:
    """Bytes that our step keeps for its backward pass."""
    objective = Objective(networks.bundle(), open_spec("image"))
    batch = shapes.make_batch(networks.family, pictures, "cpu")
    networks.control.zero_grad()
    with saved_bytes([networks.unet, networks.vae, networks.control]) as kept:
        loss = objective(networks.control, batch, step_rng(0, 0, 0)).mean()
    loss.backward()
    return sum(kept.values())


def compare_bytes(name: str = "sd15-tiny") -> Result:
    """Bytes kept with the UNet frozen and not, and who learns in each case."""
    torch.manual_seed(0)
    networks = shapes.make_networks(name, "cpu")
    frozen = step_bytes(networks, 2)
    learners = {
        part: sum(p.grad is not None for p in getattr(networks, part).parameters())
        for part in ("unet", "vae", "control")
    }
    networks.unet.requires_grad_(True)
    thawed = step_bytes(networks, 2)
    return {"frozen": frozen, "not_frozen": thawed, "ratio": thawed / frozen, "learners": learners}


def check(counts: dict[str, float], memory: Result) -> list[str]:
    """What is wrong, in words."""
    wrong = [
        f"{name}: {counts[name]:.3f} TFLOP, the table says {want:.3f}"
        for name, want in SD15_512.items()
        if name in counts and abs(counts[name] / want - 1) > TOLERANCE
    ]
    learners = memory["learners"]
    wrong += [f"{p}: {learners[p]} frozen weights got a gradient"
              for p in ("unet", "vae") if learners[p]]  # fmt: skip
    if not learners["control"]:
        wrong.append("the ControlNet got no gradient")
    if memory["ratio"] < 1.2:
        wrong.append(f"freezing the UNet saves too little: {memory['ratio']:.2f}x")
    return wrong


def main() -> int:
    """Count, compare; the exit code is 1 when something has grown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sdxl", action="store_true", help="also count SDXL at 1024 pixels")
    common.add_output(parser)
    options = parser.parse_args()
    counts, memory = count_networks("sd15"), compare_bytes()
    text = counts["text encoder"] = count_text()
    counts["step"] += text
    counts["step, UNet not frozen"] += text
    lines = ["SD 1.5 at 512 pixels, TFLOP of one picture (the known table in brackets):"]
    lines += [f"  {k:24}{v:7.3f}  ({SD15_512[k]})" for k, v in counts.items()]
    figures: Result = {"sd15_512": counts, "saved_bytes": memory}
    if options.sdxl:
        figures["sdxl_1024"] = count_networks("sdxl")
        lines.append("SDXL at 1024 pixels, without its text encoders:")
        lines += [f"  {k:24}{v:7.3f}" for k, v in figures["sdxl_1024"].items()]
    lines.append(
        f"saved for the backward pass on a narrow model: {memory['frozen'] / 2**20:.1f} MiB, with "
        f"the UNet not frozen {memory['ratio']:.2f}x; weights with a gradient: {memory['learners']}"
    )
    wrong = figures["wrong"] = check(counts, memory)
    common.report("flops", figures, [*lines, *wrong], options.output)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

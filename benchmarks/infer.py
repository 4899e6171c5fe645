"""Our sampling against diffusers' ControlNet inpaint pipeline, and our ways among themselves.

    python -m benchmarks.infer

On a narrow SD 1.5 made from a seed, in one process, all sides taking turns. `exact` is the same
computation as diffusers': the pictures must agree, or the ratio is void. `crop` is a small hole in
a large picture; `windows` a large canvas, its windows together or one by one; `large` the memory
and time of ever larger canvases, each in a fresh process.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import common, tiny
from benchmarks.common import Result, peak_bytes, ratio, run_child, spread, times

LARGE = "outpainting by 64 pixels on every side, embedded pair, 1 step:"
WAYS = ("large", "exact", "default", "crop", "windows")
STEPS = 10
SEED = 42
TOLERANCE = 1e-3


def alternate(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each side in each round; a first round warms up and is dropped."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, work in sides.items():
            before = time.process_time()
            work()
            took[name].append(time.process_time() - before)
    return {name: values[1:] for name, values in took.items()}


def load_pair(folder: Path, hint: str = "proportions") -> Any:
    """The narrow base with a ControlNet that says something, as a pipeline of ours.

    `hint` "proportions" gives its hint embedding the share of a step that it has in SD 1.5,
    "diffusers" the widths that `ControlNetModel.from_unet` gives it.
    """
    import torch
    from diffusers import ControlNetModel

    from controlfill.inference.pipeline import load

    base = tiny.make_base(folder / "base")
    pipeline = load(str(base), str(base / "controlnet"), conditioning="masked-image", device="cpu")
    network = pipeline.network
    if hint == "diffusers":
        network = ControlNetModel.from_unet(pipeline.bundle.unet).eval().requires_grad_(False)
    torch.manual_seed(1)
    for layer in [*network.controlnet_down_blocks, network.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.02)
    return replace(pipeline, network=network)


def load_embedded() -> Any:
    """The pair that ships."""
    from controlfill.inference.pipeline import load

    return load(device="cpu")


def make_batch(pipeline: Any, size: int, count: int = 1, hole: int | None = None) -> Any:
    """Pictures that are wholly hole: there both sides compute the very same. Or with a `hole`."""
    import numpy as np

    from controlfill.data.sample import Sample, collate
    from controlfill.data.worlds import HELD_OUT, open_world

    mask, world = np.zeros((size, size), np.uint8), open_world("shapes")
    rim = (size - (hole or size)) // 2
    mask[rim : size - rim, rim : size - rim] = 255
    drawn = [world.draw(HELD_OUT + seed, (size, size)) for seed in range(count)]
    samples = [Sample(image=p.image, mask=mask, prompt=p.truth.caption) for p in drawn]
    return collate(samples, pipeline.spec)


def their_picture(pipeline: Any, batch: Any, steps: int) -> Callable[[], Any]:
    """diffusers' pipeline with DDIM on the same networks, hint and noise, as we would guide it."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionControlNetInpaintPipeline

    from controlfill.diffusion.tiles import draw_noise

    bundle, count = pipeline.bundle, len(batch.prompts)
    vae, unet, network = (
        # As diffusers itself lays weights out.
        copy.deepcopy(part).to(memory_format=torch.contiguous_format)
        for part in (bundle.vae, bundle.unet, pipeline.network)
    )
    theirs: Any = StableDiffusionControlNetInpaintPipeline(
        vae=vae, text_encoder=bundle.text.encoder, tokenizer=bundle.text.tokenizer,
        unet=unet, controlnet=network, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler.from_config(bundle.scheduler_config), requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    side = batch.image.shape[-1] // bundle.factor
    noise = draw_noise(range(SEED, SEED + count), (4, side, side))

    def paint() -> Any:
        return theirs(
            batch.prompts, image=batch.image * 2 - 1, mask_image=batch.mask, strength=1.0,
            control_image=batch.hint, latents=noise.clone(), num_inference_steps=steps,
            guidance_scale=bundle.guidance_scale, negative_prompt=[""] * count, output_type="pt",
            controlnet_conditioning_scale=1.0, generator=torch.Generator().manual_seed(SEED),
        ).images  # fmt: skip

    return paint


def our_picture(pipeline: Any, batch: Any, **options: Any) -> Callable[[], Any]:
    """Ours on the same batch."""
    from controlfill.inference.generate import generate_batch
    from controlfill.options import SampleOptions

    asked = SampleOptions(seed=SEED, **options)
    return lambda: generate_batch(pipeline, batch, asked)


def compare_exact(
    pipeline: Any, size: int, options: argparse.Namespace
) -> tuple[Result, list[str]]:
    """The same steps of the same scheduler on the same picture."""
    from controlfill.inference.openvino import OpenVinoDenoiser

    batch, steps = make_batch(pipeline, size), {"scheduler": "ddim", "num_inference_steps": STEPS}
    same = {**steps, "guidance_end": 1.0}
    theirs, ours = their_picture(pipeline, batch, STEPS), our_picture(pipeline, batch, **same)
    fewer = our_picture(pipeline, batch, **steps, guidance_end=0.6)
    apart = float((theirs() - ours()).abs().max())
    sides = {"diffusers": theirs, "exact": ours, "guidance to 60 %": fewer}
    for precision in options.graphs:
        denoiser = OpenVinoDenoiser(pipeline.bundle.unet, pipeline.network, precision)
        graphs = replace(pipeline, denoiser=denoiser)
        sides[f"OpenVINO, {denoiser.numbers}"] = our_picture(graphs, batch, **same)
    found, lines = told("picture", alternate(sides, options.rounds), "diffusers")
    agree = "equal" if apart <= TOLERANCE else "DIFFERENT: the exact ratio is void"
    lines.append(f"  pictures differ by {apart:.1e} at most (tolerance {TOLERANCE:.0e}): {agree}")
    return {**found, "difference": apart}, lines


def compare_default(pipeline: Any, options: argparse.Namespace) -> tuple[Result, list[str]]:
    """Our defaults beside diffusers' 20 DDIM steps: time, and how far from the solution."""
    figures, lines = {}, []
    for what, hole in (("wholly new", None), ("hole of 48", 48), ("hole of 24", 24)):
        batch = make_batch(pipeline, 64, 16, hole)
        long = {"scheduler": "ddim", "num_inference_steps": 200, "guidance_end": 1.0}
        sides = {"diffusers": their_picture(pipeline, batch, 20),
                 "default": our_picture(pipeline, batch)}  # fmt: skip
        solutions = {"diffusers": their_picture(pipeline, batch, 200)(),
                     "default": our_picture(pipeline, batch, **long)()}  # fmt: skip
        errors = {
            name: (sides[name]() - solution).square().mean(dim=(1, 2, 3)).sqrt()
            for name, solution in solutions.items()
        }
        found, said = told("batch", alternate(sides, options.rounds), "diffusers")
        for name, error in errors.items():
            middle, every = float(error.median()), float(error.square().mean().sqrt())
            found[name] |= {"error": middle, "error_all": every}
            said.append(f"  {name:24}distance to its 200 DDIM steps: median {middle:.4f}, "
                        f"all pictures {every:.4f}")  # fmt: skip
        figures[what] = found
        lines += [f" {what}:", *said]
    return figures, lines


def told(what: str, took: dict[str, list[float]], first: str) -> tuple[Result, list[str]]:
    """Figures and lines of sides that took turns."""
    found = {
        name: {"seconds": spread(values), "speed": ratio(took[first], values)}
        for name, values in took.items()
    }
    lines = [
        f"  {name:24}{f['seconds']['median']:8.2f} s per {what}  {times(f['speed'])}"
        for name, f in found.items()
    ]
    return found, lines


def compare_crop(pipeline: Any, options: argparse.Namespace) -> tuple[Result, list[str]]:
    """A small hole in a large picture: all of it, or only the surroundings of the hole."""
    import numpy as np

    from controlfill.inference.complete import inpaint
    from controlfill.options import HoleOptions

    side = 4 * options.size
    image = tiny.draw_picture(np.random.default_rng(0), (side, side))
    mask = np.zeros((side, side), np.uint8)
    mask[side // 2 : side // 2 + side // 16, side // 3 : side // 3 + side // 12] = 255
    ways = {"whole": {"window_size": 0}, "windows": {}, "only_masked": {"only_masked": True}}

    def ours(way: dict[str, Any]) -> Callable[[], Any]:
        asked = HoleOptions(num_inference_steps=2, guidance_scale=7.5, **way)
        return lambda: inpaint(pipeline, image, mask, asked)

    took = alternate({name: ours(way) for name, way in ways.items()}, min(3, options.rounds))
    found, lines = told("picture", took, "whole")
    return found, lines


def compare_windows(pipeline: Any, options: argparse.Namespace) -> tuple[Result, list[str]]:
    """A canvas of several windows, in batches of them."""
    batch = make_batch(pipeline, 2 * options.window)
    few = {"num_inference_steps": 3, "window_size": options.window}
    sides = {
        f"{n} together": our_picture(pipeline, batch, **few, window_batch=n) for n in (1, 4, 9)
    }
    took = alternate(sides, options.rounds)
    found, lines = told("canvas", took, "1 together")
    return found, lines


def measure_large(options: argparse.Namespace) -> tuple[Result, list[str]]:
    """Peak memory and time of pictures of the embedded pair that grow on all sides, 1 step."""
    found, lines = {}, []
    for width, height in ((512, 384), (1024, 768), (2048, 1536), (4096, 3072)):
        figures = run_child(["benchmarks.infer", "--child", f"{width}x{height}"], options.threads)
        found[f"{width}x{height}"] = figures
        seconds, mega = figures["seconds"], figures["peak"] / 2**20
        lines.append(f"  {width}x{height:<6}{seconds:8.1f} s  peak {mega:6.0f} MiB")
    return found, lines


def child(size: str) -> None:
    """Outpaint one large picture; prints one line of JSON."""
    import numpy as np

    import controlfill

    width, height = (int(side) for side in size.split("x"))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    pipeline, before = controlfill.load(device="cpu"), time.perf_counter()
    sides = dict.fromkeys(("left", "right", "top", "bottom"), 64)
    result = pipeline.outpaint(image, num_inference_steps=1, **sides)
    same = bool((result.image[64:-64, 64:-64] == image).all())
    seconds = time.perf_counter() - before
    print(json.dumps({"seconds": seconds, "peak": peak_bytes(), "known_bytes_equal": same}))


def main() -> None:
    """Compare and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="side of the exact comparison")
    parser.add_argument("--window", type=int, default=128, help="side of the windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=WAYS)
    parser.add_argument(
        "--graphs",
        nargs="*",
        choices=["no", "bf16"],
        help="precisions of OpenVINO beside torch",
        default=["no", "bf16"] if find_spec("openvino") else [],
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    common.add_output(parser)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline warns about its own past
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """All comparisons that were asked for."""
    import torch

    wanted = options.only or WAYS
    figures: Result = {}
    lines: list[str] = []

    def tell(name: str, title: str, found: tuple[Result, list[str]]) -> None:
        figures[name] = found[0]
        lines.extend([title, *found[1]])

    # First the large ones: their children are measured while this process is still small.
    if "large" in wanted:
        tell("large", LARGE, measure_large(options))
    torch.set_num_threads(options.threads)
    if "exact" in wanted:
        for hint in ("proportions", "diffusers"):
            pair = load_pair(folder, hint)
            title = f"exact, {options.size} px, narrow SD 1.5, hint embedding: {hint}:"
            tell(f"exact, {hint}", title, compare_exact(pair, options.size, options))
        tell(
            "exact, embedded",
            "exact, embedded pair, 64 px:",
            compare_exact(load_embedded(), 64, options),
        )
    if "default" in wanted:
        tell(
            "default",
            "defaults, embedded pair, 16 pictures of 64 px:",
            compare_default(load_embedded(), options),
        )
    if "crop" in wanted:
        tell(
            "crop",
            f"a hole of 1/200 in {4 * options.size} px, 2 steps:",
            compare_crop(load_pair(folder), options),
        )
    if "windows" in wanted:
        tell(
            "windows",
            f"9 windows of {options.window}, 3 steps:",
            compare_windows(load_pair(folder), options),
        )
    common.report("infer", figures, lines, options.output)


if __name__ == "__main__":
    main()

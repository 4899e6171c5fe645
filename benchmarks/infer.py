"""Our sampling against diffusers' ControlNet inpaint pipeline, and our ways among themselves.

    python -m benchmarks.infer

On a narrow SD 1.5 made from a seed, in one process, all sides taking turns. `exact` is the same
computation as diffusers': the pictures must agree, or the ratio is void. `crop` is a small hole in
a large picture; `windows` a large canvas, its windows together or one by one; `large` the memory
and time of ever larger canvases, each in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common, tiny
from benchmarks.common import Result, peak_bytes, ratio, run_child, spread, times

STEPS = 10
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


def load_pair(folder: Path) -> Any:
    """The narrow base with its ControlNet, as a pipeline of ours."""
    from controlfill.inference.pipeline import load

    base = tiny.make_base(folder / "base")
    control = str(base / "controlnet")
    return load(str(base), control, conditioning="masked-image", device="cpu")


def make_batch(pipeline: Any, size: int) -> Any:
    """One picture that is wholly hole: there both sides compute the very same."""
    import numpy as np

    from controlfill.data.sample import Sample, collate

    image = tiny.draw_picture(np.random.default_rng(0), (size, size))
    mask = np.full((size, size), 255, np.uint8)
    return collate([Sample(image=image, mask=mask, prompt="a red house")], pipeline.spec)


def their_picture(pipeline: Any, batch: Any, options: Any) -> Callable[[], Any]:
    """diffusers' pipeline on the same networks, hint and noise."""
    from diffusers import DDIMScheduler, StableDiffusionControlNetInpaintPipeline

    from controlfill.diffusion.tiles import draw_noise

    bundle = pipeline.bundle
    theirs: Any = StableDiffusionControlNetInpaintPipeline(
        vae=bundle.vae, text_encoder=bundle.text.encoder, tokenizer=bundle.text.tokenizer,
        unet=bundle.unet, controlnet=pipeline.network, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler.from_config(bundle.scheduler_config), requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    side = batch.image.shape[-1] // bundle.factor
    noise = draw_noise([options.seed], (4, side, side))

    def paint() -> Any:
        return theirs(
            batch.prompts, image=batch.image * 2 - 1, mask_image=batch.mask, strength=1.0,
            control_image=batch.hint, latents=noise.clone(), num_inference_steps=STEPS,
            guidance_scale=options.guidance_scale, negative_prompt=[""], output_type="pt",
        ).images  # fmt: skip

    return paint


def compare_exact(pipeline: Any, options: argparse.Namespace) -> tuple[Result, list[str]]:
    """The same steps of the same scheduler on the same picture."""
    from controlfill.inference.generate import generate_batch
    from controlfill.options import SampleOptions

    batch = make_batch(pipeline, options.size)
    asked = SampleOptions(prompt="a red house", guidance_scale=7.5, num_inference_steps=STEPS)
    theirs = their_picture(pipeline, batch, asked)
    faster = SampleOptions(**{**asked.as_dict(), "guidance_end": 0.6})

    def ours(how: Any) -> Callable[[], Any]:
        return lambda: generate_batch(pipeline, batch, how)

    apart = float((theirs() - ours(asked)()).abs().max())
    took = alternate(
        {"diffusers": theirs, "exact": ours(asked), "guidance to 60 %": ours(faster)},
        options.rounds,
    )
    found, lines = told("picture", took, "diffusers")
    agree = "equal" if apart <= TOLERANCE else "DIFFERENT: the exact ratio is void"
    lines.append(f"  pictures differ by {apart:.1e} at most (tolerance {TOLERANCE:.0e}): {agree}")
    return {**found, "difference": apart}, lines


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
    return found, [f"a hole of 1/200 in {side}x{side}, 2 steps:", *lines]


def compare_windows(pipeline: Any, options: argparse.Namespace) -> tuple[Result, list[str]]:
    """A canvas of several windows, in batches of them."""
    from controlfill.inference.generate import generate_batch
    from controlfill.options import SampleOptions

    batch = make_batch(pipeline, 2 * options.window)

    def ours(count: int) -> Callable[[], Any]:
        asked = SampleOptions(
            num_inference_steps=3, guidance_scale=7.5, window_size=options.window,
            window_batch=count,
        )  # fmt: skip
        return lambda: generate_batch(pipeline, batch, asked)

    took = alternate({f"{n} together": ours(n) for n in (1, 4, 9)}, options.rounds)
    found, lines = told("canvas", took, "1 together")
    return found, [f"9 windows of {options.window}, 3 steps:", *lines]


def measure_large(options: argparse.Namespace) -> tuple[Result, list[str]]:
    """Peak memory and time of pictures of the embedded pair that grow on all sides, 1 step."""
    found, lines = {}, ["outpainting by 64 pixels on every side, embedded pair, 1 step:"]
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
    parser.add_argument("--only", nargs="+", choices=["exact", "crop", "windows", "large"])
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

    wanted = options.only or ["large", "exact", "crop", "windows"]
    figures: Result = {}
    lines: list[str] = []
    # First the large ones: their children are measured while this process is still small.
    if "large" in wanted:
        figures["large"], lines = measure_large(options)
    torch.set_num_threads(options.threads)
    pipeline = load_pair(folder) if set(wanted) - {"large"} else None
    ways = {"exact": compare_exact, "crop": compare_crop, "windows": compare_windows}
    for name in wanted:
        if name in ways:
            figures[name], more = ways[name](pipeline, options)
            lines += [f"{name}:", *more] if name == "exact" else more
    common.report("infer", figures, lines, options.output)


if __name__ == "__main__":
    main()

"""Does add-difference turn a model of its own into one that fills holes? New colours in the world.

    python -m benchmarks.merging

The embedded base, which takes 4 channels, learns four colours that it has never seen, and its
autoencoder's decoder does, as community models bring their own. To this custom model the difference
between its 9-channel sibling and the embedded base is added. Then the sibling, the merged model and
the custom model beside the embedded base's ControlNet fill holes in which objects of new and of old
colours are asked for; the judge of the world says whether they are there. What the custom
autoencoder alone gives back of true pictures is the most that can be reached.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Result
from controlfill.data.sample import Sample, collate
from controlfill.data.worlds import HELD_OUT, WORLDS, Picture, World
from controlfill.evaluation.judge import judge
from controlfill.images import grid, save_image, to_tensor, to_uint8
from controlfill.inference.generate import generate_batch
from controlfill.inference.pipeline import Pipeline, load
from controlfill.models import embedded
from controlfill.models.bundle import Bundle, load_bundle
from controlfill.models.merge import merge
from controlfill.options import MergeOptions, SampleOptions
from recipes.embedded_base import Trainee, encode_world, half, pictures, train_unet

OLD = WORLDS["shapes"]
# Of the world's other colours those that differ most in the latents, which stay what they are.
COLOURS = ("cream", "teal", "black", "maroon")
NEW = World(colours=(*OLD.colours, *COLOURS), shapes=OLD.shapes, grid=OLD.grid)
SIDE, GROUP = 64, 32


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inpaint", default=embedded.INPAINT, help="the 9-channel sibling")
    parser.add_argument("--decoder_steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--learned_from", type=int, default=4000, help="pictures of new colours")
    parser.add_argument("--asked", type=int, default=96, help="holes of each kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, help="where to write what was painted")
    common.add_output(parser)
    return parser.parse_args()


def make_custom(told: argparse.Namespace, folder: Path) -> Path:
    """The embedded base with a UNet that has learned the new colours, as a folder."""
    bundle = load_bundle(embedded.EMBEDDED)
    wanted = argparse.Namespace(
        work_dir=folder, world="new", size=SIDE, pictures=told.learned_from, unet_batch=32,
        device="cpu",
    )  # fmt: skip
    latents = encode_world(bundle.vae, bundle.vae.config["scaling_factor"], wanted, NEW)
    modules = {"text_encoder": bundle.text.encoder, "unet": bundle.unet.train()}
    bundle.unet.requires_grad_(True)
    trainee = Trainee(modules, folder / "unet.pt", told.steps, told.rate)
    train_unet(wanted, NEW, latents, bundle.text.tokenizer, trainee)
    teach_decoder(bundle, folder / "decoder.pt", told.decoder_steps)
    custom = folder / "custom"
    shutil.copytree(embedded.FOLDERS[embedded.EMBEDDED], custom)
    half(bundle.unet, custom / "unet")
    half(bundle.vae, custom / "vae")
    return custom


def teach_decoder(bundle: Bundle, file: Path, steps: int) -> None:
    """Let the decoder give the new colours back; latents stay what they are."""
    decoder = bundle.vae.decoder.train().requires_grad_(True)
    trainee = Trainee({"decoder": decoder}, file, steps, 1e-3)

    def loss_of_step(step: int) -> Tensor:
        images = pictures(NEW, 16 * step, 16, SIDE)
        latents = bundle.encode_image(images, torch.Generator().manual_seed(step))
        error = bundle.decode_freely(latents) * 2 - 1 - images
        return error.square().mean() + 0.1 * error.abs().mean()

    trainee.fit(loss_of_step)
    trainee.use_average()


def draw_holes(colours: Sequence[str], count: int) -> list[tuple[Picture, np.ndarray]]:
    """Held-out pictures whose object has one of `colours`, each with a hole around it."""
    found, seed = [], HELD_OUT
    while len(found) < count:
        picture = NEW.draw(seed, (SIDE, SIDE))
        seed += 1
        if picture.truth.colour in colours:
            left, top, width, height = cv2.boundingRect(picture.object_mask)
            hole = np.zeros((SIDE, SIDE), np.uint8)
            hole[max(0, top - 6) : top + height + 6, max(0, left - 6) : left + width + 6] = 255
            found.append((picture, hole))
    return found


def fill(pipeline: Pipeline, holes: Sequence[tuple[Picture, np.ndarray]], seed: int) -> Result:
    """The shares of holes with the right colour, and with the right object; some pictures."""
    made: list[np.ndarray] = []
    for start in range(0, len(holes), GROUP):
        part = holes[start : start + GROUP]
        samples = [Sample(image=p.image, mask=h, prompt=p.truth.caption) for p, h in part]
        asked = SampleOptions(seed=seed + start)
        made += list(to_uint8(generate_batch(pipeline, collate(samples, pipeline.spec), asked)))
    return shares(made, holes)


def give_back(bundle: Bundle, holes: Sequence[tuple[Picture, np.ndarray]]) -> Result:
    """The same shares of the true pictures after the autoencoder."""
    images = to_tensor(np.stack([picture.image for picture, _ in holes])) * 2 - 1
    with torch.no_grad():
        latents = bundle.encode_image(images, torch.Generator().manual_seed(0))
        return shares(list(to_uint8(bundle.decode_freely(latents).clamp(0, 1))), holes)


def shares(made: Sequence[np.ndarray], holes: Sequence[tuple[Picture, np.ndarray]]) -> Result:
    """What the judge says of pictures `made`, and the first of them below what was known."""
    pairs = zip(made, holes, strict=True)
    verdicts = [judge(picture, hole, p.truth, NEW) for picture, (p, hole) in pairs]
    return {
        "colour": float(np.mean([v.colour for v in verdicts])),
        "object": float(np.mean([v.shape for v in verdicts])),
        "row": grid([[p.image * (h[..., None] == 0) for p, h in holes[:8]], list(made[:8])]),
    }


def compare(told: argparse.Namespace, custom: Path, merged: Path) -> Result:
    """Every model in holes of every kind, `told.seeds` times."""
    models = {
        "sibling": load(told.inpaint, device="cpu"),
        "merged": load(str(merged), device="cpu"),
        "custom + ControlNet": load(str(custom), embedded.EMBEDDED, device="cpu"),
    }
    figures: Result = {}
    for kind, colours in (("new", COLOURS), ("old", OLD.colours)):
        holes = draw_holes(colours, told.asked)
        found = {
            name: [fill(pipeline, holes, 1000 * seed) for seed in range(told.seeds)]
            for name, pipeline in models.items()
        }
        found["autoencoder alone"] = [give_back(models["merged"].bundle, holes)]
        for name, each in found.items():
            figures[f"{name}, {kind} colours"] = {
                key: [one[key] for one in each] for key in ("colour", "object")
            }
            if told.pictures:
                save_image(told.pictures / f"{name}-{kind}.png".replace(" ", ""), each[0]["row"])
    return figures


def main() -> None:
    """Learn, merge, fill."""
    told = parse()
    with tempfile.TemporaryDirectory() as name:
        custom, merged = make_custom(told, Path(name)), Path(name) / "merged"
        sources = (str(custom), told.inpaint, str(embedded.FOLDERS[embedded.EMBEDDED]))
        merge(MergeOptions(models=sources, out=merged))
        figures = compare(told, custom, merged)
    lines = ["shares of holes with the right colour, and with the right object:"]
    lines += [
        f"  {name:32s} {np.mean(f['colour']):.3f}   {np.mean(f['object']):.3f}"
        for name, f in figures.items()
    ]
    common.report("merging", {"options": common.settings(told), **figures}, lines, told.output)


if __name__ == "__main__":
    main()

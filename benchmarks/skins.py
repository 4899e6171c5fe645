"""Do generated skins keep to their layout, and can labels be read? On themes that were held out.

    python -m benchmarks.skins --themes 12

KeyFit of what is painted is shown beside that for the same keys shuffled (the floor), and beside
that of the true picture after the autoencoder (the ceiling). Labels are read by both readers in
what is painted, and where they are rendered on the true skin without text: of those that the
reader reads on plain keys.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Result
from benchmarks.text_loss import paint, through_vae
from controlfill.data.skin_world import SKIN_WORLDS, SkinSource
from controlfill.data.worlds import HELD_OUT
from controlfill.evaluation.adherence import plain_skin, shuffled_layout
from controlfill.evaluation.keyfit import key_fit
from controlfill.evaluation.texts import find_labels, open_ocr, read_labels
from controlfill.images import grid, save_image
from controlfill.inference.pipeline import Pipeline, load
from controlfill.skins.draw import draw_labels
from controlfill.skins.themes import draw_skin, draw_theme

READERS = ("v4", "v6")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="embedded-skins")
    parser.add_argument("--control", default="embedded-skins")
    parser.add_argument("--themes", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="another set of held-out themes")
    parser.add_argument("--seed", type=int, default=0, help="another set of noises")
    parser.add_argument("--pictures", type=Path, help="where to write what was painted")
    common.add_output(parser)
    return parser.parse_args()


def adherence(pipeline: Pipeline, world: str, told: argparse.Namespace) -> Result:
    """KeyFit of each theme: painted, for shuffled keys, after the autoencoder; labels read."""
    source = SkinSource(SKIN_WORLDS[world], HELD_OUT + told.first, told.themes, held_out=True)
    painted, coded = (
        paint(pipeline, source, told.themes, told.seed),
        through_vae(pipeline, source, told.themes),
    )
    found: Result = {"painted": [], "shuffled": [], "autoencoder": []}
    reads: Result = {name: [] for name in READERS}
    for number in range(told.themes):
        layout = source.layout_of(number)
        found["painted"].append(key_fit(painted[number], layout).share)
        found["shuffled"].append(key_fit(painted[number], shuffled_layout(layout, number)).share)
        found["autoencoder"].append(key_fit(coded[number], layout).share)
        labels = [(label.text or "", label.box) for label in source[number].labels]
        for name in READERS if labels else ():
            reads[name].append(read_labels(painted[number], labels, open_ocr(name)).accuracy)
    if told.pictures:
        shown = [[source[n].image, painted[n]] for n in range(min(6, told.themes))]
        save_image(told.pictures / f"{world}.png", grid(shown))
    return {**found, **{f"read by {name}": v for name, v in reads.items() if v}}


def rendered(told: argparse.Namespace) -> Result:
    """Of the labels read on plain keys, the share read on composed skins, by each reader."""
    source = SkinSource(SKIN_WORLDS["skins"], HELD_OUT + told.first, told.themes, held_out=True)
    shares: Result = {name: [] for name in READERS}
    for number in range(told.themes):
        layout = source.layout_of(number)
        theme = draw_theme(HELD_OUT + told.first + number, held_out=True)
        labels = find_labels(layout)
        pictures = [
            draw_labels(p, layout) for p in (plain_skin(layout), draw_skin(theme, layout).bare)
        ]
        for name in READERS:
            clean, skin = (read_labels(p, labels, open_ocr(name)) for p in pictures)
            pairs = zip(clean.wanted, clean.read, skin.read, strict=True)
            shares[name] += [now == w for w, before, now in pairs if before == w]
    return {f"rendered, read by {name}": shares[name] for name in READERS}


@torch.no_grad()
def main() -> None:
    """Both kinds of skins, then rendered labels."""
    told = parse()
    pipeline = load(told.base, told.control, device="cpu")
    worlds = ("skins", "skins-bare")
    figures = {world: adherence(pipeline, world, told) for world in worlds}
    lines = []
    for world, found in figures.items():
        for name, values in found.items():
            few = "  ".join(f"{value:.2f}" for value in sorted(values))
            lines.append(f"{world:11s} {name:12s} {np.mean(values):.3f}   ({few})")
    labels = rendered(told)
    lines += [f"{name:24s} {np.mean(right):.3f} of {len(right)}" for name, right in labels.items()]
    common.report("skins", {"options": common.settings(told), **figures}, lines, told.output)


if __name__ == "__main__":
    main()

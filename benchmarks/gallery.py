"""Real COCO pictures through every filling command at their own sizes, and a page of the results.

    python -m benchmarks.gallery --coco ../shared/data/coco --output_dir outputs/gallery

The page, index.html, is for looking at: the embedded pair knows coloured shapes on patterned
grounds and nothing else. Known pixels are compared byte by byte. COCO's pictures are
under licences of their own and stay here.
"""

from __future__ import annotations

import argparse
import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

Case = tuple[str, Callable[[Any, np.ndarray, np.ndarray], Any]]
FEW = {"num_inference_steps": 10}


def inpaint(**options: Any) -> Callable[..., Any]:
    """A case that fills the mask."""
    return lambda pipe, image, mask: pipe.inpaint(image, mask, **{**FEW, **options})


def outpaint(**options: Any) -> Callable[..., Any]:
    """A case that grows the picture."""
    return lambda pipe, image, mask: pipe.outpaint(image, **{**FEW, **options})


CASES: list[Case] = [
    ("inpaint: an object, its surroundings alone", inpaint(only_masked=True)),
    ("inpaint, --prompt 'plain green background'",
     inpaint(only_masked=True, prompt="plain green background")),
    ("inpaint --feather 8 --match_colours",
     inpaint(only_masked=True, feather=8, match_colours=True)),
    ("inpaint --strength 0.5", inpaint(only_masked=True, strength=0.5)),
    ("inpaint --strength 0 --fill telea", inpaint(strength=0.0, fill="telea")),
    ("inpaint --no-repair_seams", inpaint(only_masked=True, repair_seams=False)),
    ("outpaint --left 24 --bottom 17", outpaint(left=24, bottom=17)),
    ("outpaint --left 24 --bottom 17 --window_order joint",
     outpaint(left=24, bottom=17, window_order="joint")),
    ("outpaint --expand 20% --strength 0 --fill mirror",
     outpaint(expand="20%", strength=0.0, fill="mirror")),
]  # fmt: skip


def open_pictures(coco: Path, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Names, pictures and masks of an object of middle size, as COCO outlines it."""
    from controlfill.data.coco import CocoSource

    folder, annotations = coco / "val2017", coco / "annotations"
    source = CocoSource(folder, annotations / "instances_val2017.json", None, 10**6)
    found = []
    for index in range(len(source)):
        sample = source[index]
        fitting = [m for m in sample.objects() if 0.005 < (m > 0).mean() < 0.1]
        if fitting and len(found) < count:
            mask = cv2.dilate(fitting[0], np.ones((9, 9), np.uint8))
            found.append((sample.name, sample.image, mask))
    return found


def known_error(result: Any, feather: int) -> int:
    """The largest change of a known byte outside the feather."""
    away = cv2.distanceTransform((result.mask == 0).astype(np.uint8), cv2.DIST_L2, 5)
    changed = np.abs(result.image.astype(int) - result.known)[away > feather]
    return int(changed.max(initial=0))


def run_cases(pipeline: Any, coco: Path, count: int, folder: Path) -> list[str]:
    """HTML rows of all cases on `count` pictures, the results in `folder`."""
    rows = []
    for number, (name, image, mask) in enumerate(open_pictures(coco, count)):
        height, width = mask.shape
        rows.append(f"<h2>{html.escape(name)}, {width}x{height}</h2>")
        for place, (title, make) in enumerate(CASES):
            before = time.perf_counter()
            result = make(pipeline, image, mask)
            took, error = time.perf_counter() - before, known_error(result, 8)
            place_of = folder / f"{number}_{place}"
            result.save(place_of)
            line = f"{title}: {took:.1f} s, known pixels changed by {error} at most"
            print(f"{name}: {line}", flush=True)
            rows.append(
                f"<p>{html.escape(line)}</p><img src='{place_of.name}/comparison.png' width='900'>"
            )
    return rows


def main() -> None:
    """Make the page."""
    import controlfill

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--coco", type=Path, required=True, help="holds val2017 and annotations")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gallery"))
    options = parser.parse_args()
    rows = run_cases(controlfill.load(), options.coco, options.count, options.output_dir)
    page = options.output_dir / "index.html"
    page.write_text("<!doctype html><meta charset='utf-8'>" + "\n".join(rows), "utf-8")
    print(f"open {page}")


if __name__ == "__main__":
    main()

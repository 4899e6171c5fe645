"""Two hundred requests at random: each keeps every promise or says in one line why not."""

import cv2
import numpy as np
import pytest

from controlfill import cli
from controlfill.images import open_image, save_image
from controlfill.inference.fill import FILLS

# Sampling so many pixels takes seconds; larger requests are answered by a classical fill.
SAMPLED = 12_000
SIDES = ("left", "right", "top", "bottom")


def draw_side(rng):
    return int(np.exp(rng.uniform(0, np.log(3000))))


def draw_mask(rng, size):
    """A mask of any kind: empty, full, thin, grey, a rectangle, specks, of another size."""
    height, width = size
    mask = np.zeros(size, np.uint8)
    kind = rng.choice(["empty", "full", "thin", "grey", "rectangle", "specks", "other size"])
    if kind == "full":
        mask[:] = 255
    elif kind == "thin":
        mask[rng.integers(height)] = 255
        mask[:, rng.integers(width)] = 255
    elif kind == "grey":
        mask[:] = np.linspace(0, 255, width).astype(np.uint8)
    elif kind == "rectangle":
        top, left = rng.integers(height), rng.integers(width)
        mask[top : top + 1 + height // 3, left : left + 1 + width // 3] = 255
    elif kind == "specks":
        mask[rng.uniform(size=size) < 0.001] = 255
    elif kind == "other size":
        mask = np.full((height + 1, width), 255, np.uint8)
    return mask


def some(rng, odds, words):
    """`words` now and then."""
    return [str(word) for word in words] if rng.uniform() < odds else []


def draw_shared(rng, area):
    """Options of both commands, at their borders and sometimes beyond."""
    words = ["--num_inference_steps", str(rng.choice([1, 2]))]
    if area > SAMPLED:
        fill = rng.choice([name for name in FILLS if name != "biharmonic"])
        words += ["--strength", "0", "--fill", str(fill)]
    else:
        words += some(rng, 0.3, ["--strength", rng.choice([0, 0.01, 0.5, 1, 1.5])])
        words += some(rng, 0.3, ["--fill", rng.choice([*FILLS, "nothing"])])
    words += some(rng, 0.3, ["--guidance_scale", rng.choice([0, 1, 30, -1])])
    words += some(rng, 0.2, ["--controlnet_conditioning_scale", rng.choice([0, 5])])
    words += some(rng, 0.2, ["--control_guidance_start", rng.choice([0.5, 1])])
    words += some(rng, 0.2, ["--guidance_end", rng.choice([0, 0.5])])
    words += some(rng, 0.3, ["--scheduler", rng.choice(["ddpm", "unipc", "dpm++2m", "euler"])])
    words += some(rng, 0.2, ["--seed", rng.choice([0, 2**40])])
    words += some(rng, 0.2, ["--window_size", rng.choice([0, 16, 64, 20])])
    words += some(rng, 0.2, ["--window_overlap", rng.choice([0, 0.9, 1])])
    words += some(rng, 0.2, ["--window_order", rng.choice(["joint", "rows"])])
    words += some(rng, 0.2, ["--match_colours"])
    return words + some(rng, 0.2, ["--no-repair_seams"])


def draw_inpaint(rng, folder):
    size = (draw_side(rng), draw_side(rng))
    image, mask = rng.integers(0, 256, (*size, 3)).astype(np.uint8), draw_mask(rng, size)
    save_image(folder / "i.png", image)
    save_image(folder / "m.png", mask)
    only = size[0] * size[1] > SAMPLED and (mask > 0).sum() < SAMPLED and rng.uniform() < 0.5
    feather = int(rng.choice([0, 0, 0, 1, 7, 500]))
    grow = int(rng.choice([0, 0, 0, -1, 2, -4000, 50]))
    words = draw_shared(rng, 0 if only else size[0] * size[1])
    words += ["--only_masked", "--context", str(rng.choice([1, 1.5]))] if only else []
    words += some(rng, 0.1, ["--separate_holes"])
    words += some(rng, 0.1, ["--context_box", *rng.integers(0, 200, 4)])
    words += ["--feather", str(feather), "--grow_mask", str(grow)]
    soft, invert = (some(rng, 0.2, [word]) for word in ("--soft_mask", "--invert_mask"))
    polarity = some(rng, 0.2, ["--mask_polarity", rng.choice(["black", "transparent"])])
    argv = ["inpaint", str(folder / "i.png"), str(folder / "m.png"), *words]

    def keeps(made):
        grey = 255 - mask if ("black" in polarity) != bool(invert) else mask
        hole = grey > 0 if soft else grey > 127
        away = cv2.distanceTransform((~hole).astype(np.uint8), cv2.DIST_L2, 5)
        known = away > feather + 2 * max(0, grow) + 1 if feather or grow else ~hole
        return made.shape == image.shape and (made[known] == image[known]).all()

    return [*argv, *soft, *invert, *polarity], "inpainted.png", keeps


def draw_outpaint(rng, folder):
    size = (draw_side(rng), draw_side(rng))
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    save_image(folder / "i.png", image)
    sides = {side: int(rng.choice([0, 1, 7, rng.integers(1001)])) for side in SIDES}
    height = size[0] + sides["top"] + sides["bottom"]
    width = size[1] + sides["left"] + sides["right"]
    words = draw_shared(rng, height * width)
    for side, amount in sides.items():
        words += [f"--{side}", str(amount)]
    words += some(rng, 0.05, ["--to", rng.choice(["10x10", "0x5", "big", "4000x4000"])])
    words += some(rng, 0.05, ["--expand", rng.choice(["50%", "0", "x"])])

    def keeps(made):
        top, left = sides["top"], sides["left"]
        inside = made[top : top + size[0], left : left + size[1]]
        return made.shape == (height, width, 3) and (inside == image).all()

    return ["outpaint", str(folder / "i.png"), *words], "outpainted.png", keeps


@pytest.mark.parametrize("seed", range(200))
def test_a_result_or_one_line(seed, pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load_pipeline", lambda options: pipe)
    rng = np.random.default_rng(seed)
    draw = draw_inpaint if seed % 2 else draw_outpaint
    argv, name, keeps = draw(rng, tmp_path)
    code = cli.run([*argv, "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "Traceback" not in said, argv
    assert code in (0, 2), argv
    if code == 0:
        assert keeps(open_image(tmp_path / "out" / name).rgb), argv
    else:
        lines = [line for line in said.splitlines() if line.startswith("controlfill: error: ")]
        assert len(lines) == 1, (argv, said)
        assert not (tmp_path / "out").exists(), argv

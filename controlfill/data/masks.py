"""Masks drawn fresh for every sample: functions of (height, width, rng), uint8 with 255 = generate.

Every kind but "full" is brought into the wanted range of area. All randomness comes from the rng
handed in, so a mask is a function of (seed, epoch, sample) whatever process draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from controlfill.errors import UserError
from controlfill.images import white_where
from controlfill.options import MaskOptions, read_size

Size = tuple[int, int]
# Where objects come from: called only when an object mask is wanted, since they cost time to draw.
Objects = Callable[[], Sequence[np.ndarray]]
TRIES = 8
# What blurred noise above zero covers, give or take.
NOISE_SHARE = 0.5


def no_objects() -> Sequence[np.ndarray]:
    """The objects of a picture about which nothing is known."""
    return ()


def rectangles(size: Size, rng: np.random.Generator) -> np.ndarray:
    """1 to 4 rectangles, each of at most half the picture's area (the GLID recipe)."""
    mask = np.zeros(size, np.uint8)
    for _ in range(rng.integers(1, 5)):
        share = rng.uniform(0.02, 0.5)
        aspect = np.exp(rng.uniform(-1, 1) * min(1.0, -np.log(share)))
        height = min(size[0], max(1, round(size[0] * np.sqrt(share / aspect))))
        width = min(size[1], max(1, round(size[1] * np.sqrt(share * aspect))))
        _box(mask, rng, height, width)
    return mask


def rectangle(size: Size, rng: np.random.Generator) -> np.ndarray:
    """One rectangle of any size and place (the DreamBooth-inpaint recipe's first half)."""
    mask = np.zeros(size, np.uint8)
    _box(mask, rng, *(max(1, round(side * rng.uniform(0.15, 0.9))) for side in size))
    return mask


def ellipse(size: Size, rng: np.random.Generator) -> np.ndarray:
    """One ellipse of any size and place (the DreamBooth-inpaint recipe's second half)."""
    mask = np.zeros(size, np.uint8)
    axes = [max(1, round(side * rng.uniform(0.15, 0.45))) for side in size]
    centre = [int(rng.integers(0, side)) for side in size]
    return _ellipse(mask, centre, axes)


def circle(size: Size, rng: np.random.Generator) -> np.ndarray:
    """One whole circle somewhere inside the picture."""
    radius = max(1, round(min(size) * rng.uniform(0.15, 0.35)))
    centre = [int(rng.integers(radius, max(radius + 1, side - radius))) for side in size]
    return _ellipse(np.zeros(size, np.uint8), centre, [radius, radius])


def strokes(size: Size, rng: np.random.Generator) -> np.ndarray:
    """1 to 5 free-form brush strokes: LaMa's irregular masks, scaled from 256 pixels."""
    mask = np.zeros(size, np.uint8)
    scale = min(size) / 256
    for _ in range(rng.integers(1, 6)):
        point = np.array([rng.integers(side) for side in size], np.float64)
        width = max(1, round(rng.uniform(10, 100) * scale))
        for turn in range(rng.integers(1, 6)):
            angle = rng.uniform(0, 4) + (np.pi if turn % 2 else 0)
            step = (10 + rng.uniform(0, 200)) * scale
            end = point + step * np.array([np.cos(angle), np.sin(angle)])
            end = end.clip(0, np.array(size) - 1)
            cv2.line(mask, _xy(point), _xy(end), 255, width)
            point = end
    return mask


def boxes(size: Size, rng: np.random.Generator) -> np.ndarray:
    """1 to 4 boxes of 30 to 150 pixels, margin 10: LaMa's rectangles, scaled from 256 pixels."""
    mask = np.zeros(size, np.uint8)
    scale = min(size) / 256
    for _ in range(rng.integers(1, 5)):
        sides = [min(side, max(1, round(rng.uniform(30, 150) * scale))) for side in size]
        _box(mask, rng, *sides, margin=round(10 * scale))
    return mask


def noise(size: Size, rng: np.random.Generator, share: float | None = None) -> np.ndarray:
    """Blurred Gaussian noise above zero (GLID: kernel 35, sigma 0.1 to 5, at an eighth of size).

    With `share`, above the level that leaves about that share of the picture white.
    """
    small = [max(4, side // 8) for side in size]
    field = rng.standard_normal(small).astype(np.float32)
    field = cv2.GaussianBlur(field, (35, 35), rng.uniform(0.1, 5), borderType=cv2.BORDER_REFLECT)
    level = 0.0 if share is None else float(np.quantile(field, 1 - share))
    smooth = cv2.resize(field, size[::-1], interpolation=cv2.INTER_CUBIC)
    return white_where(smooth > level)


def border(size: Size, rng: np.random.Generator) -> np.ndarray:
    """What outpainting asks for: strips along a random, not empty set of the four sides."""
    mask = np.zeros(size, np.uint8)
    sides = rng.uniform(size=4) < 0.5
    sides[rng.integers(4)] = True
    depths = [max(1, round(size[i // 2] * rng.uniform(0.05, 0.4))) for i in range(4)]
    top, bottom, left, right = (d if s else 0 for d, s in zip(depths, sides, strict=True))
    mask[:top] = 255
    mask[size[0] - bottom :] = 255
    mask[:, :left] = 255
    mask[:, size[1] - right :] = 255
    return mask


def full(size: Size, rng: np.random.Generator) -> np.ndarray:
    """All of the picture."""
    return np.full(size, 255, np.uint8)


def _ellipse(mask: np.ndarray, centre: Sequence[float], axes: Sequence[float]) -> np.ndarray:
    """Fill an ellipse of (vertical, horizontal) half `axes` about (row, column) `centre`."""
    cv2.ellipse(mask, _xy(np.array(centre)), _xy(np.array(axes)), 0, 0, 360, 255, -1)
    return mask


def _box(
    mask: np.ndarray, rng: np.random.Generator, height: int, width: int, margin: int = 0
) -> None:
    top, left = (
        int(rng.integers(min(margin, side - length), max(margin, side - length - margin) + 1))
        for side, length in zip(mask.shape, (height, width), strict=True)
    )
    mask[top : top + height, left : left + width] = 255


def _xy(point: np.ndarray) -> tuple[int, int]:
    """A (row, column) as the (x, y) that cv2 wants."""
    return round(float(point[1])), round(float(point[0]))


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Grow the white part by `pixels` in every direction."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return cv2.dilate(mask, kernel)


def object_mask(
    objects: Objects,
    size: Size,
    rng: np.random.Generator,
    area: tuple[float, float],
) -> np.ndarray | None:
    """One of `objects`, dilated by 1 to 4 % of the picture; None if none is fitting.

    Objects under 1 % or over `area` are passed over; those in between may be grown later.
    """
    fitting = [o for o in objects() if 0.01 <= area_of(o) <= area[1]]
    if not fitting:
        return None
    chosen = fitting[rng.integers(len(fitting))]
    return dilate(chosen, max(1, round(min(size) * rng.uniform(0.01, 0.04))))


def box_around(mask: np.ndarray, margin: int) -> np.ndarray:
    """The bounding box of the white part, wider by `margin` on each side; tells no outline."""
    left, top, width, height = cv2.boundingRect(mask)
    box = np.zeros_like(mask)
    rows = slice(max(0, top - margin), top + height + margin)
    box[rows, max(0, left - margin) : left + width + margin] = 255
    return box


def area_of(mask: np.ndarray) -> float:
    """Share of the picture that is white."""
    return cv2.countNonZero(mask) / mask.size


def fit_area(mask: np.ndarray, area: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Grow or shrink `mask` along its own outline until its area lies in `area`, exactly."""
    low, high = (share * mask.size for share in area)
    count = cv2.countNonZero(mask)
    if low <= count <= high:
        return mask
    grows = count < low
    if not count:
        mask = mask.copy()
        mask.flat[rng.integers(mask.size)] = 255
    near = _fit_nearly(mask, area, grows)
    if low <= cv2.countNonZero(near) <= high:
        return near
    wanted = max(1, int(np.ceil(low)) if grows else int(np.floor(high)))
    return _fit_exactly(mask, wanted, grows, rng)


def _fit_nearly(mask: np.ndarray, area: tuple[float, float], grows: bool) -> np.ndarray:
    """`mask` grown or shrunk by distances at a quarter of its size: a third of the exact time.

    It aims a tenth inside of the range, since areas at the two sizes differ a little.
    """
    height, width = mask.shape
    quarter = (max(1, width // 4), max(1, height // 4))
    shrunk = cv2.resize(mask, quarter, interpolation=cv2.INTER_AREA)
    part = white_where(shrunk > (0 if grows else 254))
    if not part.any():
        return mask
    rings = outline_rings(part, grows)
    edge, other = area if grows else area[::-1]
    share = 0.9 * edge + 0.1 * other
    rank = min(rings.size - 1, int((share if grows else 1 - share) * rings.size))
    level = float(np.partition(rings, rank, axis=None)[rank])
    smooth = cv2.resize(rings.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    if grows:
        return white_where(smooth <= level) | mask
    return white_where(smooth > level) & mask


def _fit_exactly(
    mask: np.ndarray, wanted: int, grows: bool, rng: np.random.Generator
) -> np.ndarray:
    """`mask` grown or shrunk to `wanted` pixels.

    Pixels are taken ring by ring; within the ring that would go too far, at random.
    """
    rings = outline_rings(mask, grows)
    totals = np.cumsum(np.bincount(rings.ravel()))
    # White is what lies up to a ring outside the outline, or deeper than a ring inside of it.
    ring = int(np.searchsorted(totals, wanted if grows else mask.size - wanted))
    white = rings <= ring if grows else rings > ring
    found = cv2.countNonZero(white.view(np.uint8))
    _trim(white, rings == ring, found - wanted, rng)
    return white_where(white)


def _trim(white: np.ndarray, ring: np.ndarray, surplus: int, rng: np.random.Generator) -> None:
    """Take `surplus` pixels of `ring` out of `white` at random; put them in if it is negative."""
    chosen = rng.choice(np.flatnonzero(ring), abs(surplus), replace=False)
    white.flat[chosen] = surplus < 0


def outline_rings(mask: np.ndarray, outside: bool) -> np.ndarray:
    """Distance to the white part, or with `outside` False to the black one, in eighths of a pixel.

    uint16 (H, W). Beyond the picture all is as at its rim; a full mask ends there.
    """
    beyond = cv2.BORDER_CONSTANT if mask.all() else cv2.BORDER_REPLICATE
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, beyond)
    distance = cv2.distanceTransform(
        255 - framed if outside else framed, cv2.DIST_L2, cv2.DIST_MASK_5
    )
    return np.minimum(distance[1:-1, 1:-1] * 8, 65535).astype(np.uint16)


@dataclass(frozen=True, kw_only=True)
class MaskRecipe:
    """Which kinds of masks are drawn, with which weights, and how large they may be."""

    kinds: tuple[str, ...]
    weights: tuple[float, ...]
    area: tuple[float, float]

    def draw(
        self, size: Size, rng: np.random.Generator, objects: Objects = no_objects
    ) -> np.ndarray:
        """A mask uint8 (H, W) of a kind drawn by weight."""
        weights = np.array(self.weights)
        kind = self.kinds[rng.choice(len(self.kinds), p=weights / weights.sum())]
        return draw_mask(kind, size, rng, self.area, objects)


def draw_mask(
    kind: str,
    size: Size,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.1, 0.3),
    objects: Objects = no_objects,
) -> np.ndarray:
    """A mask of `kind` whose area lies in `area`; only "full" covers all.

    A mixture chooses its kind once, so fitting the area does not shift its odds. A kind
    that misses the range is drawn again a few times and then grown or shrunk to fit. Kinds of
    objects draw strokes instead where no object fits.
    """
    if kind in MIXTURES:
        parts = MIXTURES[kind]
        kind = tuple(parts)[rng.choice(len(parts), p=tuple(parts.values()))]
    if kind in OBJECT_KINDS:
        found = object_mask(objects, size, rng, area)
        if found is not None:
            found = box_around(found, 0) if kind == "object-box" else found
            return fit_area(found, area, rng)
        kind = "strokes"
    mask = full(size, rng)
    if kind == "noise" and not area[0] <= NOISE_SHARE <= area[1]:
        # Above zero it would nearly always cover half of the picture, and be shrunk.
        return fit_area(noise(size, rng, rng.uniform(*area)), area, rng)
    for _ in range(TRIES):
        mask = MASKS[kind](size, rng)
        if kind == "full" or area[0] <= area_of(mask) <= area[1]:
            return mask
    return fit_area(mask, area, rng)


def make_recipe(kinds: Sequence[str], area: tuple[float, float]) -> MaskRecipe:
    """A MaskRecipe from words like "strokes" or "strokes=2". Raises UserError."""
    names, weights = [], []
    for word in kinds:
        name, _, weight = word.partition("=")
        check_kind(name, KINDS)
        names.append(name)
        weights.append(_weight(word, weight))
    if not sum(weights):
        raise UserError("all mask kinds have weight 0, so nothing could be drawn")
    check_area(area)
    return MaskRecipe(kinds=tuple(names), weights=tuple(weights), area=area)


def check_kind(name: str, known: Sequence[str]) -> None:
    """Raise UserError unless `name` is one of the `known` kinds."""
    if name not in known:
        raise UserError(f"no mask kind is called {name!r}; there are: {', '.join(sorted(known))}")


def check_area(area: tuple[float, float]) -> None:
    """Raise UserError unless `area` is a range of shares."""
    if not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"mask area {area[0]} to {area[1]} is no range within 0 to 1")


def _weight(word: str, weight: str) -> float:
    try:
        value = float(weight or 1)
    except ValueError as error:
        raise UserError(f"mask kind {word!r}: the weight after = must be a number") from error
    if value < 0:
        raise UserError(f"mask kind {word!r}: a weight is never negative")
    return value


def make_test_mask(options: MaskOptions) -> np.ndarray:
    """The mask that `controlfill mask` writes. Raises UserError for an unknown kind or size."""
    height, width = read_size("size", options.size)
    if options.kind == "text":
        return text_mask(options.text, (height, width))
    check_kind(options.kind, ("text", *MASKS, *MIXTURES))
    check_area(options.area)
    return draw_mask(
        options.kind, (height, width), np.random.default_rng(options.seed), options.area
    )


def text_mask(text: str, size: Size) -> np.ndarray:
    """`text` in white, as large as fits into nine tenths of the picture."""
    font = ImageFont.load_default(100)
    left, top, right, bottom = font.getbbox(text)
    scale = 0.9 * min(size[1] / max(1, right - left), size[0] / max(1, bottom - top))
    font = ImageFont.load_default(max(1, int(100 * scale)))
    picture = Image.new("L", (size[1], size[0]), 0)
    place = (size[1] / 2, size[0] / 2)
    ImageDraw.Draw(picture).text(place, text, fill=255, font=font, anchor="mm")
    return white_where(np.asarray(picture) > 127)


MASKS: dict[str, Callable[[Size, np.random.Generator], np.ndarray]] = {
    "rectangles": rectangles,
    "rectangle": rectangle,
    "ellipse": ellipse,
    "circle": circle,
    "strokes": strokes,
    "boxes": boxes,
    "noise": noise,
    "border": border,
    "full": full,
}
# Published recipes: LaMa's, GLID's, and that of DreamBooth inpainting.
MIXTURES = {
    "lama": {"strokes": 0.5, "boxes": 0.5},
    "glid": {"full": 0.2, "noise": 0.4, "rectangles": 0.4},
    "dreambooth": {"rectangle": 0.5, "ellipse": 0.5},
}
# All that users may name.
OBJECT_KINDS = ("object", "object-box")
KINDS = (*OBJECT_KINDS, *MASKS, *MIXTURES)

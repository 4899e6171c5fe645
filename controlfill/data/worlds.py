"""Procedural pictures with exact truth: coloured shapes on patterned grounds, with captions.

A world turns an integer into a picture, so it is unlimited, needs no download, and two people who
name the same seed look at the same picture. Seeds below `HELD_OUT` are for training, seeds from
`HELD_OUT` on are for measuring.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np

from controlfill.errors import UserError
from controlfill.images import white_where

HELD_OUT = 2**31

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (252, 222, 70),
    "green": (46, 160, 80),
    "sky": (90, 180, 240),
    "navy": (24, 36, 104),
    "purple": (150, 60, 175),
    "white": (250, 250, 250),
    "black": (18, 18, 20),
    "grey": (128, 130, 134),
    "pink": (250, 150, 190),
    "brown": (120, 72, 36),
    "teal": (10, 120, 125),
    "lime": (170, 220, 50),
    "cream": (245, 228, 190),
    "maroon": (110, 15, 45),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
GROUNDS = ("plain", "striped", "checkered", "dotted", "graded")
PATTERNED = ("striped", "checkered", "dotted")
SUPERSAMPLE = 4


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is in one picture, in the words of its caption; a `bare` one shows no object."""

    colour: str
    shape: str
    ground: str
    ground_colours: tuple[str, ...]

    bare: bool = False

    @property
    def caption(self) -> str:
        """The caption, such as "orange star on striped navy and white background"."""
        return self.scenery if self.bare else f"{self.colour} {self.shape} on {self.scenery}"

    @property
    def scenery(self) -> str:
        """The words of the ground alone, such as "striped navy and white background"."""
        return f"{self.ground} {' and '.join(self.ground_colours)} background"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawn picture: `image` uint8 (H, W, 3), `object_mask` uint8 (H, W) 255 inside, truth."""

    image: np.ndarray
    object_mask: np.ndarray
    truth: Truth


@dataclass(frozen=True, kw_only=True)
class World:
    """The vocabulary of a procedural world; `draw` turns a seed into a picture.

    With `grid`, places, sizes and periods are multiples of that many 64ths of the picture and
    nothing is turned: a world that a small network can learn in an hour. 0 leaves them free.
    A share of the pictures is `bare`: ground without an object.
    """

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    grounds: tuple[str, ...] = GROUNDS
    grid: int = 0
    bare: float = 0.0

    def words(self) -> list[str]:
        """Every word a caption of this world can hold."""
        return [*self.colours, *self.shapes, *self.grounds, "on", "and", "background"]

    def truths(self) -> Iterator[Truth]:
        """Every caption's truth once, for tests that must see all of them."""
        for colour, shape, ground in product(self.colours, self.shapes, self.grounds):
            rest = [c for c in self.colours if c != colour]
            count = 1 if ground == "plain" else 2
            yield Truth(
                colour=colour, shape=shape, ground=ground, ground_colours=tuple(rest[:count])
            )

    def draw(self, seed: int, size: tuple[int, int] = (64, 64), margin: int = 0) -> Picture:
        """The picture of `seed` at `size` (height, width); the same seed draws the same picture.

        With a `margin` the same picture in the middle of so many more pixels on each side, on
        which its ground goes on: the truth of outpainting.
        """
        rng = np.random.default_rng(seed)
        colour, *ground = (str(c) for c in rng.choice(self.colours, 3, replace=False))
        kind = str(rng.choice(self.grounds))
        truth = Truth(
            colour=colour,
            shape=str(rng.choice(self.shapes)),
            ground=kind,
            ground_colours=tuple(ground[: 1 if kind == "plain" else 2]),
            # A seed of its own, so that worlds with and without bare pictures agree in the rest.
            bare=bool(self.bare) and np.random.default_rng((seed, 2)).uniform() < self.bare,
        )
        return paint(truth, Chance(rng, self.grid), size, margin=margin)


class Chance:
    """An rng whose lengths are, with a `grid`, whole multiples of it."""

    def __init__(self, rng: np.random.Generator, grid: int) -> None:
        self.rng, self.grid = rng, grid

    def length(self, low: float, high: float) -> float:
        """A length in [low, high], in 64ths of the picture."""
        if not self.grid:
            return float(self.rng.uniform(low, high))
        first, last = int(np.ceil(low / self.grid)), int(np.floor(high / self.grid))
        return float(self.grid * self.rng.integers(first, max(first, last) + 1))

    def turn(self, most: float) -> float:
        """An angle of at most `most` either way."""
        return 0.0 if self.grid else float(self.rng.uniform(-most, most))

    def angle(self, steps: int) -> float:
        """One of `steps` directions in half a turn; only upright ones on a grid."""
        return (
            float(self.rng.integers(2 if self.grid else steps))
            * np.pi
            / (2 if self.grid else steps)
        )


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The fine cells a picture is painted on: `size` (H, W) of them, `unit` to a 64th of it.

    `margin` cells more on each side belong to what lies beyond the picture.
    """

    size: tuple[int, int]
    unit: float
    margin: int = 0

    @property
    def whole(self) -> tuple[int, int]:
        """The size with its margins."""
        height, width = (side + 2 * self.margin for side in self.size)
        return height, width

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Row (H, 1) and column (1, W) of each cell's middle, from the picture's own corner."""
        rows, columns = (
            np.arange(-self.margin, side + self.margin, dtype=np.float32) + 0.5
            for side in self.size
        )
        return rows[:, None], columns[None, :]


def paint(
    truth: Truth,
    chance: Chance,
    size: tuple[int, int],
    palette: dict[str, tuple[int, int, int]] = COLOURS,
    margin: int = 0,
) -> Picture:
    """Paint `truth` with a pose and a pattern drawn by `chance`, anti-aliased, at (H, W).

    `margin` pixels of ground are added on each side.
    """
    height, width = (side * SUPERSAMPLE for side in size)
    unit = min(size) / 64 * SUPERSAMPLE
    plane = Plane(size=(height, width), unit=unit, margin=margin * SUPERSAMPLE)
    share = _blend(GROUND_PAINTERS[truth.ground](chance, plane))
    first, second = (np.array(palette[c], np.float32) for c in _pair(truth.ground_colours))
    ground = first + (second - first) * share[..., None]
    inside = np.zeros_like(share) if truth.bare else _blend(_object(truth.shape, chance, plane))
    image = ground + (np.array(palette[truth.colour], np.float32) - ground) * inside[..., None]
    return Picture(
        image=np.rint(image).clip(0, 255).astype(np.uint8),
        object_mask=white_where(inside > 0),
        truth=truth,
    )


def _pair(colours: tuple[str, ...]) -> tuple[str, str]:
    return colours[0], colours[-1]


def _blend(fine: np.ndarray) -> np.ndarray:
    """Average a supersampled plane down to pixels."""
    size = (fine.shape[1] // SUPERSAMPLE, fine.shape[0] // SUPERSAMPLE)
    return cv2.resize(fine.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def _plain(chance: Chance, plane: Plane) -> np.ndarray:
    return np.zeros(plane.whole, np.float32)


def _striped(chance: Chance, plane: Plane) -> np.ndarray:
    rows, columns = plane.grid()
    angle = chance.angle(4)
    period = chance.length(11, 18) * plane.unit
    along = rows * np.float32(np.sin(angle)) + columns * np.float32(np.cos(angle))
    return ((along + chance.length(0, 18) * plane.unit) / period) % 1 < 0.5


def _checkered(chance: Chance, plane: Plane) -> np.ndarray:
    rows, columns = plane.grid()
    cell = chance.length(7, 12) * plane.unit
    down, right = (chance.length(0, 24) * plane.unit for _ in range(2))
    return (np.floor((rows + down) / cell) + np.floor((columns + right) / cell)) % 2 == 0


def _dotted(chance: Chance, plane: Plane) -> np.ndarray:
    rows, columns = plane.grid()
    spacing = chance.length(12, 18) * plane.unit
    down, right = (chance.length(0, 18) * plane.unit for _ in range(2))
    y = ((rows + down) / spacing) % 1 - 0.5
    x = ((columns + right) / spacing) % 1 - 0.5
    return y**2 + x**2 < 0.3**2


def _graded(chance: Chance, plane: Plane) -> np.ndarray:
    rows, columns = plane.grid()
    (height, width), margin = plane.size, plane.margin
    angle = chance.rng.integers(8) * np.pi / 4
    along = rows / height * np.float32(np.sin(angle)) + columns / width * np.float32(np.cos(angle))
    own = along[margin : margin + height, margin : margin + width]
    return ((along - own.min()) / (own.max() - own.min())).clip(0, 1)


def _object(shape: str, chance: Chance, plane: Plane) -> np.ndarray:
    """A filled shape (0 or 1) of random place, size and turn, wholly inside the picture."""
    size = chance.length(14, 20)
    reach = size * 1.1 + 1
    centre = [
        chance.length(reach, side / plane.unit - reach) * plane.unit + plane.margin
        for side in plane.size
    ]
    turn = chance.turn(np.pi / 9)
    inside = np.zeros(plane.whole, np.uint8)
    for ring, value in outlines(shape, size * plane.unit, turn):
        points = np.rint(ring[:, ::-1] + centre[::-1]).astype(np.int32)
        cv2.fillPoly(inside, [points], value)
    return inside


def outlines(shape: str, radius: float, turn: float) -> list[tuple[np.ndarray, int]]:
    """Polygons (N, 2) in (y, x) about the origin with their fill value (1 = solid, 0 = hole)."""
    if shape == "ring":
        return [(_polygon(48, radius, turn), 1), (_polygon(48, radius * 0.55, turn), 0)]
    return [(OUTLINES[shape](radius, turn), 1)]


def _polygon(corners: int, radius: float, turn: float) -> np.ndarray:
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([-np.cos(angles), np.sin(angles)], axis=1)


def _star(radius: float, turn: float) -> np.ndarray:
    points = _polygon(10, radius * 1.1, turn)
    points[1::2] *= 0.45
    return points


def _cross(radius: float, turn: float) -> np.ndarray:
    a, b = 0.34, 1.0
    corners = [(-b, -a), (-b, a), (-a, a), (-a, b), (a, b), (a, a)]
    points = np.array(corners + [(-y, -x) for y, x in corners], np.float64) * radius * 0.9
    turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ turning.T


OUTLINES = {
    "circle": lambda radius, turn: _polygon(48, radius * 0.9, turn),
    "square": lambda radius, turn: _polygon(4, radius * 1.0607, turn + np.pi / 4),
    "triangle": lambda radius, turn: _polygon(3, radius * 1.1, turn),
    "star": _star,
    "cross": _cross,
}
GROUND_PAINTERS = {
    "plain": _plain,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
    "graded": _graded,
}
WORLDS = {
    "shapes": World(colours=tuple(COLOURS)[:8], shapes=SHAPES[:4], grid=4),
    "shapes-bare": World(colours=tuple(COLOURS)[:8], shapes=SHAPES[:4], grid=4, bare=0.3),
    "shapes-full": World(colours=tuple(COLOURS), shapes=SHAPES),
}


def open_world(name: str) -> World:
    """The world called `name`, one of `WORLDS`."""
    if name not in WORLDS:
        raise UserError(f"no world is called {name!r}; there are: {', '.join(WORLDS)}")
    return WORLDS[name]

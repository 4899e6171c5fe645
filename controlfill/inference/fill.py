"""Classical fills: what a hole looks like without any learning.

Measures to beat, and what sampling can start from instead of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from controlfill.errors import UserError

# Radius and number of the box blurs.
BLURS = ((512, 2), (256, 2), (128, 4), (64, 4), (33, 8), (15, 8), (5, 16), (3, 16))

# Tiles of a mosaic along the longer side.
TILES = 24


def telea(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fast marching (Telea 2004), as cv2 has it."""
    return cv2.inpaint(image, mask, 3, cv2.INPAINT_TELEA)


def navier_stokes(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fluid dynamics (Bertalmio et al. 2001), as cv2 has it."""
    return cv2.inpaint(image, mask, 3, cv2.INPAINT_NS)


def biharmonic(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Biharmonic equations (Damelin and Hoang 2018), as scikit-image has it."""
    from skimage.restoration import inpaint_biharmonic

    filled = inpaint_biharmonic(image, mask > 0, channel_axis=-1)
    return np.rint(filled.clip(0, 1) * 255).astype(np.uint8)


def edge(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The nearest known pixel."""
    return image[nearest_known(mask)]


def mirror(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The known picture reflected at the hole's rim; the rim itself where that ends."""
    near = nearest_known(mask)
    own = np.indices(mask.shape)
    across = [
        np.clip(2 * there - here, 0, side - 1)
        for there, here, side in zip(near, own, mask.shape, strict=True)
    ]
    known = mask[across[0], across[1]] == 0
    return image[tuple(np.where(known, a, n) for a, n in zip(across, near, strict=True))]


def mosaic(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The reflected picture in square tiles of one colour each (after "mosaic outpaint")."""
    height, width = mask.shape
    side = max(1, round(max(height, width) / TILES))
    across, down = -(-width // side), -(-height // side)
    frame = ((0, down * side - height), (0, across * side - width), (0, 0))
    whole = np.pad(mirror(image, mask), frame, mode="edge")
    tiles = cv2.resize(whole, (across, down), interpolation=cv2.INTER_AREA)
    return tiles.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]


def nearest_known(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the known pixel that is nearest to each pixel, each (H, W)."""
    hole = (mask > 0).astype(np.uint8)
    _, found = cv2.distanceTransformWithLabels(
        hole, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    labels = found.astype(np.int64)
    rows, columns = np.nonzero(hole == 0)
    places = np.zeros((int(labels.max()) + 1, 2), np.int64)
    places[labels[rows, columns]] = np.stack([rows, columns], axis=1)
    return places[labels, 0], places[labels, 1]


def mean(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean colour of what is known."""
    colour = image[mask == 0].mean(axis=0)
    return np.broadcast_to(np.rint(colour).astype(np.uint8), image.shape)


def blur(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Box blurs from wide to narrow, what is known put back after each (Fooocus's pyramid)."""
    hole = (mask > 0)[..., None]
    known = image.astype(np.float32)
    filled = np.where(hole, mean(image, mask), known).astype(np.float32)
    for radius, times in BLURS:
        side = 2 * min(radius, max(mask.shape)) + 1
        for _ in range(times):
            blurred = cv2.blur(filled, (side, side), borderType=cv2.BORDER_REPLICATE)
            filled = np.where(hole, blurred, known)
    return np.rint(filled).astype(np.uint8)


def noise(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Noise with the spectrum and the colours of what is known (after "outpainting mk2").

    The same picture always gets the same noise.
    """
    rng, known = np.random.default_rng(0), mask == 0
    grey, coloured = rng.uniform(size=(*mask.shape, 1)), rng.uniform(size=image.shape)
    white = np.fft.fft2(0.95 * grey + 0.05 * coloured, axes=(0, 1))
    seen = np.where(known[..., None], image, image[known].mean(axis=0))
    shaped = np.fft.ifft2(white * np.abs(np.fft.fft2(seen, axes=(0, 1))), axes=(0, 1)).real
    filled = image.copy()
    for channel in range(3):
        # The rank of a value among those of the hole is its rank among the known colours too.
        order = shaped[~known][:, channel].argsort().argsort()
        ranks = (order + 0.5) / max(1, len(order))
        colours = np.sort(image[known][:, channel])
        places = np.arange(len(colours))
        filled[~known, channel] = np.interp(ranks * (len(colours) - 1), places, colours)
    return filled


def fill_with(name: str, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill the white part of `mask` (H, W) in uint8 `image` (H, W, 3) by the fill called `name`.

    A picture without known pixels comes back grey: there is nothing to continue.
    """
    if (mask > 0).all():
        return np.full_like(image, 128)
    filled = FILLS[name](image, mask)
    return np.where(mask[..., None] > 0, filled, image)


def check_fills(names: Sequence[str]) -> None:
    """Raise UserError when one of `names` is no fill."""
    for name in names:
        if name not in FILLS:
            raise UserError(f"no fill is called {name!r}; there are: {', '.join(FILLS)}")


FILLS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "telea": telea,
    "navier-stokes": navier_stokes,
    "biharmonic": biharmonic,
    "edge": edge,
    "mirror": mirror,
    "mosaic": mosaic,
    "mean": mean,
    "blur": blur,
    "noise": noise,
}

"""Classical fills: what a hole looks like without any learning. Measures to beat, and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from controlfill.errors import UserError


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
}

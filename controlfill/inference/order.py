"""The order of windows: large holes are filled one window after the other, from what is known."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from controlfill.diffusion.tiles import Place, Windows, starts


def outward(hole: np.ndarray, windows: Windows) -> Iterator[Place]:
    """The windows (top, left) that fill a `hole` (H, W), bool: always that of which most is known.

    Of equals the one that knew most at the beginning, so a picture grows on all sides alike.
    """
    places = windows_around(hole, windows)
    corners, left = np.array(places), hole.copy()
    at_first = np.array([np.count_nonzero(windows.part(left, place)) for place in places])
    open_ = at_first.copy()
    while open_.any():
        waiting = np.flatnonzero(open_)
        best = waiting[np.lexsort((at_first[waiting], open_[waiting]))[0]]
        yield places[best]
        windows.part(left, places[best])[:] = False
        apart = np.abs(corners - corners[best])
        for number in np.flatnonzero((apart < windows.size).all(axis=1)):
            open_[number] = np.count_nonzero(windows.part(left, places[number]))


def by_rows(hole: np.ndarray, windows: Windows) -> Iterator[Place]:
    """The windows that see a `hole` (H, W), bool, row by row, as glid-3-xl-stable has them."""
    yield from windows.seeing(hole)


def windows_around(hole: np.ndarray, windows: Windows) -> list[Place]:
    """Places of windows that cover the canvas, laid out from what is known to all sides."""
    axes = []
    for axis, (length, window) in enumerate(zip(windows.canvas, windows.size, strict=True)):
        known = np.flatnonzero(~hole.all(axis=1 - axis))
        axes.append(places_along(length, window, windows.overlap, (known[0], known[-1] + 1)))
    return list(product(*axes))


def places_along(length: int, window: int, overlap: int, known: tuple[int, int]) -> list[int]:
    """Where windows begin on one axis: over the `known` part, and from it to both ends.

    Neighbours share `overlap` or more.
    """
    if length <= window:
        return [0]
    first, last = (int(end) for end in known)
    if last - first < window:
        middle = (first + last - window) // 2
        first = min(max(0, middle), length - window)
    inner = [first + at for at in starts(max(last - first, window), window, overlap)]
    stride, end = window - overlap, length - window
    before = range(inner[0] - stride, -stride, -stride)
    after = range(inner[-1] + stride, end + stride, stride)
    return sorted({*inner, *(max(0, at) for at in before), *(min(end, at) for at in after)})


ORDERS = {"outward": outward, "rows": by_rows}

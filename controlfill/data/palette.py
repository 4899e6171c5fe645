"""Captions from measured pixels: the colours of keys and ground, brightness, contrast, texture."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from controlfill.images import within
from controlfill.skins.layout import Box, Layout

# Words for hues up to an angle of HSV: those of dark colours, of most, and of pale ones.
HUES = (
    (15, ("maroon", "red", "pastel pink")),
    (43, ("brown", "orange", "peach")),
    (69, ("olive", "yellow", "cream")),
    (156, ("dark green", "green", "mint")),
    (191, ("dark teal", "teal", "pale turquoise")),
    (253, ("navy", "blue", "sky blue")),
    (289, ("dark violet", "violet", "lavender")),
    (345, ("plum", "pink", "pastel pink")),
    (360, ("maroon", "red", "pastel pink")),
)
# Words for greys up to a lightness L of CIE Lab, which goes from 0 to 100.
GREYS = ((18, "black"), (40, "charcoal"), (62, "grey"), (88, "light grey"), (101, "white"))
# Chroma of Lab below which a colour is a grey, or only tinged with its hue.
GREY, TINGED = 6, 13
# Of a colour called dark: the most value of HSV, which is 1 for all pure colours.
DARK = 0.5
# Of a colour called pale: the least lightness and the most chroma.
PALE = (72, 42)
# Mean lightness up to which a skin is dark, and from which it is bright.
BRIGHTNESS = (40, 66)
# Difference in lightness up to which contrast is soft, and from which it is bold.
CONTRAST = (11, 30)
# Deviation of lightness that makes a texture, and rise over a ground that makes a gradient.
ROUGH, RISE = 0.9, 5.0
# Share of a texture's gradients along one direction that makes stripes of it.
ALONG = 0.55
# Share of a texture's deviation between neighbours below which it is all soft blotches.
FINE = 0.3
# Side in pixels at which pictures are looked at, and at which their colours are clustered.
SIDE, COARSE = 256, 96
CLUSTERS = 5
# Share of the rim from which a cluster belongs to the ground.
RIM = 0.05


@dataclass(frozen=True, kw_only=True)
class Areas:
    """Where keys and the ground between them are, bool (H, W) each; neither has the edges."""

    keys: np.ndarray
    ground: np.ndarray


def describe(image: np.ndarray, layout: Layout | None = None) -> str:
    """Words for a skin uint8 (H, W, 3), such as "pastel pink keys on striped navy ground, dark".

    Its `layout` tells where keys are; without one they are what the rim of the picture is not.
    """
    small = within(image, SIDE)
    areas = laid_out(small.shape[:2], layout) if layout else clustered(small)
    lab = as_lab(small)
    key, ground = (np.median(small[area], axis=0) for area in (areas.keys, areas.ground))
    words = f"{name_colour(key)} keys on {texture(lab[..., 0], areas.ground)}"
    words += f" {name_colour(ground)} ground"
    apart = abs(float(np.median(lab[areas.keys][:, 0]) - np.median(lab[areas.ground][:, 0])))
    more = (
        between(float(lab[..., 0].mean()), BRIGHTNESS, ("dark", "", "bright")),
        between(apart, CONTRAST, ("soft contrast", "", "bold contrast")),
    )
    return ", ".join([words, *filter(None, more)])


def between(value: float, bounds: tuple[float, float], words: tuple[str, str, str]) -> str:
    """The first of `words` below the bounds, the last above them."""
    return words[0] if value < bounds[0] else words[2] if value > bounds[1] else words[1]


def as_lab(image: np.ndarray) -> np.ndarray:
    """CIE Lab as floats (H, W, 3): lightness from 0 to 100, a and b around 0."""
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def name_colour(rgb: np.ndarray) -> str:
    """The word for a colour (3,) of 0 to 255."""
    lightness, a, b = (float(part) for part in as_lab(rgb.reshape(1, 1, 3))[0, 0])
    chroma = float(np.hypot(a, b))
    if chroma < GREY:
        return next(word for most, word in GREYS if lightness < most)
    pixel = rgb.reshape(1, 1, 3).astype(np.float32) / 255
    angle, _, value = (float(part) for part in cv2.cvtColor(pixel, cv2.COLOR_RGB2HSV)[0, 0])
    words = next(words for end, words in HUES if angle <= end)
    pale = lightness > PALE[0] and chroma < PALE[1]
    word = words[0] if value < DARK else words[2] if pale else words[1]
    return f"greyish {word}" if chroma < TINGED and not pale else word


def laid_out(size: tuple[int, int], layout: Layout) -> Areas:
    """The keys of `layout` without their edges on a canvas of `size`, and what none covers."""
    fitted = layout.at(size)
    keys, covered = np.zeros(size, bool), np.zeros(size, bool)
    for slot in fitted.keys:
        slot.box.inset(0.2).of(keys)[:] = True
        around(slot.box).of(covered)[:] = True
    ground = ~covered
    return Areas(keys=keys if keys.any() else ground, ground=ground if ground.any() else keys)


def around(box: Box, by: int = 1) -> Box:
    """The box and a rim of `by` pixels, within the picture's upper left."""
    return Box(max(0, box.left - by), max(0, box.top - by), box.right + by, box.bottom + by)


def clustered(image: np.ndarray) -> Areas:
    """Keys and ground by their colours: ground is what the rim of the picture shows too."""
    small = within(image, COARSE)
    lab = as_lab(small)
    labels = cluster(lab.reshape(-1, 3)).reshape(lab.shape[:2])
    rim = np.ones(labels.shape, bool)
    rim[1:-1, 1:-1] = False
    at_rim, inside = (
        np.bincount(labels[area], minlength=CLUSTERS) / max(1, int(area.sum()))
        for area in (rim, ~rim)
    )
    key = int((inside - at_rim).argmax())
    grounds = np.nonzero((at_rim > RIM) & (np.arange(CLUSTERS) != key))[0]
    keys, ground = (seen(np.isin(labels, found), image.shape[:2]) for found in ([key], grounds))
    return Areas(keys=keys if keys.any() else ground, ground=ground if ground.any() else keys)


def seen(area: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An area (H, W) without its edges on a picture of `size`."""
    large = cv2.resize(area.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    return cv2.erode(large, np.ones((3, 3), np.uint8), borderValue=1) > 0


def cluster(colours: np.ndarray) -> np.ndarray:
    """The cluster (N,) of each of `colours` (N, 3); it starts from quantiles, not from chance."""
    bounds = np.quantile(colours[:, 0], np.linspace(0, 1, CLUSTERS + 1)[1:-1])
    first = np.digitize(colours[:, 0], bounds).astype(np.int32).reshape(-1, 1)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    _, labels, _ = cv2.kmeans(
        colours.astype(np.float32), CLUSTERS, first, stop, 1, cv2.KMEANS_USE_INITIAL_LABELS
    )
    return labels.ravel()


def texture(lightness: np.ndarray, area: np.ndarray) -> str:
    """What the `area` (H, W) of a picture looks like: plain, graded, striped, cloudy, patterned."""
    rows, columns = np.nonzero(area)
    values = lightness[area]
    plane = np.column_stack([np.ones_like(rows), rows, columns]).astype(np.float32)
    trend = plane @ np.linalg.lstsq(plane, values, rcond=None)[0]
    rough = float((values - trend).std())
    if rough < ROUGH:
        return "graded" if float(np.ptp(trend)) > RISE else "plain"
    inner = cv2.erode(area.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0) > 0
    weight = inner.astype(np.float32)
    near = blurred(lightness * weight) / np.maximum(blurred(weight), 1e-3)
    fine = (lightness - near)[inner]
    kinds = TEXTURES[coherence(lightness, inner) > ALONG]
    return kinds[bool(fine.size) and float(fine.std()) < FINE * rough]


def blurred(picture: np.ndarray) -> np.ndarray:
    """The mean of a few neighbours."""
    return cv2.GaussianBlur(picture, (0, 0), 2)


def coherence(lightness: np.ndarray, area: np.ndarray) -> float:
    """How far gradients in `area` agree in direction, from 0 to 1, by their structure tensor."""
    across, down = (cv2.Sobel(lightness, cv2.CV_32F, *way)[area] for way in ((1, 0), (0, 1)))
    xx, yy, xy = (float((a * b).sum()) for a, b in ((across, across), (down, down), (across, down)))
    return float(np.hypot(xx - yy, 2 * xy)) / max(xx + yy, 1e-6)


# Words for textures without and with one direction, each for sharp changes and for smooth ones.
TEXTURES = (("patterned", "cloudy"), ("striped", "graded"))

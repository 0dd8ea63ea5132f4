"""Maps of numbers laid over a picture as colour."""

from __future__ import annotations

import matplotlib
import numpy
from PIL import Image

COLOURS = "inferno"  # dark to bright, and even to the eye: also in grey
_DIM, _MOST = 0.55, 0.9  # brightness of the picture below; opacity of the most


def heat(picture: Image.Image, values: numpy.ndarray, low: float, high: float) -> Image.Image:
    """Values (h, w) over the picture in dim grey, from ``low``, where it shows, to ``high``, where bright colour hides it."""
    share = numpy.asarray(Image.fromarray(values.astype(numpy.float32)).resize(picture.size, Image.Resampling.BICUBIC))
    share = numpy.clip((share - low) / max(high - low, 1e-12), 0, 1)[..., None]  # (H, W, 1)
    colour = matplotlib.colormaps[COLOURS](0.3 + 0.7 * share[..., 0])[..., :3] * 255
    grey = numpy.asarray(picture.convert("L"), dtype=numpy.float32)[..., None]
    mixed = (1 - _MOST * share) * _DIM * grey + _MOST * share * colour
    return Image.fromarray(mixed.round().clip(0, 255).astype(numpy.uint8))

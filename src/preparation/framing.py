"""Which part of a picture is kept, and in which size: geometry, and for a smart crop the part that holds the most."""

from __future__ import annotations

import functools
import math
from typing import Any

from PIL import Image, ImageDraw

from src.buckets import bucket_sizes
from src.errors import usage_error
from src.preparation.settings import BUCKET_STEP_PX, PrepareConfig

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright source

_ANALYSIS_PX = 256  # shorter side of the copy that a smart crop looks at; finer detail changes nothing in where it lies


def size_for(picture_px: tuple[int, int], config: PrepareConfig) -> tuple[int, int]:
    """(width, height) that a picture is cut to: a square, or the bucket nearest in aspect ratio, the larger of equals."""
    if not config.buckets:
        return config.size, config.size
    aspect = math.log(picture_px[0] / picture_px[1])
    sizes_px = bucket_sizes(config.size, BUCKET_STEP_PX)
    return min(sizes_px, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))


def enlargement(picture_px: tuple[int, int], size_px: tuple[int, int]) -> float:
    """By how much a picture is enlarged to cover ``size_px``; at most 1 where it is large enough."""
    return max(kept / side for side, kept in zip(picture_px, size_px))


def crop_box(picture: Image.Image, size_px: tuple[int, int], crop: str) -> Box:
    """The largest part of ``picture`` in the shape of ``size_px``: in the middle, or with ``crop="smart"`` where there is most
    to see. Raises UserError (usage) where the package for that is missing.
    """
    scale = enlargement(picture.size, size_px)
    kept_width, kept_height = (min(side, kept / scale) for side, kept in zip(picture.size, size_px))
    free_x, free_y = picture.width - kept_width, picture.height - kept_height
    x, y = _best_place(picture, size_px) if crop == "smart" and max(free_x, free_y) >= 1 else (0.5, 0.5)
    left, top = free_x * x, free_y * y
    return left, top, left + kept_width, top + kept_height


def cut(picture: Image.Image, box: Box, size_px: tuple[int, int]) -> Image.Image:
    """The part of ``picture`` in ``size_px``, by Lanczos on the sRGB values, for the reason that images.fit_to gives."""
    return picture.resize(size_px, Image.Resampling.LANCZOS, box=box)


def _best_place(picture: Image.Image, size_px: tuple[int, int]) -> tuple[float, float]:
    """Where on its way a crop holds the most edges, saturated colours and skin: 0 left or top, 1 right or bottom.

    Scores by the package smartcrop (a port of Jonas Wagner's smartcrop.js); of equal ones the one nearest to the middle.
    """
    scale = min(1.0, _ANALYSIS_PX / min(picture.size))
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BOX)
    crops = _smart_crop().crop(small, *size_px, min_scale=1.0, prescale=False)["crops"]
    free_x, free_y = small.width - crops[0]["width"], small.height - crops[0]["height"]
    places = [(crop["score"], crop["x"] / max(1, free_x), crop["y"] / max(1, free_y)) for crop in crops]
    slack = 1e-3 * max(abs(score) for score, _, _ in places)
    good = [place for place in places if place[0] >= max(places)[0] - slack]
    _, x, y = min(good, key=lambda place: abs(place[1] - 0.5) * (free_x > 0) + abs(place[2] - 0.5) * (free_y > 0))
    return (min(1.0, x) if free_x > 0 else 0.5), (min(1.0, y) if free_y > 0 else 0.5)


@functools.cache
def _smart_crop() -> Any:
    """The package's analyser, with one thing mended. Raises UserError (usage) where it is missing."""
    try:
        from smartcrop import SmartCrop
    except ImportError:
        raise usage_error("--crop smart needs the package smartcrop: pip install smartcrop==0.5.0") from None

    class WithoutFrame(SmartCrop):
        def detect_edge(self, cie_image: Image.Image) -> Image.Image:
            """Pillow's filter leaves the outermost pixels as they were: around a light picture they would all be edges."""
            edges = super().detect_edge(cie_image)
            ImageDraw.Draw(edges).rectangle((0, 0, edges.width - 1, edges.height - 1), outline=0)
            return edges

    return WithoutFrame()

"""The sizes that pictures of many shapes are trained in, and where a picture's cut to one of them lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from src.errors import usage_error
from src.prepared_folder import Origin

MAX_ASPECT = 4.0  # of a bucket, as in kohya's trainer


def bucket_sizes(resolution_px: int, step_px: int) -> list[tuple[int, int]]:
    """The (width, height) that pictures are cut to: multiples of ``step_px``, at most ``resolution_px``^2 pixels, up to 4:1.

    For each width the largest such height, and the same turned by 90 degrees. Raises UserError (usage) unless the
    resolution is a multiple of the step.
    """
    if resolution_px % step_px:
        low = resolution_px // step_px * step_px
        nearest = f"{low} or {low + step_px}" if low else f"{step_px}"
        raise usage_error(
            f"resolution {resolution_px} with buckets must be a multiple of {step_px} for this model; "
            f"use {nearest}, or --no-buckets"
        )
    sizes_px = set()
    for width_px in range(step_px, resolution_px + 1, step_px):
        height_px = resolution_px**2 // width_px // step_px * step_px
        if height_px <= MAX_ASPECT * width_px:
            sizes_px |= {(width_px, height_px), (height_px, width_px)}
    return sorted(sizes_px)


def place(picture_px: tuple[int, int], sizes_px: Sequence[tuple[int, int]], origin: Origin | None) -> dict[str, Any]:
    """A picture's bucket (nearest in aspect ratio, then the largest) and its cut, as the fields of `dataset.Example`.

    ``origin``: the cut that prepare_dataset made before, of which SDXL is told as if both were one.
    """
    aspect = math.log(picture_px[0] / picture_px[1])
    size_px = min(sizes_px, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))
    scale = enlargement(picture_px, size_px)
    left_px, top_px = ((side * scale - kept) / 2 for side, kept in zip(picture_px, size_px))
    placed = {"size_px": size_px, "original_px": picture_px, "margin_top_left": (top_px, left_px)}
    right_px = left_px
    if origin is not None and origin.size_px == picture_px:  # else the prepared picture was cut by somebody else since
        left_px, top_px = (own + before * origin.scale * scale for own, before in zip((left_px, top_px), origin.crop_left_top))
        right_px = origin.source_px[0] * origin.scale * scale - left_px - size_px[0]
        placed["original_px"] = origin.source_px
    return placed | {"crop_top_left": (round(top_px), round(left_px)), "crop_right": round(right_px)}


def enlargement(picture_px: tuple[int, int], size_px: tuple[int, int]) -> float:
    """By how much a picture is enlarged to cover its bucket."""
    return max(kept / side for side, kept in zip(picture_px, size_px))

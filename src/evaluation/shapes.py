"""Which shape of the grammar a mask is: compared with each, slightly turned, at the mask's own centre and area."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from src.scenes import drawing
from src.scenes.grammar import SHAPES, SIZE_PX, Background, Scene, Thing

TURNS = tuple(range(-16, 17, 4))  # degrees; the grammar's are within 8
HOLES = (0.3, 0.38, 0.47, 0.65)  # of a ring's radius, beside the drawing's
MIN_FIT = 0.76  # intersection over union; chosen by measurement
_CELLS, _RADIUS_CELLS = 48, 13  # masks are compared on a grid where a disc of their area has this radius
_DRAWN_PX = 44.0  # radius of the templates


@dataclass(frozen=True)
class Fit:
    """The shape that fits best, or None where none does; its middle and radius in pixels, as a ``Thing`` has them."""

    shape: str | None
    overlap: float
    x: float
    y: float
    radius: float


def recognise(mask: np.ndarray) -> Fit:
    """The shape of a mask (H, W) that is not empty."""
    bank, rows = _bank()
    cells, x, y, disc_px = _normalised(mask)
    inside = bank @ cells  # (templates,)
    overlaps = inside / (bank.sum(1) + cells.sum() - inside)
    best = int(overlaps.argmax())
    shape, right, down, disc = rows[best]
    radius = disc_px / disc
    name = shape if overlaps[best] >= MIN_FIT else None
    return Fit(name, float(overlaps[best]), x - right * radius, y - down * radius, radius)


@cache
def _bank() -> tuple[np.ndarray, list[tuple[str, float, float, float]]]:
    """Templates (N, cells) and for each its shape, its centroid and the radius of a disc of its area, for radius 1."""
    masks, rows = [], []
    middle = SIZE_PX / 2
    for shape in SHAPES:
        for turn in TURNS:
            thing = Thing(shape, "black", middle, middle, _DRAWN_PX, turn)
            picture = drawing.draw(Scene("one", "", (thing,), Background("plain", ("white",))))
            cells, x, y, disc_px = _normalised(np.asarray(picture)[..., 0] < 128)
            masks.append(cells)
            rows.append((shape, (x - middle) / _DRAWN_PX, (y - middle) / _DRAWN_PX, disc_px / _DRAWN_PX))
    places = np.mgrid[:SIZE_PX, :SIZE_PX] + 0.5 - middle
    for hole in HOLES:  # a ring is one at any thickness
        away = np.hypot(*places) / _DRAWN_PX
        cells, _, _, disc_px = _normalised((away < 1) & (away >= hole))
        masks.append(cells)
        rows.append(("ring", 0.0, 0.0, disc_px / _DRAWN_PX))
    return np.stack(masks), rows


def _normalised(mask: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """The mask around its centroid at its own scale, as cells of 0 and 1; the centroid x, y and the radius of its disc."""
    area = float(mask.sum())
    y, x = (float(places.mean()) for places in np.nonzero(mask))
    disc_px = math.sqrt(area / math.pi)
    step = disc_px / _RADIUS_CELLS
    start = np.array([y, x]) - step * (_CELLS - 1) / 2
    cells = ndimage.affine_transform(mask.astype(np.float32), [step, step], start, (_CELLS, _CELLS), order=1)
    return (cells >= 0.5).astype(np.float32).ravel(), x + 0.5, y + 0.5, disc_px

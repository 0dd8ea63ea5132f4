"""Masks are recognised at any place and size, turned as the grammar turns them, and blots are not."""

from __future__ import annotations

import numpy as np
import pytest

from src.evaluation.shapes import recognise
from src.scenes import drawing
from src.scenes.grammar import SHAPES, Background, Scene, Thing


def mask(shape: str, x: float, y: float, radius: float, turn: float) -> np.ndarray:
    picture = drawing.draw(Scene("one", "", (Thing(shape, "black", x, y, radius, turn),), Background("plain", ("white",))))
    return np.asarray(picture)[..., 0] < 135


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x", "y", "radius", "turn"), [(64, 64, 40, 0), (40, 80, 24, 8), (90, 30, 16, -8), (33, 33, 12.5, 5)])
def test_a_shape_is_known_with_its_middle_and_radius(shape: str, x: float, y: float, radius: float, turn: float) -> None:
    fit = recognise(mask(shape, x, y, radius, turn))
    assert fit.shape == shape
    assert (fit.x, fit.y) == pytest.approx((x, y), abs=0.8)
    assert fit.radius == pytest.approx(radius, rel=0.04)


def test_blots_are_no_shape() -> None:
    rows, columns = np.mgrid[:128, :128]
    long = (abs(rows - 64) < 5) & (abs(columns - 64) < 50)
    two = (np.hypot(rows - 64, columns - 44) < 18) | (np.hypot(rows - 64, columns - 84) < 18)
    half = (np.hypot(rows - 64, columns - 64) < 30) & (columns > 64)
    for blot in (long, two, half):
        assert recognise(blot).shape is None

"""Cutting a picture by colour: CIELAB by published values, hard edges, backgrounds in their patterns."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from src.evaluation import segmenting
from src.evaluation.segmenting import harden, lab, segment
from src.scenes import drawing
from src.scenes.grammar import GRADIENTS, PLAIN, STRIPES, Background, Scene, Thing


def test_cielab_has_the_published_values() -> None:
    """Of sRGB white, black, the primaries and mid grey (D65; Lindbloom's calculator)."""
    known = {
        (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18), (0, 0, 255): (32.30, 79.19, -107.86), (119, 119, 119): (50.03, 0, 0),
    }  # fmt: skip
    for rgb, expected in known.items():
        assert lab(np.array(rgb, dtype=float)) == pytest.approx(expected, abs=0.15)


def test_a_soft_edge_becomes_hard_and_flat_colour_stays() -> None:
    step = np.zeros((20, 20, 3))
    step[:, 10:] = 200
    soft = step.copy()
    soft[:, 9], soft[:, 10] = 50, 150
    hard = harden(harden(soft))
    assert np.abs(soft - step).max() == 50
    assert np.abs(hard - step).max() < 6
    assert np.array_equal(harden(np.full((9, 9, 3), 7.0)), np.full((9, 9, 3), 7.0))


def test_each_background_is_known_and_taken_for_no_other() -> None:
    asked = [Background("plain", (name,)) for name in PLAIN]
    asked += [Background("gradient", pair[::order]) for pair in GRADIENTS for order in (1, -1)]
    asked += [Background("striped", pair, 0.3) for pair in STRIPES]
    asked += [Background("dotted", pair[::order], 0.7) for pair in STRIPES for order in (1, -1)]
    for index, own in enumerate(asked):
        free = next(name for name in ("purple", "orange", "brown") if name not in own.colours)
        picture = drawing.draw(Scene("one", "", (Thing("circle", free, 60, 70, 24, 0),), own))
        picture = picture.filter(ImageFilter.GaussianBlur(0.6))
        assert segment(picture, own).has_background
        others = [
            other for place, other in enumerate(asked) if place % 7 == index % 7 and other != own
        ]  # all would take a minute
        assert [other for other in others if segment(picture, other).has_background] == []
        assert [piece.colour for piece in segment(picture, own).pieces] == [free]


@pytest.mark.parametrize("colour", ["gray", "brown", "cyan"])
def test_a_thing_on_stripes_is_one_piece_of_its_size(colour: str) -> None:
    scene = Scene("one", "", (Thing("square", colour, 64, 64, 30, 0),), Background("striped", ("black", "white"), 0.2))
    (piece,) = segment(drawing.draw(scene), scene.background).pieces
    assert piece.mask.sum() == pytest.approx((2 * 0.86 * 30) ** 2, rel=0.06)


def test_what_is_thin_or_small_is_no_piece() -> None:
    picture = Image.new("RGB", (128, 128), (250, 250, 250))
    picture.paste((220, 38, 38), (20, 20, 26, 26))  # 36 pixels
    picture.paste((220, 38, 38), (20, 60, 120, 62))  # two pixels high
    assert segment(picture, Background("plain", ("white",))).pieces == ()
    picture.paste((220, 38, 38), (60, 90, 75, 105))
    assert len(segment(picture, Background("plain", ("white",))).pieces) == 1


def test_a_muddy_colour_is_not_clear() -> None:
    picture = Image.new("RGB", (128, 128), (250, 250, 250))
    picture.paste((60, 255, 0), (40, 40, 80, 80))  # far from every colour of the grammar
    (piece,) = segment(picture, Background("plain", ("white",))).pieces
    assert (piece.colour, piece.is_clear) == ("green", False)
    assert segmenting.MAX_DISTANCE > 0

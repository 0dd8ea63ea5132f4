"""Cutting a picture by colour: CIELAB by published values, hard edges, backgrounds in their patterns."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from src.evaluation import segmenting
from src.evaluation.segmenting import harden, lab, segment
from src.scenes import drawing
from src.scenes.grammar import COLOURS, GRADIENTS, PLAIN, STRIPES, Background, Scene, Thing


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


def shade_off(colour: str, other: tuple[int, int, int], off: float) -> tuple[int, ...]:
    """The colour, moved so far in CIELAB towards another."""
    start, end = np.array(COLOURS[colour], dtype=float), np.array(other, dtype=float)
    shades = start + (end - start) * np.linspace(0, 1, 400)[:, None]
    away = np.linalg.norm(lab(shades) - lab(start), axis=1)
    return tuple(int(level) for level in shades[np.abs(away - off).argmin()].round())


def test_a_muddy_colour_is_not_clear() -> None:
    for off, is_clear in ((segmenting.MAX_DISTANCE - 2, True), (segmenting.MAX_DISTANCE + 2, False)):
        picture = Image.new("RGB", (128, 128), (250, 250, 250))
        picture.paste(shade_off("green", (60, 255, 0), off), (40, 40, 80, 80))
        (piece,) = segment(picture, Background("plain", ("white",))).pieces
        assert (piece.colour, piece.is_clear) == ("green", is_clear)


def test_a_background_is_of_its_colour_and_not_only_nearest_to_it() -> None:
    def has(picture: Image.Image, *colours: str) -> bool:
        return segment(picture, Background("plain" if len(colours) == 1 else "gradient", colours)).has_background

    for shade, name in (((200, 210, 235), "white"), ((60, 255, 0), "green"), ((255, 150, 150), "pink")):
        assert not has(Image.new("RGB", (128, 128), shade), name)
    for off, is_right in ((segmenting.MAX_OFF - 2, True), (segmenting.MAX_OFF + 2, False)):
        assert has(Image.new("RGB", (128, 128), shade_off("white", (120, 160, 250), off)), "white") == is_right
    for off, is_right in ((segmenting.MAX_STAINED - 2, True), (segmenting.MAX_STAINED + 2, False)):
        stained = Image.new("RGB", (128, 128), COLOURS["white"])
        stained.paste(shade_off("white", (120, 160, 250), off), (0, 100, 128, 128))  # a fifth: not the median, but plain to see
        assert has(stained, "white") == is_right
    ramp = np.linspace(np.array([250, 250, 250]), np.array([150, 190, 250]), 128)[:, None].repeat(128, 1)
    assert not has(Image.fromarray(ramp.astype(np.uint8)), "white")
    truth = np.asarray(drawing.draw(Scene("one", "", (), Background("gradient", ("blue", "white")))), dtype=float)
    assert has(Image.fromarray(truth.astype(np.uint8)), "blue", "white")
    muddy = np.clip(truth + np.array([30, -20, -50]), 0, 255)
    assert not has(Image.fromarray(muddy.astype(np.uint8)), "blue", "white")


def test_a_few_specks_are_dirt_and_many_are_a_pattern() -> None:
    picture = Image.new("RGB", (128, 128), (250, 250, 250))
    for count in range(1, 7):
        picture.paste(COLOURS["red" if count % 2 else "blue"], (18 * count, 40, 18 * count + 7, 47))
        assert segment(picture, Background("plain", ("white",))).has_background == (count <= segmenting.MAX_STRAY)

"""Versions of a picture: the same for the same seed, within their bounds, and what they do to a picture."""

from __future__ import annotations

import numpy
import pytest
from PIL import Image

from src.augmentation import Version, apply, versions


def test_versions_follow_from_seed_and_picture_alone() -> None:
    found = versions("abc", 5, crop=0.2, colour=0.3, seed=1)
    assert found == versions("abc", 9, crop=0.2, colour=0.3, seed=1)[:5]
    assert found[0] == Version()
    assert len(set(found)) == 5
    assert found[1] != versions("abd", 2, crop=0.2, colour=0.3, seed=1)[1]
    assert found[1] != versions("abc", 2, crop=0.2, colour=0.3, seed=2)[1]


def test_versions_stay_within_their_bounds() -> None:
    found = versions("abc", 500, crop=0.2, colour=0.3, seed=0)[1:]
    kept = [version.kept for version in found]
    assert 0.8 <= min(kept) < 0.82 < 0.98 < max(kept) <= 1
    for name in ("brightness", "contrast", "saturation"):
        values = [getattr(version, name) for version in found]
        assert 0.7 <= min(values) < 0.72 < 1.28 < max(values) <= 1.3
    plain = versions("abc", 3, crop=0, colour=0, seed=0)
    assert all(apply(picture(), version).tobytes() == picture().tobytes() for version in plain)


def picture() -> Image.Image:
    rows, columns = numpy.mgrid[:40, :60]
    return Image.fromarray(numpy.stack([rows * 5, columns * 4, rows + columns], axis=-1).astype(numpy.uint8))


@pytest.mark.parametrize(("left", "top", "corner"), [(0, 0, (0, 0)), (1, 1, (30, 20)), (0.5, 1, (15, 20))])
def test_a_cut_is_a_part_of_the_picture(left: float, top: float, corner: tuple[int, int]) -> None:
    cut = apply(picture(), Version(kept=0.5, left=left, top=top))
    assert cut.size == (30, 20)
    assert cut.tobytes() == picture().crop((*corner, corner[0] + 30, corner[1] + 20)).tobytes()


def test_colours_change_and_the_hue_stays() -> None:
    dark = numpy.asarray(apply(picture(), Version(brightness=0.5)))
    assert numpy.abs(dark - numpy.asarray(picture()) * 0.5).max() <= 1
    strong = Image.new("RGB", (4, 4), (200, 100, 60))
    for version in (Version(brightness=0.7), Version(saturation=0.6), Version(contrast=0.7)):
        red, green, blue = apply(strong, version).getpixel((0, 0))
        assert red >= green >= blue

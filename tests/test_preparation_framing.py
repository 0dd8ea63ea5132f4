"""Which part is kept, and in which size."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps

from src.errors import UserError
from src.preparation import framing
from src.preparation.framing import crop_box, cut, enlargement, size_for
from src.preparation.settings import PrepareConfig
from tests.tiny.photos import photo

SIDES = st.integers(64, 5000)


@given(SIDES, SIDES)
def test_a_box_has_the_shape_of_its_size_and_touches_two_sides(width, height):
    picture = Image.new("1", (width, height))
    for size in ((512, 512), (640, 384)):
        left, top, right, bottom = crop_box(picture, size, "center")
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert math.isclose((right - left) / (bottom - top), size[0] / size[1], rel_tol=1e-9)
        assert math.isclose(right - left, width) or math.isclose(bottom - top, height)
        assert math.isclose(left, width - right, abs_tol=1e-6)
        assert math.isclose(top, height - bottom, abs_tol=1e-6)


@given(SIDES, SIDES)
def test_buckets_are_multiples_of_64_within_the_area_and_nearest_in_shape(width, height):
    config = PrepareConfig(size=512, buckets=True)
    size = size_for((width, height), config)
    assert all(side % 64 == 0 for side in size)
    assert size[0] * size[1] <= 512 * 512
    if 0.5 <= width / height <= 2:  # steps of 64 px are steps of a fifth in shape at most; half of that is lost
        kept = min(width / height, size[0] / size[1]) / max(width / height, size[0] / size[1])
        assert kept > 0.83
    assert size_for((512, 512), config) == (512, 512)


def test_without_buckets_all_are_square():
    assert size_for((3000, 2000), PrepareConfig(size=640)) == (640, 640)


def test_enlargement():
    assert enlargement((1024, 600), (512, 512)) == 512 / 600
    assert enlargement((1024, 500), (512, 512)) == 512 / 500


def test_a_centre_cut_is_that_of_pillow():
    picture = photo(1, 301, 200)
    ours = cut(picture, crop_box(picture, (64, 64), "center"), (64, 64))
    theirs = ImageOps.fit(picture, (64, 64), Image.Resampling.LANCZOS)
    assert ImageChops.difference(ours, theirs).getbbox() is None


@pytest.mark.parametrize("place", [0, 150, 440])
@pytest.mark.parametrize("upright", [False, True])
def test_a_smart_crop_keeps_the_detail(place, upright):
    """A busy square on a plain wall, off the centre: the centre crop cuts it, the smart one holds all of it."""
    picture = Image.new("RGB", (600, 200), (120, 120, 125))
    picture.paste(photo(3, 160, 160), (place, 20))
    truth = (place, place + 160)
    if upright:
        picture = picture.transpose(Image.Transpose.ROTATE_270)
    box = crop_box(picture, (64, 64), "smart")
    low, high = (box[1], box[3]) if upright else (box[0], box[2])
    assert low <= truth[0] + 16
    assert high >= truth[1] - 16
    assert high - low == pytest.approx(200)


def test_of_a_plain_picture_the_middle_is_kept():
    box = crop_box(Image.new("RGB", (900, 300), "white"), (64, 64), "smart")
    assert (box[0] + box[2]) / 2 == pytest.approx(450, abs=20)


def test_a_picture_in_the_right_shape_is_kept_whole():
    assert crop_box(photo(0, 200, 200), (64, 64), "smart") == (0, 0, 200, 200)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "smartcrop", None)
    framing._smart_crop.cache_clear()
    with pytest.raises(UserError, match="pip install smartcrop"):
        crop_box(photo(0, 300, 200), (64, 64), "smart")

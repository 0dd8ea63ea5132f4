"""Golden pixels through the whole command: orientation, profiles, transparency, photos of an iPhone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, features

from src.preparation import contact_sheet
from tests.test_images import linear_grey_profile, srgb_of_light, swapped_profile
from tests.test_prepare_dataset import prepared
from tests.tiny.photos import photo
from tests.tiny.pictures import BLUE, GREEN, RED, WHITE, png

SIDE = 64


@pytest.fixture
def _no_report(monkeypatch):
    monkeypatch.setattr(contact_sheet, "write_report", lambda *args: b"report")


def flat(mode, value):
    return Image.new(mode, (SIDE, SIDE), value)


def halves(left, right):
    picture = Image.new("RGB", (SIDE, SIDE), left)
    picture.paste(right, (SIDE // 2, 0, SIDE, SIDE))
    return picture


def save_16_bit(path):
    Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16)).save(path)


def save_16_bit_rgb(path):
    pixel = b"".join(value.to_bytes(2, "big") for value in (0xC81E, 0x1EFF, 0x28AA))
    path.write_bytes(png(SIDE, SIDE, 16, 2, (b"\0" + pixel * SIDE) * SIDE))


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored picture
    halves(RED, BLUE).save(path, quality=100, subsampling=0, exif=exif)


def save_animated(path):
    flat("RGB", GREEN).save(path, save_all=True, append_images=[flat("RGB", RED)] * 3)


def save_palette(path):
    picture = flat("P", 1)
    picture.putpalette([*RED, *GREEN])
    picture.save(path, transparency=1)


def cmyk(c, m, y, k):
    return tuple(round((255 - ink) * (255 - k) / 255) for ink in (c, m, y))


def over(colour, alpha, ground):
    return tuple(round((value * alpha + below * (255 - alpha)) / 255) for value, below in zip(colour, ground))


YELLOW = (255, 255, 0)
GOLDEN = {  # file -> (how it is saved, top left pixel, bottom right pixel, note); the background is yellow
    "16-bit.png": (save_16_bit, (40_000 >> 8,) * 3, (40_000 >> 8,) * 3, "16-bit grey to 8-bit"),
    "16-bit rgb.png": (save_16_bit_rgb, (0xC8, 0x1E, 0x28), (0xC8, 0x1E, 0x28), None),
    "cmyk.jpg": (lambda path: flat("CMYK", (10, 20, 30, 200)).save(path, quality=100), *[cmyk(10, 20, 30, 200)] * 2, "CMYK to RGB"),
    "cmyk.tif": (lambda path: flat("CMYK", (255, 0, 0, 60)).save(path), *[cmyk(255, 0, 0, 60)] * 2, "CMYK to RGB"),
    "icc.png": (
        lambda path: halves((255, 0, 0), WHITE).save(path, icc_profile=swapped_profile()),
        (0, 0, 255), WHITE, "colour profile to sRGB",
    ),
    "grey icc.png": (
        lambda path: flat("L", 55).save(path, icc_profile=linear_grey_profile()),
        *[(srgb_of_light(55 / 255),) * 3] * 2, "colour profile to sRGB",
    ),
    "alpha.png": (lambda path: flat("RGBA", (*GREEN, 100)).save(path), *[over(GREEN, 100, YELLOW)] * 2, "transparency filled"),
    "hidden.png": (lambda path: flat("RGBA", (255, 0, 0, 0)).save(path), *[YELLOW] * 2, "transparency filled"),
    "palette.png": (save_palette, *[YELLOW] * 2, "transparency filled"),
    "grey alpha.png": (lambda path: flat("LA", (80, 255)).save(path), *[(80,) * 3] * 2, "transparency filled"),
    "turned.jpg": (save_turned, RED, BLUE, "turned upright"),
    "animated.gif": (save_animated, *[GREEN] * 2, "first of several frames"),
    "animated.webp": (lambda path: flat("RGB", GREEN).save(path, save_all=True, append_images=[flat("RGB", RED)], lossless=True), *[GREEN] * 2, "first of several frames"),
    "1-bit.bmp": (lambda path: flat("1", 1).save(path), *[WHITE] * 2, None),
}  # fmt: skip
if features.check("avif"):
    GOLDEN["photo.avif"] = (lambda path: halves(RED, BLUE).save(path, quality=100, subsampling="4:4:4"), RED, BLUE, None)


@pytest.mark.usefixtures("_no_report")
def test_golden_pixels_through_the_whole_command(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for name, (save, *_) in GOLDEN.items():
        save(src / name)
    keep = ("--blur-threshold", "0", "--keep-duplicates", "--keep-uncaptioned", "--background", "yellow")
    made = prepared(src, tmp_path / "dst", *keep)
    assert [item["source"] for item in made["pictures"]] == sorted(GOLDEN)
    for item in made["pictures"]:
        _, first, last, note = GOLDEN[item["source"]]
        with Image.open(tmp_path / "dst" / item["file_name"]) as picture:
            assert picture.mode == "RGB"
            for pixel, expected in ((picture.getpixel((0, 0)), first), (picture.getpixel((SIDE - 1, SIDE - 1)), last)):
                assert max(abs(a - b) for a, b in zip(pixel, expected)) <= 2, (item["source"], pixel, expected)
        notes = [text for text in item["notes"] if not text.startswith("kept although")]
        assert notes == ([note] if note else [])


@pytest.mark.usefixtures("_no_report")
def test_photos_of_an_iphone(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    src = tmp_path / "src"
    src.mkdir()
    photo(1).save(src / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    halves(RED, BLUE).save(src / "b.heic", quality=-1, exif=exif)
    made = prepared(src, tmp_path / "dst", "--blur-threshold", "0", "--keep-uncaptioned")
    assert [item["source"] for item in made["pictures"]] == ["a.png", "b.heic"]
    with Image.open(tmp_path / "dst/0001.png") as picture:
        corners = [picture.getpixel(place) for place in ((0, 0), (SIDE - 1, SIDE - 1))]
    for pixel, expected in zip(corners, (RED, BLUE)):
        assert max(abs(a - b) for a, b in zip(pixel, expected)) <= 3

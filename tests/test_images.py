"""Known colours in, known colours out, for each kind of file; and the shapes that pictures are brought into."""

from __future__ import annotations

import math
import random
import struct

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms

from src import images
from src.errors import ExitCode, UserError
from tests.tiny.pictures import BLACK, BLUE, GREEN, RED, WHITE, encoded, noise, png_chunk, png_row, tiles, written


def palette() -> Image.Image:
    picture = Image.new("P", (48, 16))
    picture.putpalette([*RED, *GREEN, *BLUE])
    for index in (1, 2):
        picture.paste(index, (16 * index, 0, 16 * index + 16, 16))
    return picture


def assert_colours(picture: Image.Image, *expected: tuple[int, int, int], error: int = 2) -> None:
    """The picture is a row of equal flat tiles of these colours."""
    assert picture.mode == "RGB"
    assert picture.info == {}
    width, rest = divmod(picture.width, len(expected))
    assert rest == 0
    truth = Image.new("RGB", picture.size)
    for index, colour in enumerate(expected):
        truth.paste(colour, (width * index, 0, width * index + width, picture.height))
    worst = max(high for _, high in ImageChops.difference(picture, truth).getextrema())
    assert worst <= error, (worst, [picture.getpixel((width * index, 0)) for index in range(len(expected))])


def over(colour: tuple[int, int, int], alpha: int, background: tuple[int, int, int] = WHITE) -> tuple[int, ...]:
    return tuple(round((value * alpha + ground * (255 - alpha)) / 255) for value, ground in zip(colour, background))


def grey(value: int) -> tuple[int, int, int]:
    return (value,) * 3


def cmyk(c: int, m: int, y: int, k: int) -> tuple[int, ...]:
    return tuple(round((255 - ink) * (255 - k) / 255) for ink in (c, m, y))


JPEG = {"quality": 100, "subsampling": 0}
INKS = [(0, 255, 255, 0), (255, 0, 0, 60), (10, 20, 30, 200)]
HALF = (*GREEN, 128)
GOLDEN = {
    **{f"RGB {kind}": (encoded(tiles("RGB", RED, GREEN, BLUE), kind), [RED, GREEN, BLUE]) for kind in ("PNG", "BMP", "TIFF")},
    "RGB JPEG": (encoded(tiles("RGB", RED, GREEN, BLUE), "JPEG", **JPEG), [RED, GREEN, BLUE]),
    "RGB WEBP": (encoded(tiles("RGB", RED, GREEN, BLUE), "WEBP", lossless=True), [RED, GREEN, BLUE]),
    "RGB GIF": (encoded(tiles("RGB", RED, GREEN, BLUE), "GIF"), [RED, GREEN, BLUE]),
    "RGB TIFF lzw": (encoded(tiles("RGB", RED, BLUE), "TIFF", compression="tiff_lzw"), [RED, BLUE]),
    **{
        f"L {kind}": (encoded(tiles("L", 0, 77, 255), kind), [BLACK, grey(77), WHITE]) for kind in ("PNG", "BMP", "TIFF", "GIF")
    },
    "L JPEG": (encoded(tiles("L", 0, 77, 255), "JPEG", **JPEG), [BLACK, grey(77), WHITE]),
    **{f"1 {kind}": (encoded(tiles("1", 0, 1), kind), [BLACK, WHITE]) for kind in ("PNG", "BMP", "TIFF")},
    "P PNG": (encoded(palette(), "PNG"), [RED, GREEN, BLUE]),
    "P BMP": (encoded(palette(), "BMP"), [RED, GREEN, BLUE]),
    "P PNG, one clear": (encoded(palette(), "PNG", transparency=1), [RED, WHITE, BLUE]),
    "P PNG, alphas": (encoded(palette(), "PNG", transparency=b"\xff\x80\x00"), [RED, over(GREEN, 128), WHITE]),
    "P GIF, one clear": (encoded(palette(), "GIF", transparency=2), [RED, GREEN, WHITE]),
    "LA PNG": (encoded(tiles("LA", (77, 255), (77, 128), (0, 0)), "PNG"), [grey(77), over(grey(77), 128), WHITE]),
    "LA TIFF": (encoded(tiles("LA", (77, 255), (77, 128), (0, 0)), "TIFF"), [grey(77), over(grey(77), 128), WHITE]),
    **{
        f"RGBA {kind}": (encoded(tiles("RGBA", (*RED, 255), HALF, (*RED, 0)), kind, **more), [RED, over(GREEN, 128), WHITE])
        for kind, more in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {}))
    },
    "RGB PNG, key colour": (encoded(tiles("RGB", RED, GREEN), "PNG", transparency=GREEN), [RED, WHITE]),
    "L PNG, key grey": (encoded(tiles("L", 77, 90), "PNG", transparency=90), [grey(77), WHITE]),
    "1 PNG, key": (png_row(1, 0, b"\x40", before=png_chunk(b"tRNS", b"\0\0")), [WHITE]),
    "I;16 PNG": (encoded(tiles("I", 0, 0x1234, 0x8040, 0xFFFF).convert("I;16"), "PNG"), [BLACK, grey(0x12), grey(0x80), WHITE]),
    "I;16 PNG, key grey": (
        png_row(16, 0, b"\x12\x34", b"\x12\x35", before=png_chunk(b"tRNS", b"\x12\x35")),
        [grey(0x12), WHITE],
    ),
    "I;16 TIFF": (encoded(tiles("I", 0, 0x1234, 0xFFFF).convert("I;16"), "TIFF"), [BLACK, grey(0x12), WHITE]),
    "I;16B TIFF": (encoded(tiles("I", 0, 0x1234, 0xFFFF).convert("I;16B"), "TIFF"), [BLACK, grey(0x12), WHITE]),
    "I TIFF": (encoded(tiles("I", 0, 0x1234, 0xFFFF), "TIFF"), [BLACK, grey(0x12), WHITE]),
    "RGB16 PNG": (png_row(16, 2, bytes([200, 9, 30, 8, 40, 7])), [RED]),
    "RGBA16 PNG": (png_row(16, 6, bytes([200, 9, 30, 8, 40, 7, 255, 255]), bytes(8)), [RED, WHITE]),
    "LA16 PNG": (png_row(16, 4, bytes([77, 9, 255, 255]), bytes(4)), [grey(77), WHITE]),
    "CMYK TIFF": (encoded(tiles("CMYK", *INKS), "TIFF"), [cmyk(*ink) for ink in INKS]),
    "CMYK JPEG": (encoded(tiles("CMYK", *INKS), "JPEG", **JPEG), [cmyk(*ink) for ink in INKS]),
    "GIF, 3 frames": (
        encoded(tiles("RGB", RED), "GIF", save_all=True, append_images=[tiles("RGB", BLUE), tiles("RGB", GREEN)]),
        [RED],
    ),
    "WEBP, 2 frames": (
        encoded(tiles("RGB", RED), "WEBP", save_all=True, append_images=[tiles("RGB", BLUE)], lossless=True),
        [RED],
    ),
    "APNG, 2 frames": (encoded(tiles("RGB", RED), "PNG", save_all=True, append_images=[tiles("RGB", BLUE)]), [RED]),
    "MPO, 2 pictures": (encoded(tiles("RGB", RED), "MPO", save_all=True, append_images=[tiles("RGB", BLUE)], **JPEG), [RED]),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_colours(tmp_path, case):
    data, expected = GOLDEN[case]
    path = written(tmp_path, data)
    assert_colours(images.read_image(path), *expected)
    assert path.read_bytes() == data  # an original is never touched


def test_the_background_shows_through(tmp_path):
    path = written(tmp_path, encoded(tiles("RGBA", (*RED, 0), HALF), "PNG"))
    assert_colours(images.read_image(path, background=BLUE), BLUE, over(GREEN, 128, BLUE))


# --- EXIF orientation, ICC profiles

# EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored picture lie in the upright one of W x H.
UPRIGHT_OF = {
    1: lambda row, col, w, h: (col, row),
    2: lambda row, col, w, h: (w - 1 - col, row),
    3: lambda row, col, w, h: (w - 1 - col, h - 1 - row),
    4: lambda row, col, w, h: (col, h - 1 - row),
    5: lambda row, col, w, h: (row, col),
    6: lambda row, col, w, h: (w - 1 - row, col),
    7: lambda row, col, w, h: (w - 1 - row, h - 1 - col),
    8: lambda row, col, w, h: (row, h - 1 - col),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT_OF)
def test_exif_orientation(tmp_path, kind, orientation):
    width, height = 5, 3
    upright = Image.new("RGB", (width, height))
    for x in range(width):
        for y in range(height):
            upright.putpixel((x, y), (50 * x, 80 * y, 100))
    stored = Image.new("RGB", (width, height) if orientation < 5 else (height, width))
    for row in range(stored.height):
        for col in range(stored.width):
            stored.putpixel((col, row), upright.getpixel(UPRIGHT_OF[orientation](row, col, width, height)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = images.read_image(written(tmp_path, encoded(stored, kind, exif=exif, **options)))
    assert picture.size == (width, height)
    assert picture.tobytes() == upright.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_exif_block_is_passed_over(tmp_path, kind, exif, recwarn):
    path = written(tmp_path, encoded(tiles("RGB", WHITE), kind, exif=exif))
    assert_colours(images.read_image(path), WHITE)
    assert images.read_text_chunks(path) == {}
    assert not recwarn.list


def swapped_profile() -> bytes:
    """An sRGB profile whose red and blue primaries have changed places."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)


def linear_grey_profile() -> bytes:
    """A minimal ICC 2.4 grey display profile whose values are light itself (gamma 1)."""

    def xyz(*values: float) -> bytes:
        return struct.pack(">3i", *(round(value * 65536) for value in values))

    d50 = xyz(0.9642, 1.0, 0.8249)
    white, curve = b"XYZ \0\0\0\0" + d50, b"curv\0\0\0\0" + struct.pack(">I", 0)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 156 + len(white), len(curve))
    body = table + white + curve
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 128 + len(body), b"\0" * 4, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"\0" * 12, b"acsp"
    )
    return head.ljust(68, b"\0") + d50 + b"\0" * 48 + body


def srgb_of_light(light: float) -> int:
    return round(255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055))  # IEC 61966-2-1


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", JPEG)])
def test_an_icc_profile_is_converted(tmp_path, kind, options):
    path = written(tmp_path, encoded(tiles("RGB", (255, 0, 0), (0, 0, 255)), kind, icc_profile=swapped_profile(), **options))
    assert_colours(images.read_image(path), (0, 0, 255), (255, 0, 0))


@pytest.mark.parametrize("picture", [tiles("L", 0, 55, 128, 255), tiles("LA", (0, 255), (55, 255), (128, 255), (9, 0))])
def test_a_grey_profile_is_converted(tmp_path, picture):
    path = written(tmp_path, encoded(picture, "PNG", icc_profile=linear_grey_profile()))
    expected = [srgb_of_light(value / 255) for value in (0, 55, 128, 255)]
    assert_colours(images.read_image(path), *map(grey, expected))


@pytest.mark.parametrize("profile", [b"rubbish", swapped_profile()[:200], swapped_profile().replace(b"RGB ", b"CMYK")])
def test_a_damaged_or_foreign_profile_is_passed_over(tmp_path, profile):
    path = written(tmp_path, encoded(tiles("RGB", RED, BLUE), "PNG", icc_profile=profile))
    assert_colours(images.read_image(path), RED, BLUE)


# --- shapes


def test_a_mask_is_white_where_it_is_repainted(tmp_path):
    strokes = written(tmp_path, encoded(tiles("RGBA", (255, 255, 255, 255), (255, 255, 255, 0), (255, 255, 255, 128)), "PNG"))
    mask = images.read_mask(strokes)
    assert mask.mode == "L"
    assert [mask.getpixel((16 * index, 0)) for index in range(3)] == [255, 0, 128]
    mask = images.read_mask(written(tmp_path, encoded(tiles("1", 1, 0), "PNG")))
    assert [mask.getpixel((16 * index, 0)) for index in range(2)] == [255, 0]


def test_a_picture_in_memory_is_read_as_its_file(tmp_path):
    """A layer with white under what is transparent, a photo that lies on its side, 16 bits of grey."""
    layer = tiles("RGBA", (255, 255, 255, 255), (255, 255, 255, 0), (200, 0, 0, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray((np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32))
    for image, options in ((layer, {}), (tiles("RGB", RED, BLUE), {"exif": exif}), (grey, {})):
        path = written(tmp_path, encoded(image, "PNG", **options))
        with Image.open(path) as opened:
            assert images.plain(opened).tobytes() == images.read_image(path).tobytes()
            assert images.read_mask(opened).tobytes() == images.read_mask(path).tobytes()


@pytest.mark.parametrize(
    ("size", "box"), [((96, 32), (32, 0, 64, 32)), ((32, 96), (0, 32, 32, 64)), ((32, 32), (0, 0, 32, 32))]
)
def test_fit_to_keeps_the_middle(size, box):
    picture = noise(96).resize(size)
    assert images.fit_to(picture, 32, 32).tobytes() == picture.crop(box).tobytes()


def lanczos_row(values: list[int], new_width: int) -> list[float]:
    """Lanczos-3 by its definition, the filter as wide as the reduction, weights normalised at the edges."""
    scale = len(values) / new_width

    def kernel(x: float) -> float:
        if x == 0:
            return 1.0
        return math.sin(math.pi * x) * math.sin(math.pi * x / 3) * 3 / (math.pi * x) ** 2 if abs(x) < 3 else 0.0

    row = []
    for index in range(new_width):
        weights = [kernel((x + 0.5 - (index + 0.5) * scale) / max(scale, 1)) for x in range(len(values))]
        row.append(sum(weight * value for weight, value in zip(weights, values)) / sum(weights))
    return [min(255.0, max(0.0, value)) for value in row]


@pytest.mark.parametrize(("width", "new_width"), [(60, 20), (61, 37), (20, 30)])
def test_fit_to_is_lanczos_on_srgb_values(width, new_width):
    values = random.Random(1).choices(range(256), k=width)
    picture = Image.new("L", (width, width))
    for x, value in enumerate(values):
        picture.paste(value, (x, 0, x + 1, width))
    row = images.fit_to(picture, new_width, new_width)
    expected = lanczos_row(values, new_width)
    assert max(abs(row.getpixel((x, new_width // 2)) - expected[x]) for x in range(new_width)) <= 1


def test_a_contact_sheet_holds_every_picture_where_it_belongs():
    colours = [RED, GREEN, BLUE, (9, 9, 9), (99, 150, 200)]
    sheet = images.contact_sheet([Image.new("RGB", (128, 96), colour) for colour in colours])
    margin = 4
    assert sheet.size == (margin + 3 * (128 + margin), margin + 2 * (96 + margin))  # five pictures: 3 columns, 2 rows
    for index, colour in enumerate(colours):
        x, y = margin + index % 3 * (128 + margin), margin + index // 3 * (96 + margin)
        assert sheet.crop((x, y, x + 128, y + 96)).getcolors() == [(128 * 96, colour)]
    assert sum(count for count, colour in sheet.getcolors() if colour != WHITE) == 5 * 128 * 96


def test_labels_stay_under_their_picture():
    cells = [Image.new("RGB", (160, 40), RED)] * 4
    sheet = images.contact_sheet(
        cells, ["1.3", "a very long label that does not fit under its picture\nat all", "", "狐"], columns=2
    )
    margin = 4
    column_gaps = [*range(margin), *range(margin + 160, 2 * margin + 160), *range(2 * margin + 320, sheet.width)]
    for x in column_gaps:
        assert sheet.crop((x, 0, x + 1, sheet.height)).getcolors() == [(sheet.height, WHITE)]
    ink = [sheet.crop((x, 44, x + 160, 56)).convert("L").getextrema()[0] for x in (margin, 2 * margin + 160)]
    assert max(ink) < 80  # both labels of the first row are there, black on white


def test_a_sheet_needs_pictures_and_their_labels():
    for pictures, labels in (([], None), ([noise(8)], []), ([noise(8)], ["a", "b"])):
        with pytest.raises(ValueError, match="make no sheet"):
            images.contact_sheet(pictures, labels)


def test_a_label_is_readable_in_a_font_without_accents():
    assert images.contact_sheet([noise(90)], ["Füchse"]).tobytes() == images.contact_sheet([noise(90)], ["Fuchse"]).tobytes()
    assert images.contact_sheet([noise(90)], ["Füchse"]).tobytes() != images.contact_sheet([noise(90)], ["Fchse"]).tobytes()


# --- sizes and notes


@pytest.mark.parametrize("kind", images._formats())
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_by_the_header_is_that_of_the_picture(tmp_path, kind, orientation):
    options = {"exif": encoded_orientation(orientation)} if kind not in ("BMP", "GIF") else {}
    path = written(tmp_path, encoded(tiles("RGB", RED, GREEN, BLUE), kind, **options))
    assert images.picture_size(path) == images.read_image(path).size


def encoded_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def test_the_size_needs_no_pixels_and_is_refused_as_the_picture_is(tmp_path):
    whole = encoded(noise(64), "PNG")
    assert images.picture_size(written(tmp_path, whole[:100])) == (64, 64)
    for data in (b"", b"%PDF-1.4", whole[:20]):
        with pytest.raises(UserError) as caught:
            images.picture_size(written(tmp_path, data))
        assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(tiles("RGB", RED), "PNG"), []),
        (encoded(tiles("L", 3), "PNG"), []),
        (encoded(tiles("1", 1), "PNG"), []),
        (encoded(palette(), "PNG"), []),
        (encoded(tiles("I;16", 300), "PNG"), ["16-bit grey to 8-bit"]),
        (encoded(tiles("CMYK", INKS[0]), "TIFF"), ["CMYK to RGB"]),
        (encoded(tiles("LAB", (50, 9, 9)), "TIFF"), ["LAB to RGB"]),
        (encoded(tiles("RGBA", HALF), "PNG"), ["transparency filled"]),
        (encoded(palette(), "PNG", transparency=1), ["transparency filled"]),
        (encoded(tiles("RGB", RED), "PNG", exif=encoded_orientation(6)), ["turned upright"]),
        (encoded(tiles("RGB", RED), "GIF", save_all=True, append_images=[tiles("RGB", BLUE)]), ["first of several frames"]),
        (encoded(tiles("RGB", RED), "GIF", save_all=True), []),
    ],
)  # fmt: skip
def test_notes_say_what_was_done_to_the_pixels(tmp_path, data, expected):
    notes = ["before"]
    images.read_image(written(tmp_path, data), notes=notes)
    assert notes == ["before", *expected]


def test_the_suffixes_are_those_of_what_is_read():
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in images._formats()}
    assert images.PICTURE_SUFFIXES - {".jfif", ".jpe"} <= known | {".hif"}
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"} <= images.PICTURE_SUFFIXES

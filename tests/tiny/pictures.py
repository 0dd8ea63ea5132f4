"""Small picture files with known content, for the tests of what reads them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

from PIL import Image

RED, GREEN, BLUE, WHITE, BLACK = (200, 30, 40), (20, 180, 60), (30, 60, 220), (255, 255, 255), (0, 0, 0)


def tiles(mode: str, *values) -> Image.Image:
    """A row of flat 16x16 tiles, so that a JPEG's 8x8 blocks hold one colour each."""
    picture = Image.new(mode, (16 * len(values), 16))
    for index, value in enumerate(values):
        picture.paste(value, (16 * index, 0, 16 * index + 16, 16))
    return picture


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG by the book, for kinds that Pillow does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + png_chunk(b"IEND", b"")


def png_row(depth: int, colour_type: int, *pixels: bytes, before: bytes = b"") -> bytes:
    return png(len(pixels), 1, depth, colour_type, b"\0" + b"".join(pixels), before)


def noise(size: int) -> Image.Image:
    return Image.frombytes("RGB", (size, size), random.Random(0).randbytes(3 * size * size))


def user_comment(value: bytes | str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = value
    return exif


def written(tmp_path: Path, data: bytes, name: str = "picture.png") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path

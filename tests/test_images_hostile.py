"""Damaged, foreign and hostile files get one line and no harm; texts inside pictures come back as they were."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from src import images
from src.errors import ExitCode, UserError
from tests.tiny.faults import POSIX, seconds
from tests.tiny.pictures import RED, encoded, noise, png, png_chunk, png_row, tiles, user_comment, written


def refusal(path: Path, code: ExitCode = ExitCode.REFUSED, read=images.read_image) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert caught.value.exit_code == code
    assert path.name in message
    assert "\n" not in message
    assert ";" in message
    return message


def read_or_refusal(read, path: Path):
    """What ``read`` returns, or its UserError; any other exception fails the test."""
    try:
        return read(path)
    except UserError as error:
        if error.exit_code != ExitCode.REFUSED or "\n" in str(error):
            raise
        return error


@pytest.mark.parametrize("kind", images._formats())
def test_a_truncated_file_is_refused_or_whole(tmp_path, kind):
    data = encoded(noise(48), kind)
    whole = images.read_image(written(tmp_path, data)).tobytes()
    refused_cuts = 0
    cuts = {len(data) * index // 40 for index in range(1, 40)} | {len(data) - back for back in range(1, 30)}
    for cut in sorted(cuts):
        path = written(tmp_path, data[:cut])
        picture = read_or_refusal(images.read_image, path)
        if isinstance(picture, UserError):
            refused_cuts += 1
        else:
            assert picture.tobytes() == whole, f"{kind} cut at {cut} of {len(data)}"
            assert cut > 0.95 * len(data)  # only what comes after the pixels may be missing
    assert refused_cuts >= 39 - 2


FOREIGN = {kind: encoded(tiles("RGB", RED), kind) for kind in ("ICO", "PPM", "TGA", "PCX", "DDS", "ICNS", "SGI", "EPS", "PDF")}
FOREIGN |= {kind: encoded(tiles("1", 0), kind) for kind in ("XBM", "MSP")}
FOREIGN |= {
    "nothing": b"",
    "one byte": b"\x89",
    "PSD": b"8BPS\0\1" + bytes(60),
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "HTML": b"<!DOCTYPE html><title>404</title>",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "pickle": b"\x80\x04cos\nsystem\n.",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_format_is_refused_whatever_its_name(tmp_path, kind):
    path = written(tmp_path, FOREIGN[kind])
    assert "no PNG, JPEG, WEBP, BMP, TIFF, GIF" in refusal(path)
    refusal(path, read=images.read_text_chunks)


@pytest.mark.parametrize("picture", [tiles("F", 0.5, 1.0), tiles("I", 0, 70_000), tiles("I", -5, 5)])
def test_pixels_without_a_white_are_refused(tmp_path, picture):
    assert "no fixed white" in refusal(written(tmp_path, encoded(picture, "TIFF"), "x.tiff"))


@POSIX
def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with seconds(5):
        for read in (images.read_image, images.read_mask, images.read_text_chunks):
            for name in ("pipe.png", "folder.png"):
                refusal(tmp_path / name, read=read)
            refusal(Path("/dev/zero"), read=read)
            refusal(tmp_path / "missing.png", ExitCode.NOT_FOUND, read=read)


def small_tiff_of_large_tiles(side: int) -> bytes:
    """16x16 pixels, said to be cut from one tile of side x side: what is decoded is the tile."""
    values = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 500}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(values)) + entries + bytes(4 + 1000)


def bombs() -> dict[str, bytes]:
    side = 20_000
    jpeg = encoded(tiles("RGB", RED), "JPEG")
    size_at = jpeg.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision, height, width
    tiff = bytearray(encoded(tiles("L", 7), "TIFF"))
    for tag in (256, 257):
        at = tiff.index(struct.pack("<H", tag), 8)
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
    return {
        "PNG": png(side, side, 8, 2, b"\0" * 1000),
        "PNG, 12,000": png(12_000, 12_000, 8, 2, b"\0" * 1000),  # where Pillow only warns
        "PNG, 9,500": png(9_500, 9_500, 8, 2, b"\0" * 1000),
        "BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1000, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(1000),
        "GIF": b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + b",\0\0\0\0" + bytes(99),
        "JPEG": jpeg[:size_at] + struct.pack(">HH", side, side) + jpeg[size_at + 4 :],
        "TIFF": bytes(tiff),
        "TIFF, large tile": small_tiff_of_large_tiles(12_000),
    }


@POSIX
@pytest.mark.parametrize("kind", bombs())
def test_a_decompression_bomb_costs_no_memory(tmp_path, kind):
    import resource

    path = written(tmp_path, bombs()[kind])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before_kb, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            message = refusal(path)
            spent_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
            assert "more than 89,000,000 pixels" in message, message
            assert spent_kb < 30_000, spent_kb
            assert time.perf_counter() - start < 1
            code = 0
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_limits_of_pixels_and_bytes(tmp_path, monkeypatch):
    path = written(tmp_path, encoded(noise(20), "PNG"))
    assert images.read_image(path, max_pixels=400).size == (20, 20)
    with pytest.raises(UserError, match="more than 399 pixels"):
        images.read_image(path, max_pixels=399)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    assert "limit 1,000" in refusal(path)


@pytest.mark.parametrize("kind", images._formats())
def test_random_damage_never_shows_a_traceback(tmp_path, kind):
    dice = random.Random(kind)
    good = encoded(
        noise(24), kind, **({"exif": user_comment(b"UNICODE\0" + "a".encode("utf-16-be"))} if kind == "JPEG" else {})
    )
    for trial in range(150):
        data = bytearray(good)
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(min(len(data), 2000) if trial % 2 else 80)] = dice.randrange(256)
        path = written(tmp_path, bytes(data))
        for read in (images.read_image, images.read_text_chunks):
            read_or_refusal(read, path)


# --- text


A1111 = "a fox, (fur:1.3)\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        A1111,
        "Füchse – “naïve”",
        "狐 🦊 a fox",
        "tab\tand\nnewline",
        "é" * 20_000,
        "🦊" * 16_000,
        "</script>&\\\"'",
    ],
)
def test_png_texts_come_back(tmp_path, text):
    path = written(tmp_path, images.encode_png(noise(8), {"parameters": text, "other key": "2"}))
    assert images.read_text_chunks(path) == {"parameters": text, "other key": "2"}
    with Image.open(path) as picture:
        assert picture.text["parameters"] == text  # as other programs read it
        assert picture.tobytes() == noise(8).tobytes()


def test_a_saved_picture_carries_its_texts_and_takes_the_next_number(tmp_path):
    picture = noise(8)
    picture.info = {"parameters": A1111, "recipe": "{}", "time_s": 1.5, "icc_profile": b"rubbish"}
    saved = [images.save_picture(picture, tmp_path, "gen_20260102_030405", start=1) for _ in range(2)]
    assert [path.name for path in saved] == ["gen_20260102_030405_001.png", "gen_20260102_030405_002.png"]
    for path in saved:
        assert images.read_text_chunks(path) == {"parameters": A1111, "recipe": "{}"}
        with Image.open(path) as stored:
            assert stored.info.keys() == {"parameters", "recipe"}


def test_latin_1_goes_to_text_and_the_rest_to_itxt():
    assert b"tEXtparameters\0caf\xe9" in images.encode_png(noise(8), {"parameters": "café"})
    assert b"iTXtparameters\0\0\0\0\0" + "狐".encode() in images.encode_png(noise(8), {"parameters": "狐"})


def test_what_could_steer_a_terminal_is_dropped(tmp_path):
    hostile = "a\0b\x1b[2J\x07\x9b31m\r\n\tc\x7f\ud800d"
    clean = "ab[2J31m\n\tcd"
    path = written(tmp_path, images.encode_png(noise(8), {"parameters": hostile}))
    assert images.read_text_chunks(path) == {"parameters": clean}
    raw = png_chunk(b"tEXt", b"k\x1b[2J\0a\x1b]0;x\x07b\x85\r\nc")
    assert images.read_text_chunks(written(tmp_path, png_row(8, 0, b"\0", before=raw))) == {"k[2J": "a]0;xb\nc"}


PACKED = zlib.compress("fox 狐".encode())
TEXTS = {
    "tEXt": (png_chunk(b"tEXt", b"key\0caf\xe9"), {"key": "café"}),
    "zTXt": (png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"caf\xe9")), {"key": "café"}),
    "iTXt": (png_chunk(b"iTXt", b"key\0\0\0de\0Wort\0" + "狐".encode()), {"key": "狐"}),
    "iTXt packed": (png_chunk(b"iTXt", b"key\0\1\0\0\0" + PACKED), {"key": "fox 狐"}),
    "iTXt not UTF-8": (png_chunk(b"iTXt", b"key\0\0\0\0\0a\xff"), {"key": "a\ufffd"}),
    "the last of two": (png_chunk(b"tEXt", b"key\0first") + png_chunk(b"tEXt", b"key\0last"), {"key": "last"}),
    "no text": (png_chunk(b"tEXt", b"key"), {"key": ""}),
    "an unknown chunk": (png_chunk(b"abCd", bytes(100_000)), {}),
    "64 KiB": (png_chunk(b"tEXt", b"k\0" + b"x" * 65_536), {"k": "x" * 65_536}),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("case", TEXTS)
def test_png_text_by_the_book(tmp_path, case, place):
    chunk, expected = TEXTS[case]
    data = png(1, 1, 8, 0, b"\0\0", **{place: chunk})
    assert images.read_text_chunks(written(tmp_path, data)) == expected


BAD_TEXTS = {
    "long tEXt": png_chunk(b"tEXt", b"k\0" + b"x" * 66_000),
    "long iTXt": png_chunk(b"iTXt", b"k\0\0\0\0\0" + b"x" * 66_000),
    "packed zTXt": png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(65_537))),
    "zTXt bomb": png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(60_000_000), 9)[:60_000]),
    "iTXt bomb": png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(60_000_000), 9)[:60_000]),
    "rubbish zTXt": png_chunk(b"zTXt", b"k\0\0rubbish"),
    "cut zTXt": png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"abc" * 100)[:-9]),
    "wrong checksum": png_chunk(b"tEXt", b"k\0v")[:-1] + b"\0",
    "sum of many": b"".join(png_chunk(b"tEXt", b"k%d\0" % index + b"x" * 60_000) for index in range(20)),
    "many": png_chunk(b"abCd", b"") * 200_001,
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_hostile_png_text_is_refused(tmp_path, case):
    with seconds(5):
        refusal(written(tmp_path, png(1, 1, 8, 0, b"\0\0", after=BAD_TEXTS[case])), read=images.read_text_chunks)


def test_texts_are_read_without_the_pixels(tmp_path):
    data = images.encode_png(noise(64), {"parameters": A1111})
    at = data.index(b"IDAT") + 4
    path = written(tmp_path, data[:at] + b"\xee" * 9000 + data[at + 9000 :])
    refusal(path)
    assert images.read_text_chunks(path) == {"parameters": A1111}


def test_a_truncated_png_is_refused(tmp_path):
    data = images.encode_png(noise(16), {"parameters": A1111})
    for cut in range(0, len(data) - 4, 7):  # the checksum of the end mark is not needed
        message = refusal(written(tmp_path, data[:cut]), read=images.read_text_chunks)
        assert cut < data.index(b"IDAT") + 4 or "ends too early" in message


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"UNICODE\0" + A1111.encode("utf-16-be"), A1111),
        (b"UNICODE\0" + A1111.encode("utf-16-le"), A1111),
        (b"UNICODE\0" + A1111.encode("utf-16"), A1111),
        (b"UNICODE\0" + "狐 🦊, Steps: 20".encode("utf-16-be"), "狐 🦊, Steps: 20"),
        (b"UNICODE\0" + "狐 🦊, Steps: 20".encode("utf-16-le"), "狐 🦊, Steps: 20"),
        (b"ASCII\0\0\0a fox", "a fox"),
        (b"\0\0\0\0\0\0\0\0f\xc3\xbcchse\0\0", "füchse"),
        (b"UNICODE\0\xd8\x00\0a\0\x1b", "\ufffda"),
        ("plain", "plain"),
        (b"short", None),
        (b"UNICODE\0", None),
    ],
)
def test_the_user_comment_of_jpeg_and_webp(tmp_path, kind, value, expected):
    path = written(tmp_path, encoded(noise(8), kind, exif=user_comment(value)))
    assert images.read_text_chunks(path) == ({} if expected is None else {"parameters": expected})


def test_a_long_user_comment_is_refused(tmp_path):
    path = written(tmp_path, encoded(noise(8), "WEBP", exif=user_comment(b"ASCII\0\0\0" + b"x" * 66_000)))
    refusal(path, read=images.read_text_chunks)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "JPEG", "WEBP", "PNG"])
def test_no_text_is_an_empty_answer(tmp_path, kind):
    path = written(tmp_path, encoded(noise(8), kind))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert images.read_text_chunks(path) == {}
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_a_huge_foreign_chunk_does_not_hide_the_wanted_one(tmp_path: Path) -> None:
    """InvokeAI and ComfyUI store whole workflows beside the few settings that are wanted."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("workflow", "x" * (1 << 20))
    chunks.add_itxt("graph", "y" * (1 << 20), zip=True)
    chunks.add_text("parameters", "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    assert images.read_text_chunks(tmp_path / "a.png", ["parameters"]) == {"parameters": "a cat"}
    with pytest.raises(UserError, match="64 KiB"):
        images.read_text_chunks(tmp_path / "a.png")

"""The only way to read a picture: every file becomes upright 8-bit sRGB, or one line that says why it cannot.

A picture is foreign data. A handful of formats are parsed and no others, the size is read from the header before anything is
decoded, and the whole picture is decoded at once, so that a damaged file is found here and not in the middle of a training.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import re
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, features

from src.errors import UserError, refused
from src.files import Announce, check_stem, publish_numbered, require_file

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_HAS_AVIF = features.check("avif")  # Pillow may have been built without
_HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None  # what iPhones save; not among the requirements
PICTURE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
    + ((".avif",) if _HAS_AVIF else ())
    + ((".heic", ".heif", ".hif") if _HAS_HEIF else ())
)
MAX_PIXELS = 89_000_000  # below the size at which Pillow itself begins to suspect a decompression bomb
MAX_FILE_BYTES = 256 << 20
WHITE = (255, 255, 255)
MAX_TEXT_BYTES = 64 << 10  # of one text chunk
_MAX_KEYWORD_BYTES = 256  # what stands before the text: a keyword of at most 79 bytes, a language tag, its translation
MAX_ALL_TEXT_BYTES = 1 << 20
MAX_PNG_CHUNKS = 200_000  # a 256 MB file in libpng's 8 KiB pieces has 33,000

# zlib level, measured on 512x512 (Pillow 13, zlib-ng): a smooth picture takes 17 ms and 190 kB at level 1, 27 ms and 155 kB
# at 4, 74 ms and 143 kB at 6, 1182 ms and 129 kB at 9; a noisy one takes 47 ms and 519 kB at 4, 6 and 9 alike.
PNG_COMPRESS_LEVEL = 4

_ORIENTATION_TAG, _EXIF_IFD_TAG, _USER_COMMENT_TAG = 0x0112, 0x8769, 0x9286
_PNG_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 0x0142, 0x0143
_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # C0 and C1 but tab and newline; lone surrogates


def read_image(
    path: Path, *, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS, notes: list[str] | None = None
) -> Image.Image:
    """Read a PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF or HEIC (its first frame) as an upright mode "RGB" picture in sRGB.

    AVIF where Pillow was built with it, HEIC where the package pillow-heif is installed.

    The EXIF orientation is applied, an ICC profile converted, transparency laid on ``background``, 16-bit grey scaled by
    1/256, CMYK and palettes converted. A damaged EXIF block or colour profile is passed over: the pixels are whole.
    ``max_pixels`` can lower the limit, not raise it. What was done to the pixels is added to ``notes`` in a word or two each.

    Raises UserError: not found; refused for another format, a damaged file, more pixels or bytes than the limits, a
    folder, pipe or device, or pixels without a defined white (floating point, integers beyond 16 bits).
    """
    with _open_picture(path, max_pixels) as image:
        image.load()
        if notes is not None:
            notes += _what_will_change(image)
        return plain(image, background)


def plain(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """What `read_image` makes of a picture that is decoded already."""
    colour, alpha = _split_alpha(image)
    picture = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        canvas = Image.new("RGB", picture.size, background)
        canvas.paste(picture, mask=alpha)
        picture = canvas
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        picture = picture.transpose(turn)
    picture.info = {}  # the profile and orientation are spent; saved again with the picture they would be applied twice
    return picture


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as :func:`read_image` returns it, by its header alone: the pixels may still be damaged.

    Raises what :func:`read_image` raises for a file that is no picture or too large.
    """
    with _open_picture(path) as image:
        if image.format == "PNG" and not any(map(path.read_bytes().__contains__, _PNG_ORIENTATION_MARKS)):
            return image.size  # else Pillow decodes all of a PNG, to find EXIF behind the pixels
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # of which Pillow gives the upright size itself
        return (image.height, image.width) if turned else image.size


def read_mask(image: Path | Image.Image) -> Image.Image:
    """An inpainting mask as mode "L": white (255) is repainted, black (0) kept, grey in between blends.

    It is the grey value of the picture on black, so that white strokes on a transparent layer are a mask too; a mask drawn
    in the alpha channel alone, over no colour, is all black. Raises what :func:`read_image` raises.
    """
    black = (0, 0, 0)
    return (read_image(image, background=black) if isinstance(image, Path) else plain(image, black)).convert("L")


def fit_to(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    """Scale ``image`` to cover ``width_px`` x ``height_px`` and cut off what stands out, equally on both sides.

    Lanczos on the sRGB values. Averaging light itself would be truer physics, but diffusion models learnt pictures that
    were shrunk in sRGB, and other programs shrink so: the same photo has to give the same start here.
    """
    return ImageOps.fit(image, (width_px, height_px), Image.Resampling.LANCZOS)


def fitting_size(picture_px: tuple[int, int], native_px: int) -> tuple[int, int]:
    """The size to draw over a picture: its own, or, above twice the model's native area, scaled down to that area."""
    width_px, height_px = picture_px
    scale = min(1.0, (2 * native_px**2 / (width_px * height_px)) ** 0.5)
    width_px, height_px = (max(64, round(side * scale / 8) * 8) for side in (width_px, height_px))
    return width_px, height_px


def encode_png(image: Image.Image, text: dict[str, str]) -> bytes:
    """Return ``image`` as a PNG file with ``text`` in its chunks: tEXt where Latin-1 suffices, else UTF-8 in iTXt.

    Keys are 1-79 Latin-1 characters. Control characters other than newline and tab are dropped from the values, as they
    are when read, so :func:`read_text_chunks` gives back what was stored (up to its limit of 64 KiB a chunk).
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_text(key, _printable(value))
    file = io.BytesIO()
    plain = image.copy()
    plain.info = {}  # from there Pillow would take a colour profile or a transparent colour along
    plain.save(file, "PNG", pnginfo=chunks, compress_level=PNG_COMPRESS_LEVEL)
    return file.getvalue()


def save_picture(image: Image.Image, folder: Path, stem: str, start: int = 0, announce: Announce | None = None) -> Path:
    """Save as ``STEM_NNN.png`` under the first free number from ``start``, with the texts in ``image.info``; returns the path.

    Other values in ``image.info`` stay out of the file. Raises UserError: refused for a stem that is no plain file name,
    failure when the disk says no.
    """
    check_stem(folder, stem, f"{start:03d}")
    text = {key: value for key, value in image.info.items() if isinstance(value, str)}
    path = publish_numbered(folder, lambda number: f"{stem}_{number:03d}.png", encode_png(image, text), start, announce)
    return folder / path.name  # as the folder was given, not as it resolves


def read_text_chunks(path: Path, wanted: Collection[str] | None = None) -> dict[str, str]:
    """Return the texts that came with a picture, or the ``wanted`` ones, without decoding its pixels; {} for none.

    PNG: tEXt, zTXt and iTXt by keyword, the last of equal ones, before or after the pixels. JPEG and WebP: the EXIF
    UserComment as ``"parameters"``, which is where A1111 writes them. Control characters but newline and tab are removed,
    so a text can be printed. Raises UserError: not found; refused for a damaged file or more text than 64 KiB in a chunk
    or 1 MiB in all; what is not wanted may be of any size.
    """
    with _open_picture(path) as image:
        if image.format != "PNG":
            pairs = _read_user_comment(image)
        else:
            with open(path, "rb") as file:
                pairs = dict(_walk_png_texts(file, wanted))
    return {_printable(key): _printable(value) for key, value in pairs.items() if wanted is None or key in wanted}


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Return the pictures in a white grid, row by row, each with its label below, cut with an ellipsis where too long.

    A cell is as large as the largest picture. ``columns`` is by default the square root of their number, rounded up.
    Raises ValueError for no pictures, or not one label for each.
    """
    if not images or (labels is not None and len(labels) != len(images)):
        raise ValueError(f"{len(images)} pictures with {'no' if labels is None else len(labels)} labels make no sheet")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    margin = max(4, width // 64)
    font = ImageFont.load_default(max(11, width // 24))
    label_height = 0 if labels is None else math.ceil(1.5 * font.size)
    step_x, step_y = width + margin, height + label_height + margin
    sheet = Image.new("RGB", (margin + columns * step_x, margin + math.ceil(len(images) / columns) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = margin + index % columns * step_x, margin + index // columns * step_y
        sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
        if labels is not None:
            draw.text((x, y + height + label_height // 2), _shorten(labels[index], font, width), "black", font, anchor="lm")
    return sheet


@contextmanager
def _open_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open a picture of bounded size by its header; whatever is raised while it is read becomes one line."""
    size_bytes = require_file(path).st_size
    if size_bytes > MAX_FILE_BYTES:
        raise refused(f"{path}: {size_bytes:,} bytes (limit {MAX_FILE_BYTES:,}); save it smaller or as JPEG")
    limit = min(max_pixels, MAX_PIXELS)
    try:
        # As an open file, not by its path: Pillow would map some files into memory, and a change on disk would kill us.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # "Corrupt EXIF data" and the like are for programmers
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as image:
                if _decoded_pixels(image) > limit:
                    raise Image.DecompressionBombError
                yield image
    except (UserError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise refused(f"{path}: declares more than {limit:,} pixels; make the picture smaller first") from None
    except Image.UnidentifiedImageError:
        known = f"{', '.join(_formats()[:-1])} or {_formats()[-1]}"
        raise refused(f"{path}: is no {known} picture, or its header is damaged; convert it to PNG") from None
    except Exception as error:  # Pillow's parsers raise whatever they stumble over: OSError, SyntaxError, struct.error ...
        cause = " ".join(_printable(str(getattr(error, "strerror", None) or error)).split())[:120] or type(error).__name__
        raise refused(f"{path}: cannot be read ({cause}); copy it again or save it anew as PNG") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that are parsed here: those always, AVIF and HEIF where this machine can."""
    if _HAS_HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return FORMATS + (("AVIF",) if _HAS_AVIF else ()) + (("HEIF",) if _HAS_HEIF else ())


def _decoded_pixels(image: Image.Image) -> int:
    """Pixels that decoding has to hold: those of the picture, or of a TIFF's tile, which may be far larger than the picture."""
    tags = getattr(image, "tag_v2", {})
    return max(image.width * image.height, tags.get(_TILE_WIDTH_TAG, 0) * tags.get(_TILE_LENGTH_TAG, 0))


def _what_will_change(image: Image.Image) -> Iterator[str]:
    """What :func:`read_image` does to this loaded picture, for the report of a data set."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a JPEG with a second view for 3D
        yield "first of several frames"
    if image.mode.startswith("I"):
        yield "16-bit grey to 8-bit"
    elif image.mode not in ("RGB", "RGBA", "L", "LA", "P", "PA", "1"):
        yield f"{image.mode} to RGB"
    if image.has_transparency_data:
        yield "transparency filled"
    if image.info.get("icc_profile"):
        yield "colour profile to sRGB"
    if _orientation(image) in _UPRIGHT:
        yield "turned upright"


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return 8-bit colour, and 8-bit alpha (mode "L") where the picture has any."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white")
    if image.mode.startswith("I"):  # 16-bit grey, as I;16, I;16B or in 32 bits; convert() would clip nearly all to white
        wide = image.convert("I")
        darkest, brightest = wide.getextrema()
        if darkest < 0 or brightest > 0xFFFF:
            raise ValueError("grey values beyond 16 bits have no fixed white")
        key = image.info.get("transparency")
        alpha = None if key is None else wide.point([0 if value == key else 255 for value in range(1 << 16)], "L")
        return wide.point([value >> 8 for value in range(1 << 16)], "L"), alpha
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")  # stays grey, for a grey ICC profile
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return image, None


def _to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """Convert to mode "RGB" in sRGB; a profile that is damaged or made for another kind of picture is passed over."""
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if icc_profile:
        try:
            return ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)),
                ImageCms.createProfile("sRGB"),
                # What photographs are converted with: colours both can show stay, and black stays black.
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                outputMode="RGB",
            )
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged block raises anything; without it the picture is still a picture
        return 1


def _printable(text: str) -> str:
    """``text`` without what could steer a terminal or cannot be stored: control characters and lone surrogates."""
    return _NOT_PRINTABLE.sub("", text)


def _walk_png_texts(file: BinaryIO, wanted: Collection[str] | None) -> Iterator[tuple[str, str]]:
    """Yield (keyword, text) of each text chunk, passing over the pixels (PNG specification, sections 5.3 and 11.3.3)."""
    file.seek(8)  # the signature
    total_bytes = 0
    for _ in range(MAX_PNG_CHUNKS):
        length, kind = struct.unpack(">I4s", _read_exactly(file, 8))
        if kind == b"IEND":
            return
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        start = _read_exactly(file, min(length, _MAX_KEYWORD_BYTES))
        if wanted is not None and start.partition(b"\0")[0].decode("latin-1") not in wanted:
            file.seek(length - len(start) + 4, io.SEEK_CUR)
            continue
        if length > MAX_TEXT_BYTES + _MAX_KEYWORD_BYTES:
            raise ValueError(f"a text of more than {MAX_TEXT_BYTES >> 10} KiB")
        body = start + _read_exactly(file, length - len(start))
        if zlib.crc32(kind + body) != struct.unpack(">I", _read_exactly(file, 4))[0]:
            raise ValueError("a text chunk has a wrong checksum")
        keyword, text = _parse_png_text(kind, body)
        total_bytes += len(body) + len(text)
        if total_bytes > MAX_ALL_TEXT_BYTES:
            raise ValueError(f"more than {MAX_ALL_TEXT_BYTES >> 20} MiB of text")
        yield keyword, text
    raise ValueError(f"more than {MAX_PNG_CHUNKS:,} chunks")


def _parse_png_text(kind: bytes, body: bytes) -> tuple[str, str]:
    keyword, _, rest = body.partition(b"\0")
    compressed, encoding = False, "latin-1"
    if kind == b"zTXt":
        compressed, rest = True, rest[1:]  # one byte names the compression method; there is only one
    elif kind == b"iTXt":
        compressed, encoding = rest[:1] == b"\1", "utf-8"
        rest = rest[2:].split(b"\0", 2)[-1]  # language tag, translated keyword, text
    if compressed:
        unpacker = zlib.decompressobj()
        rest = unpacker.decompress(rest, MAX_TEXT_BYTES)
        if not unpacker.eof:
            raise ValueError(f"a packed text is damaged or unpacks to more than {MAX_TEXT_BYTES >> 10} KiB")
    return keyword.decode("latin-1"), rest.decode(encoding, errors="replace")


def _read_exactly(file: BinaryIO, size_bytes: int) -> bytes:
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise ValueError("the file ends too early")
    return data


def _read_user_comment(image: Image.Image) -> dict[str, str]:
    """The EXIF UserComment: eight bytes name its character set (EXIF 2.32, section 4.6.5), then comes the text."""
    try:
        comment = image.getexif().get_ifd(_EXIF_IFD_TAG).get(_USER_COMMENT_TAG, b"")
    except Exception:  # a damaged block raises anything, and holds no text to be had
        return {}
    if isinstance(comment, str):  # stored as ASCII, against the standard
        comment = b"ASCII\0\0\0" + comment.encode()
    if len(comment) > MAX_TEXT_BYTES:
        raise ValueError(f"a text of more than {MAX_TEXT_BYTES >> 10} KiB")
    charset, body = comment[:8], comment[8:]
    encoding = "utf-8"
    if charset.startswith(b"UNICODE"):
        # UTF-16, but the standard does not say in which byte order. Prompts and their settings hold Latin letters, and
        # those have their zero byte first in big-endian order (A1111 and piexif), last in little-endian.
        encoding = "utf-16-be" if body[0::2].count(0) >= body[1::2].count(0) else "utf-16-le"
    text = body.decode(encoding, errors="replace").lstrip("\ufeff").rstrip("\0 ")
    return {"parameters": text} if text else {}


def _shorten(label: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """One line of ``label`` that is at most ``width_px`` wide, accents dropped: the font that comes with Pillow has none."""
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", _printable(label)) if not unicodedata.combining(sign))
    line = " ".join(plain.split())
    if font.getlength(line) <= width_px:
        return line
    while line and font.getlength(line + "…") > width_px:
        line = line[:-1]
    return line.rstrip() + "…"

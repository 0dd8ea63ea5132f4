"""Pictures in rows and columns with labels at the edges, as one picture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

MAX_SHEET_PX = 8192  # a side: larger ones no viewer likes, and memory must not grow with the number of pictures
MAX_CELL_PX, MIN_CELL_PX = 512, 80
_ENLARGE_BELOW_PX = 192  # pictures of a small model are shown at twice their size, or no label would fit
_MAX_LINES = {"title": 3, "column": 4, "row": 8}
_PAPER, _INK, _SOFT, _EMPTY = "#ffffff", "#1d1f23", "#666b73", "#eceef0"


def cell_limit_px(columns: int, rows: int) -> int:
    """The longest side that a picture may have on a sheet of so many."""
    return max(MIN_CELL_PX, min(MAX_CELL_PX, MAX_SHEET_PX // (max(columns, rows) + 1)))


def shrunk(picture: Image.Image, limit_px: int) -> Image.Image:
    """A copy without texts, of at most that side: what a sheet keeps of a picture while others are drawn."""
    small = picture.convert("RGB")
    small.thumbnail((limit_px, limit_px), Image.Resampling.LANCZOS)
    small.info = {}
    return small


def draw_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    columns: Sequence[str],
    row_labels: Sequence[str],
    title: str = "",
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A sheet of ``rows`` of pictures, None where there is none, with a label above each column and before each row.

    ``captions``, one for each picture, stand below in one line. Labels are wrapped and, where too long, cut with an ellipsis.
    Raises ValueError for labels that are not one each.
    """
    if not rows or len(rows) != len(row_labels) or any(len(row) != len(columns) for row in rows):
        raise ValueError("a sheet takes a label for each row and column")
    largest = max((max(picture.size) for row in rows for picture in row if picture is not None), default=0)
    can_grow = 2 * largest * max(len(columns), len(rows)) <= MAX_SHEET_PX
    cells = [[_enlarged(picture) if picture is not None and can_grow else picture for picture in row] for row in rows]
    sizes = [picture.size for row in cells for picture in row if picture is not None] or [(_ENLARGE_BELOW_PX,) * 2]
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    font = _font(max(13, min(28, width // 16)))
    gap = max(6, width // 48)
    line = round(1.3 * font.size)
    label_width = min(width, max(round(font.getlength(text)) for text in row_labels)) + gap if any(row_labels) else 0
    sheet_width = gap + label_width + len(columns) * (width + gap)
    heading = _wrap(title, font, sheet_width - 2 * gap, _MAX_LINES["title"]) if title else []
    tops = [_wrap(text, font, width, _MAX_LINES["column"]) for text in columns]
    top = gap + (len(heading) * line + gap if heading else 0)
    first = top + max(map(len, tops)) * line + gap // 2
    step = height + gap + (line if captions else 0)
    sheet = Image.new("RGB", (sheet_width, first + len(cells) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, (gap, gap), font, _SOFT)
    for index, lines in enumerate(tops):
        x = gap + label_width + index * (width + gap)
        _write(draw, lines, (x, first - gap // 2 - len(lines) * line), font, _INK)
    for number, (row, label) in enumerate(zip(cells, row_labels)):
        y = first + number * step
        _write(draw, _wrap(label, font, label_width - gap, min(_MAX_LINES["row"], height // line)), (gap, y), font, _INK)
        for index, picture in enumerate(row):
            x = gap + label_width + index * (width + gap)
            if picture is None:
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill=_EMPTY)
            else:
                sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
            if captions:
                _write(draw, _wrap(captions[number][index], font, width, 1), (x, y + height), font, _SOFT)
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    if max(picture.size) >= _ENLARGE_BELOW_PX:
        return picture
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], place: tuple[int, int], font: ImageFont.FreeTypeFont, ink: str
) -> None:
    x, y = place
    for number, text in enumerate(lines):
        draw.text((x, y + round(1.3 * number * font.size)), text, ink, font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width_px: int, most: int) -> list[str]:
    """At most ``most`` lines that are not wider than ``width_px``, broken between words where that is possible."""
    lines: list[str] = []
    for word in "".join(sign if sign.isprintable() else " " for sign in text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width_px and len(word) > 1:
            size = next(size for size in range(len(word) - 1, 0, -1) if size == 1 or font.getlength(word[:size]) <= width_px)
            lines.append(word[:size])
            word = word[size:]
        lines.append(word)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width_px:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "…"]


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin with all accents, Greek, Cyrillic and more."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size_px)

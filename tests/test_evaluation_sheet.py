"""Sheets: every picture where its labels say, labels that fit, sizes that are bounded."""

import numpy
import pytest
from PIL import Image

from src.evaluation.sheet import MAX_SHEET_PX, _font, _wrap, cell_limit_px, draw_sheet, shrunk

COLOURS = [["red", "lime", "blue"], ["yellow", "cyan", "magenta"]]


def cells(size: tuple[int, int] = (200, 240)) -> list[list[Image.Image]]:
    return [[Image.new("RGB", size, colour) for colour in row] for row in COLOURS]


def test_every_picture_is_whole_and_in_its_place() -> None:
    sheet = numpy.asarray(draw_sheet(cells(), ["a", "b", "c"], ["one", "two"], "what all share"))
    centres = {}
    for row, colours in enumerate(COLOURS):
        for column, name in enumerate(colours):
            mask = (sheet == Image.new("RGB", (1, 1), name).getpixel((0, 0))).all(-1)
            assert mask.sum() == 200 * 240
            centres[row, column] = numpy.argwhere(mask).mean(0)
    for row, column in centres:
        if column:
            assert centres[row, column][1] > centres[row, column - 1][1]
        if row:
            assert centres[row, column][0] > centres[row - 1, column][0]


def test_labels_are_drawn_beside_their_pictures_and_nowhere_else() -> None:
    plain, labelled = (
        numpy.asarray(draw_sheet(cells(), ["", "", ""], [first, "two"], ""), dtype=int) for first in ("two", "one")
    )
    changed = numpy.argwhere((plain != labelled).any(-1))
    assert len(changed)
    assert changed[:, 0].max() < 240, "in the first row"
    assert (labelled[:, changed[:, 1].max() + 1 :] == plain[:, changed[:, 1].max() + 1 :]).all()
    assert changed[:, 1].max() < 60, "before the pictures"


def test_captions_stand_below_their_pictures() -> None:
    names = [["", "", ""], ["", "CLIP 20.1", ""]]
    sheet = numpy.asarray(draw_sheet(cells(), ["a", "b", "c"], ["one", "two"], "", names))
    plain = numpy.asarray(draw_sheet(cells(), ["a", "b", "c"], ["one", "two"], "", [[""] * 3] * 2))
    changed = numpy.argwhere((sheet != plain).any(-1))
    rows, columns = numpy.argwhere((sheet == (0, 255, 255)).all(-1)).T  # cyan: the second of the second row
    assert changed[:, 0].min() > rows.max()
    assert columns.min() <= changed[:, 1].min() <= changed[:, 1].max() <= columns.max()


def test_long_labels_are_wrapped_then_cut_and_never_wider_than_their_column() -> None:
    font = _font(16)
    text = "a watercolour of a lighthouse " * 9 + "Donaudampfschifffahrtsgesellschaftskapitän" * 2
    for most in (1, 3, 99):
        lines = _wrap(text, font, 150, most)
        assert len(lines) <= most
        assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join(_wrap(text, font, 150, 99)).replace(" ", "") == text.replace(" ", "")
    assert _wrap(text, font, 150, 2)[-1].endswith("…")
    assert _wrap("short", font, 150, 2) == ["short"]


def test_letters_of_other_alphabets_are_drawn() -> None:
    font = _font(20)
    missing = font.getmask("\uffff\uffff")
    assert all(bytes(font.getmask(text)) != bytes(missing) for text in ("Жу", "λά", "éß"))


def test_small_pictures_are_enlarged_and_gaps_are_grey() -> None:
    sheet = draw_sheet([[Image.new("RGB", (64, 64), "red"), None]], ["a", "b"], ["one"])
    pixels = numpy.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 128 * 128
    assert (pixels == (0xEC, 0xEE, 0xF0)).all(-1).sum() == 128 * 128


def test_sheets_are_bounded_and_small_copies_keep_no_texts() -> None:
    for columns, rows in ((1, 1), (3, 3), (32, 32), (60, 4), (2, 100)):
        limit = cell_limit_px(columns, rows)
        assert limit * max(columns, rows) <= MAX_SHEET_PX
        assert 80 <= limit <= 512
        size = draw_sheet([[Image.new("RGB", (limit, limit))] * columns] * rows, ["x"] * columns, ["y"] * rows).size
        assert max(size) <= 1.1 * MAX_SHEET_PX, "with gaps and labels"
    picture = Image.new("RGB", (900, 300))
    picture.info["parameters"] = "x"
    assert shrunk(picture, 100).size == (100, 33)
    assert shrunk(picture, 100).info == {}


def test_labels_are_one_each() -> None:
    with pytest.raises(ValueError, match="label"):
        draw_sheet(cells(), ["a", "b"], ["one", "two"])

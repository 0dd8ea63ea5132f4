"""``grid``: one sheet of pictures over two settings, ``--x steps=10,20,30 --y guidance=3,5,7.5``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import ExitCode, UserError, usage_error
from src.evaluation import drawing
from src.evaluation.axes import NO_LORA, Axis, check_axes, lora_label, parse_axis
from src.flags import Flag

if TYPE_CHECKING:
    from PIL import Image

SUMMARY = "a sheet of pictures over two settings, with labelled axes: prompt x seed, scheduler x steps, LoRA x checkpoint"
SHEET = "grid.png"
MAX_CELLS = 1024
_REPORT_PX = 256

_AXES = "prompt, seed, steps, guidance, scheduler, lora, lora_scale, model, clip_skip, strength or another setting"
FLAGS = (
    drawing.PROMPT,
    Flag(("--x",), f"NAME=VALUE,VALUE: the columns; NAME is {_AXES}; prompts are separated by |", metavar="AXIS"),
    Flag(("--y",), "the rows, in the same way", metavar="AXIS"),
    Flag(("--seed",), f"of every cell (default: {drawing.FIRST_SEED})", "generation.seed", int, "N"),
)


@dataclass(slots=True)
class Cell:
    """One place of the sheet, and what became of it."""

    row: int
    column: int
    order: drawing.Order
    picture: Image.Image | None = None  # small
    facts: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    drawing.add_flags(parser, FLAGS)


def run(options: argparse.Namespace, say: drawing.Say) -> int:
    """Draw all cells, save each with its recipe, and write the sheet and the report. Returns the exit code."""
    folder, typed = drawing.read_typed(options, say)
    x, y = _read_axes(typed, vars(options))
    cells = _plan(x, y, typed, say)
    from src.evaluation.sheet import cell_limit_px, shrunk

    limit_px = cell_limit_px(len(x.values), len(y.values) if y else 1)
    with drawing.Artist(say, [cell.order for cell in cells]) as artist:
        for cell in cells:
            place = f"cell-{cell.row + 1:02d}-{cell.column + 1:02d}"
            try:
                picture = artist.draw(cell.order)
            except UserError as error:
                if len(cells) == 1:
                    raise
                cell.facts = {"error": str(error)}
                say(f"cell    row {cell.row + 1}, column {cell.column + 1} is left empty: {error}")
                continue
            cell.picture = shrunk(picture, limit_px)
            cell.facts = drawing.facts_of(picture) | {"file": str(artist.save(picture, place).relative_to(folder))}
    paths = _write(folder, x, y, typed, cells)
    for path in paths:
        print(path)
    failed = sum(cell.picture is None for cell in cells)
    if failed == len(cells):
        raise UserError(f"grid: none of the {failed} cells could be drawn; the lines above say why")
    return ExitCode.PARTLY_FAILED if failed else ExitCode.OK


def _read_axes(typed: dict[str, Any], flags: Mapping[str, Any]) -> tuple[Axis, Axis | None]:
    texts = {flag: typed.pop(flag.lstrip("-"), None) for flag in ("--x", "--y")}
    if texts["--x"] is None:
        raise usage_error("grid: --x is missing; say what the columns are, e.g. --x steps=10,20,30")
    x, y = (None if text is None else parse_axis(flag, text) for flag, text in texts.items())
    axes = [axis for axis in (x, y) if axis is not None]
    check_axes(axes, flags)
    if "prompt" not in typed and all(axis.target != "prompt" for axis in axes):
        raise usage_error('grid: the prompt is missing; give --prompt "..." or an axis, e.g. --y "prompt=a cat|a dog"')
    return x, y


def _plan(x: Axis, y: Axis | None, typed: dict[str, Any], say: drawing.Say) -> list[Cell]:
    """All cells, each checked, in the order that loads the fewest models and exchanges the fewest adapters."""
    columns, rows = range(len(x.values)), range(len(y.values) if y else 1)
    if len(columns) * len(rows) > MAX_CELLS:
        raise usage_error(f"grid: {len(columns)} x {len(rows)} cells are more than {MAX_CELLS:,}; take values out")
    desk = drawing.OrderDesk(say)
    cells = []
    for row in rows:
        for column in columns:
            places = [(x, column), *([(y, row)] if y else [])]
            wanted = typed
            for axis, index in sorted(places, key=lambda place: place[0].name == "lora_scale"):  # it weighs what is there
                wanted = axis.over(wanted, index)
            cells.append(Cell(row, column, desk.order(wanted)))
    if {"lora", "lora_scale"} & {axis.name for axis in (x, y) if axis is not None}:
        drawing.refuse_tags([cell.order for cell in cells])
    if y is None or x.is_costly > y.is_costly:
        cells.sort(key=lambda cell: cell.column)
    return cells


def _write(folder: Path, x: Axis, y: Axis | None, typed: dict[str, Any], cells: Sequence[Cell]) -> list[Path]:
    """The sheet, the figures and the report; returns their paths."""
    from src import files, images, report
    from src.evaluation import results
    from src.evaluation.sheet import draw_sheet

    columns = [x.label(index) for index in range(len(x.values))]
    labels = [y.label(index) for index in range(len(y.values))] if y else [""]
    rows: list[list[Cell]] = [[None] * len(columns) for _ in labels]
    for cell in cells:
        rows[cell.row][cell.column] = cell
    title = " · ".join(_constants(x, y, typed, cells[0]))
    sheet = draw_sheet([[cell.picture for cell in row] for row in rows], columns, labels, title)
    path = files.publish_bytes(files.check_writable_folder(folder) / SHEET, images.encode_png(sheet, {"title": title}))
    result = {
        "title": title,
        "x": {"name": x.name, "values": x.values},
        "y": {"name": y.name, "values": y.values} if y else None,
        "cells": [{"row": cell.row, "column": cell.column, **cell.facts} for row in rows for cell in row],
    }
    table = [[label, *map(_figure, row)] for label, row in zip(labels, rows)]
    page = report.page(
        f"Grid: {x.name} × {y.name}" if y else f"Grid: {x.name}",
        report.text(title),
        report.section("Pictures", report.table([y.name if y else "", *columns], table)),
        report.section("Cells", report.table(*_facts(columns, labels, rows))),
    )
    return [path, results.publish(folder, "grid", result, page)]


def _constants(x: Axis, y: Axis | None, typed: dict[str, Any], cell: Cell) -> Iterator[str]:
    """What all cells share."""
    varied = {x.target, x.name} | ({y.target, y.name} if y else set())
    request, config = cell.order.request, cell.order.config
    if "prompt" not in varied:
        yield request.prompt
    if "model" not in varied:
        yield str(typed.get("model", config.model.model_id))
    has_none = any(axis.name == "lora" and NO_LORA in axis.values for axis in (x, y) if axis is not None)
    for text in [] if has_none else typed.get("lora", []):  # beside those of an axis; their weight where no axis varies it
        yield lora_label(text, has_weight="lora_scale" not in varied)
    shown = {"seed": "seed {}", "num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}", "scheduler": "{}"}
    for name, form in shown.items():
        if f"generation.{name}" not in varied:
            yield form.format(getattr(request, name))


def _figure(cell: Cell) -> str:
    from src import report

    return cell.facts["error"] if cell.picture is None else report.picture(cell.picture, max_px=_REPORT_PX)


def _facts(columns: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[Cell]]) -> tuple[list[str], list[list[Any]]]:
    """A line for each cell."""
    lines = [
        [label, name, str(cell.facts.get("seed", "")), cell.facts.get("time_s"), cell.facts.get("file") or cell.facts["error"]]
        for label, row in zip(labels, rows)
        for name, cell in zip(columns, row)
    ]
    return ["row", "column", "seed", "seconds", "file"], lines

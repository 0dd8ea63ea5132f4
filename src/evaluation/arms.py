"""Two arms of an experiment: the same prompts and seeds, drawn by one and by the other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.evaluation import drawing
from src.evaluation.inputs import plain_text

if TYPE_CHECKING:
    from PIL import Image

SHEET = "sheet.png"
MAX_SHOWN = 24  # rows of the sheet, evenly chosen; the report and the folder have all
_REPORT_PX = 256


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture: where it lies, its recipe in short, and a small copy."""

    path: Path
    facts: dict[str, Any]
    small: Image.Image

    @property
    def text(self) -> str:
        """What was drawn as plain text, for a network that reads no weights and tags."""
        return plain_text(self.facts["prompt"], self.facts["prompt_weights"])


@dataclass(frozen=True, slots=True)
class Arm:
    """All pictures of one side, in the order of prompts and seeds."""

    label: str
    shots: list[Shot]

    @property
    def seconds(self) -> float:
        """Of a picture: the median, since the first one also warms up."""
        return statistics.median(shot.facts["time_s"] for shot in self.shots)

    @property
    def paths(self) -> list[Path]:
        return [shot.path for shot in self.shots]


def order_arms(
    wanted: Mapping[str, Mapping[str, Any]], prompts: Sequence[str], seeds: Sequence[int], say: drawing.Say
) -> dict[str, list[drawing.Order]]:
    """The orders of each arm, {label: what was typed}: every prompt with every seed, checked. Raises UserError."""
    desk = drawing.OrderDesk(say)
    orders = {
        label: [desk.order({**typed, "prompt": prompt, "generation.seed": seed}) for prompt in prompts for seed in seeds]
        for label, typed in wanted.items()
    }
    if len({tuple(typed.get("lora", ())) for typed in wanted.values()}) > 1:
        drawing.refuse_tags([order for own in orders.values() for order in own])
    return orders


def draw_arms(orders: Mapping[str, Sequence[drawing.Order]], folder: Path, say: drawing.Say) -> list[Arm]:
    """Draw and save all orders, {label: those of an arm}, one arm after the other, and the sheet. Raises UserError."""
    from src import files
    from src.evaluation.sheet import cell_limit_px, shrunk

    limit_px = cell_limit_px(len(orders), min(max(map(len, orders.values())), MAX_SHOWN))
    arms = []
    with drawing.Artist(say, [order for own in orders.values() for order in own]) as artist:
        for letter, (label, own) in zip("ab", orders.items()):
            shots = []
            for number, order in enumerate(own, start=1):
                picture = artist.draw(order)
                path = artist.save(picture, f"{letter}-{number:03d}")
                shots.append(Shot(path, drawing.facts_of(picture), shrunk(picture, limit_px)))
            arms.append(Arm(label, shots))
    bare = sheet_of(arms, [[""] * len(arm.shots) for arm in arms])
    files.publish_bytes(folder / SHEET, bare)  # it shows what was drawn, even where the judges fail afterwards
    return arms


def sheet_of(arms: Sequence[Arm], captions: Sequence[Sequence[str]]) -> bytes:
    """A PNG with a column for each arm and a row for each prompt and seed; ``captions`` are those of an arm in each list."""
    from src import images
    from src.evaluation.sheet import draw_sheet

    count = len(arms[0].shots)
    chosen = range(count) if count <= MAX_SHOWN else [index * count // MAX_SHOWN for index in range(MAX_SHOWN)]
    rows = [[arm.shots[index].small for arm in arms] for index in chosen]
    below = [[own[index] for own in captions] for index in chosen] if any(map(any, captions)) else None
    title = "" if len(rows) == count else f"{len(rows)} of {count}"
    labels = [_pair(arms[0].shots[index]) for index in chosen]
    return images.encode_png(draw_sheet(rows, [arm.label for arm in arms], labels, title, below), {})


def pictures_table(arms: Sequence[Arm], captions: Sequence[Sequence[str]]) -> str:
    """The report's table of all pictures, each with its caption."""
    from src import report

    rows = [
        [
            _pair(arms[0].shots[index]),
            *(report.picture(arm.shots[index].small, own[index], _REPORT_PX) for arm, own in zip(arms, captions)),
        ]
        for index in range(len(arms[0].shots))
    ]
    return report.table(["prompt", *(arm.label for arm in arms)], rows)


def _pair(shot: Shot) -> str:
    return f"{shot.facts['prompt']} · seed {shot.facts['seed']}"

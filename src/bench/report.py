"""What a bench prints as it goes, and the same as docs/bench/<what>-<device>.md and .json, with hardware and versions."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from src import devices, files

# A line of words, or a row: the name of a column to its value. The first column says what the row is about.
Value = str | float | int
Row = Mapping[str, Value]
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
FIRST_COLUMN = 34  # characters


def device_name(cards: Collection[str] = ()) -> str:
    """What did the work: the card that torch takes, if it is one of these kinds (cuda, mps), else the CPU.

    A CPU is named with its arithmetic, which a rented machine's name may hide, and cores.
    """
    if cards and (card := _card_name(cards)):
        return card
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8", errors="replace"))
        model = found[1].strip() if found else model
    model += f" ({vectors})" if (vectors := devices.cpu_vectors()) else ""
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def _card_name(kinds: Collection[str]) -> str | None:
    """By torch, not by the driver: beside a torch for the CPU alone a card does nothing."""
    from src import base_models  # torch: seconds, which a report on the CPU need not take

    device = base_models.pick_device("auto")
    if device.type not in kinds:
        return None
    return "Apple GPU" if device.type == "mps" else base_models.name_of(device)


class Report:
    """Collects the lines of one bench and prints each at once."""

    def __init__(self, what: str, command: str, cards: Collection[str] = ()) -> None:
        """``cards``: as for ``device_name``."""
        self.what, self.command, self.device = what, command, device_name(cards)
        print(f"  {self.device}")
        self.items: list[str | Row] = []
        self._columns: tuple[str, ...] = ()

    def add(self, items: Iterable[str | Row]) -> None:
        """Print and keep; ``items`` may take hours to come."""
        for item in items:
            self.items.append(item)
            if isinstance(item, str):
                self._columns = ()
                print(f"  {item}", flush=True)
                continue
            if tuple(item) != self._columns:
                self._columns = tuple(item)
                print(f"  {_aligned(self._columns, self._columns)}", flush=True)
            print(f"  {_aligned(self._columns, [_text(value) for value in item.values()])}", flush=True)

    def write(self, folder: Path) -> Path:
        """Write both files and return the readable one's path."""
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.what}-{self.device}".lower()).strip("-")
        facts = {"device": self.device, "system": f"{platform.system()} {platform.machine()}"}
        facts |= {"Python": platform.python_version()} | _versions()
        files.check_writable_folder(folder)
        content = {"what": self.what, "command": self.command, **facts, "items": self.items}
        files.publish_bytes(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
        return files.publish_bytes(folder / f"{name}.md", self._markdown(facts).encode())

    def _markdown(self, facts: Mapping[str, str]) -> str:
        lines = [f"# {self.what}", "", ", ".join(f"{name} {value}" for name, value in facts.items()), "", f"`{self.command}`"]
        columns: tuple[str, ...] = ()
        for item in self.items:
            if isinstance(item, str):
                lines += ["", item]
                columns = ()
                continue
            if tuple(item) != columns:
                columns = tuple(item)
                lines += ["", _table_line(columns), _table_line(["---"] + ["---:"] * (len(columns) - 1))]
            lines.append(_table_line([_text(value) for value in item.values()]))
        return "\n".join([*lines, ""])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(columns: Iterable[str], cells: Iterable[str]) -> str:
    first, *rest = zip(columns, cells)
    return f"{first[1]:<{FIRST_COLUMN}}" + "".join(f"{cell:>{max(len(column), 6) + 2}}" for column, cell in rest)


def _text(value: Value) -> str:
    """Three figures of a number are all that a measurement is worth."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{2 if abs(value) >= 1 else 3}f}"
    return str(value)

"""python -m src.bench [start|swap|speed|quality|train] [--full] [--script PATH] : time what the project promises.

``--full`` draws and trains with a model of SD v1.5's shapes; ``--script`` names diffusers' train_text_to_image_lora.py
(src/bench/train.py).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from src.config import PROJECT_FOLDER
from src.errors import UserError

PARTS = ("start", "swap", "speed", "quality", "train")
RUNS = 10


def main(argv: list[str]) -> int:
    """Time the parts that are named, or all; a line of the report is printed as soon as it is known."""
    parser = argparse.ArgumentParser(prog="bench", add_help=False, allow_abbrev=False)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--script", type=Path)
    options, names = parser.parse_known_args(argv)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"error: there is no bench '{unknown[0]}'; there are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "start": _start, "swap": _swap, "speed": lambda: _speed(options.full), "quality": lambda: _quality(options.full),
        "train": lambda: _train(options.full, options.script),
    }  # fmt: skip
    try:
        for name in names or PARTS:
            print(f"\n{name}")
            for line in parts[name]():
                print(f"  {line}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _start() -> list[str]:
    """Doors that answer without torch, side by side with a bare interpreter."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "main.py --help": ["main.py", "--help"],
        "main.py --estimate-vram": ["main.py", "x", "--estimate-vram", "--max-vram", "4"],
        "main.py --widht 3 (a wrong flag)": ["main.py", "x", "--widht", "3"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(RUNS):  # in turn, so that a busy moment hits all alike
        for name, arguments in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=PROJECT_FOLDER, capture_output=True, check=False)
            times[name].append(time.perf_counter() - started)
    return [f"{name:<34} {statistics.median(values) * 1e3:6.0f} ms" for name, values in times.items()]


def _swap() -> list[str]:
    from src import quiet

    quiet.silence_libraries()
    from src.bench import swap

    with tempfile.TemporaryDirectory() as folder:
        return swap.run(Path(folder))


def _speed(full: bool) -> Iterator[str]:
    from src import quiet

    quiet.silence_libraries()
    from src.bench import speed

    with tempfile.TemporaryDirectory() as folder:
        yield from speed.run(Path(folder), full=full)


def _quality(full: bool) -> Iterator[str]:
    from src import quiet

    quiet.silence_libraries()
    from src.bench import quality

    with tempfile.TemporaryDirectory() as folder:
        yield from quality.run(Path(folder), full=full)


def _train(full: bool, script: Path | None) -> Iterator[str]:
    from src import quiet

    quiet.silence_libraries()
    from src.bench import train

    with tempfile.TemporaryDirectory() as folder:
        yield from train.run(Path(folder), full=full, script=script)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

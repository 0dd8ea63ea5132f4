"""python -m src.bench [start|swap] : time what the project promises, on this machine."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from src.config import PROJECT_FOLDER

PARTS = ("start", "swap")
RUNS = 10


def main(argv: list[str]) -> int:
    unknown = [name for name in argv if name not in PARTS]
    if unknown:
        print(f"error: there is no bench '{unknown[0]}'; there are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for name in argv or PARTS:
        print(f"\n{name}")
        for line in {"start": _start, "swap": _swap}[name]():
            print(f"  {line}")
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

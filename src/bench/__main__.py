"""python -m src.bench [start|swap|speed|memory|growth|quality|train|designs] [--full] : measure what the project promises.

``--full`` takes models of the well-known shapes with random weights. Others measured beside ours: ``--script PATH``, diffusers'
train_text_to_image_lora.py; ``--openvino PYTHON``, the interpreter of an environment with optimum-intel; ``--sdcpp PROGRAM``,
stable-diffusion.cpp's sd-cli; ``--compiled``, the stock script with torch.compile. The tables are printed as they come, and
written to ``--output DIR`` (docs/bench).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.bench.report import Report, Row
from src.config import PROJECT_FOLDER
from src.errors import ExitCode, UserError

PARTS = ("start", "swap", "speed", "memory", "growth", "quality", "train", "designs")
ON_CARD = ("memory", "quality", "train", "designs")  # where there is one; the others ask the CPU
RUNS, DRAWINGS = 10, 5
WRONG_FLAG = "--widht"
PROMPT = "a red circle on a white background"
STOCK_SCRIPT = f"""
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("models/embedded", dtype=torch.float32, safety_checker=None)
pipeline({PROMPT!r}, num_inference_steps=20, width=128, height=128)
"""


def main(argv: list[str]) -> int:
    """Time the parts that are named, or all; a line of the report is printed as soon as it is known."""
    parser = argparse.ArgumentParser(prog="bench", add_help=False, allow_abbrev=False)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--script", type=Path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--openvino", type=Path)
    parser.add_argument("--sdcpp", type=Path)
    parser.add_argument("--output", type=Path, default=PROJECT_FOLDER / "docs" / "bench")
    options, names = parser.parse_known_args(argv)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"error: there is no bench '{unknown[0]}'; there are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    parts: dict[str, Callable[[], Iterable[str | Row]]] = {
        "start": _start, "swap": lambda: _in_folder("swap"),
        "speed": lambda: _in_folder(
            "speed", full=options.full, compiled=options.compiled, openvino=options.openvino, sdcpp=options.sdcpp
        ),
        "memory": lambda: _in_folder("memory", full=options.full), "growth": lambda: _in_folder("growth", full=options.full),
        "quality": lambda: _in_folder("quality", full=options.full),
        "designs": lambda: _in_folder("designs", compiled=options.compiled),
        "train": lambda: _in_folder("train", full=options.full, script=options.script),
    }  # fmt: skip
    try:
        for name in names or PARTS:
            print(f"\n{name}")
            shown = ["PATH" if Path(word).is_absolute() else word for word in argv]  # whose machine it was is nobody's business
            command = " ".join(["python -m src.bench", *shown])
            report = Report(f"{name} full" if options.full else name, command, on_card=name in ON_CARD)
            report.add(parts[name]())
            print(f"  -> {report.write(options.output)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _start() -> Iterator[str | Row]:
    """Doors that answer without torch beside a bare interpreter; a whole run beside the script that everybody writes first."""
    yield f"median of {RUNS} runs in turn"
    commands = {
        "python -c pass": ["-c", "pass"],
        "main.py --help": ["main.py", "--help"],
        "main.py --estimate-vram": ["main.py", "x", "--estimate-vram", "--max-vram", "4"],
        f"main.py {WRONG_FLAG} 3 (a wrong flag)": ["main.py", "x", WRONG_FLAG, "3"],
    }
    for name, seconds in _time_in_turn(commands, RUNS).items():
        yield {"command": name, "ms": seconds * 1e3}
    yield f"a picture by the embedded model, 20 steps, process and all; median of {DRAWINGS} runs in turn"
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            "main.py",
            PROMPT,
            "--model",
            "embedded",
            "--steps",
            "20",
            "--seed",
            "1",
            "--output",
            folder,
            "--device",
            "cpu",
        ]
        sides = {"a stock diffusers script, fp32": ["-c", STOCK_SCRIPT]}
        sides |= {f"main.py, {precision}": [*asked, "--precision", precision] for precision in ("fp32", "auto")}
        times = _time_in_turn(sides, DRAWINGS)
    stock_s = next(iter(times.values()))
    for name, seconds in times.items():
        yield {"command": name, "s": seconds, "of the script": f"{seconds / stock_s:.0%}"}


def _time_in_turn(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, float]:
    """Median seconds of each, in turn, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, arguments in commands.items():
            started = time.perf_counter()
            done = subprocess.run([sys.executable, *arguments], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
            times[name].append(time.perf_counter() - started)
            if done.returncode != (ExitCode.USAGE if WRONG_FLAG in arguments else ExitCode.OK):
                raise UserError(f"bench start ({name}): {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return {name: statistics.median(values) for name, values in times.items()}


def _in_folder(part: str, **options: Any) -> Iterator[str | Row]:
    """Run a part that needs torch, in a folder for what it writes."""
    from src import quiet

    quiet.silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        yield from importlib.import_module(f"src.bench.{part}").run(Path(folder), **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

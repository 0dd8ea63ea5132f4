"""python -m src.bench [start|swap|speed|memory|growth|quality|train|designs] [--full] : measure what the project promises.

``--full`` takes models of the well-known shapes with random weights (speed, memory, growth, quality, train). Others measured
beside ours: ``--script PATH``, diffusers' train_text_to_image_lora.py (train); ``--openvino PYTHON``, the interpreter of an
environment with optimum-intel, and ``--sdcpp PROGRAM``, stable-diffusion.cpp's sd-cli (speed); ``--compiled``, the stock script
(speed) or our U-Nets (designs) with torch.compile. The tables are printed as they come, and written to ``--output DIR``
(docs/bench).
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.bench.report import Report, Row
from src.config import PROJECT_FOLDER
from src.errors import ExitCode, UserError, not_found, usage_error
from src.request import user_path

PARTS: Mapping[str, tuple[str, ...]] = {  # with the options that each takes
    "start": (), "swap": (), "speed": ("full", "compiled", "openvino", "sdcpp"), "memory": ("full",), "growth": ("full",),
    "quality": ("full",), "train": ("full", "script"), "designs": ("compiled",),
}  # fmt: skip
ON_CARD = {"memory": ("cuda",), "designs": ("cuda", "mps")}  # where torch has one; the others ask the CPU
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
    if {"--help", "-h"} & set(argv):
        print(__doc__.strip())
        return ExitCode.OK
    parser = argparse.ArgumentParser(prog="bench", add_help=False, allow_abbrev=False)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--script", type=user_path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--openvino", type=user_path)
    parser.add_argument("--sdcpp", type=user_path)
    parser.add_argument("--output", type=user_path, default=PROJECT_FOLDER / "docs" / "bench")
    options, names = parser.parse_known_args(argv)
    shown = [_shown(word) for word in argv]
    try:
        _check(names, options)
        for name in names or PARTS:
            _measure(name, {option: getattr(options, option) for option in PARTS[name]}, " ".join(shown), options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the rows measured so far are kept", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.OK


def _shown(word: str) -> str:
    """A word of the command without paths: whose machine it was is nobody's business."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}PATH" if Path(value).is_absolute() else word


def _check(names: Sequence[str], options: argparse.Namespace) -> None:
    """Refuse now what hours of measuring would end in. Raises UserError: usage; not found for a program or script."""
    if unknown := [name for name in names if name not in PARTS]:
        raise usage_error(f"there is no bench '{unknown[0]}'; there are: {', '.join(PARTS)}")
    taken = {option for name in names or PARTS for option in PARTS[name]}
    for option in ("full", "compiled", "script", "openvino", "sdcpp"):
        if getattr(options, option) and option not in taken:
            raise usage_error(f"--{option} changes nothing for {' and '.join(names)}; leave it out")
    for option in ("script", "openvino", "sdcpp"):
        path = getattr(options, option)
        if path is not None and not path.is_file():
            raise not_found(f"--{option} {path}: no such file; check the path")
        if path is not None and option != "script" and not os.access(path, os.X_OK):
            raise usage_error(f"--{option} {path}: is no program; name one that can be run")


def _measure(name: str, options: Mapping[str, Any], typed: str, folder: Path) -> None:
    """Run one part and write its table: of one that ended early beside an earlier one, not in its place."""
    print(f"\n{name}")
    what = f"{name} full" if options.get("full") else name
    report = Report(what, f"python -m src.bench {typed}", ON_CARD.get(name, ()))
    try:
        report.add(_start() if name == "start" else _in_folder(name, **options))
    except BaseException:  # Ctrl-C as well
        report.what += ", not finished"
        raise
    finally:
        if any(isinstance(item, Mapping) for item in report.items):
            print(f"  -> {report.write(folder)}")


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

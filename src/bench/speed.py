"""Seconds a picture and peak memory on this machine: ours beside the script that everybody writes first.

That script is ``StableDiffusionPipeline.from_pretrained(folder)`` and one call, in fp32 as it comes, and in bf16. Each side
loads and draws in a process of its own, in turn.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.bench import random_models
from src.config import PROJECT_FOLDER, AppConfig
from src.errors import UserError

PROMPT = "a red circle on a white background"
STEPS, GUIDANCE_SCALE = 20, 7.5
SIDES = ("stock fp32", "stock bf16", "ours fp32", "ours bf16")
PICTURES = 2  # a process; the first one is slower on both sides


@dataclass(frozen=True)
class Measured:
    """One process: seconds to load, of the first picture and of the next, and the most memory that it held."""

    load_s: float
    first_s: float
    next_s: float
    peak_bytes: int


def run(folder: Path, *, full: bool) -> Iterator[str]:
    """Draw with all sides and give the lines of the report. ``full``: a model of SD v1.5's shapes at 512x512, one round."""
    from src.model_files import EMBEDDED

    name, model, size_px, rounds = "embedded", EMBEDDED, 128, 3
    if full:
        name, model, size_px, rounds = "SD v1.5's shapes, random weights", random_models.write(folder / "model", "sd15"), 512, 1
    yield f"{name}, {size_px} px, {STEPS} steps, guidance on, batch size 1; median of {rounds} rounds in turn"
    yield f"{'':<12} {'load':>8} {'first':>8} {'next':>8} {'peak':>9}   a picture in"
    times: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            times[side].append(_measure(side, model, size_px))
    stock_s = _median(times[SIDES[0]], "next_s")
    for side, runs in times.items():
        load_s, first_s, next_s = (_median(runs, field) for field in ("load_s", "first_s", "next_s"))
        peak = _median(runs, "peak_bytes") / 1e9
        line = f"{side:<12} {load_s:6.1f} s {first_s:6.2f} s {next_s:6.2f} s {peak:6.2f} GB"
        yield f"{line}   1/{stock_s / next_s:.2f} of {SIDES[0]}'s time"


def _median(runs: list[Measured], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


def _measure(side: str, model: Path, size_px: int) -> Measured:
    command = [sys.executable, "-m", "src.bench.speed", side, str(model), str(size_px)]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"bench speed ({side}): {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


# What runs in the processes.


def load_stock(model: Path, size_px: int, precision: str) -> Callable[[], Any]:
    """The script's pipeline; each call draws a picture."""
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=dtype, safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "width": size_px, "height": size_px}
    return lambda: pipeline(PROMPT, **options)


def load_ours(model: Path, size_px: int, precision: str) -> Callable[[], Any]:
    """Our generator; each call draws a picture."""
    from src.generator import TextToImageGenerator

    config = AppConfig()
    config.model.model_id, config.model.precision, config.model.device = str(model), precision, "cpu"
    generator = TextToImageGenerator(config)
    generator.load_model()
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "width": size_px, "height": size_px}
    return lambda: generator.generate(PROMPT, seed=0, **options)


def main(arguments: list[str]) -> None:
    """One side in this process; the last line of the output is JSON."""
    from src import quiet

    quiet.silence_libraries()
    side, model, size_px = arguments
    kind, precision = side.split()
    ends = [time.perf_counter()]
    draw = (load_stock if kind == "stock" else load_ours)(Path(model), int(size_px), precision)
    ends.append(time.perf_counter())
    for _ in range(PICTURES):
        draw()
        ends.append(time.perf_counter())
    load_s, first_s, next_s = (after - before for before, after in itertools.pairwise(ends))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"load_s": load_s, "first_s": first_s, "next_s": next_s, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main(sys.argv[1:])

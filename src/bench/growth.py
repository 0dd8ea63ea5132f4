"""How time and memory grow with the picture, the batch and the number of prompts, and whether faster than they should.

The power of a step is log(ratio of what was measured) / log(ratio of the size). Of time it may be 2 with the number of
pixels, for attention's time is, else 1; of memory beyond the model's 1 at most, for attention works in pieces.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from src.bench import random_models
from src.bench.report import Row
from src.bench.sides import Drawing, measure, peak_memory_bytes
from src.config import PROJECT_FOLDER, AppConfig
from src.errors import UserError
from src.model_files import EMBEDDED

SIZES_PX, BATCHES, PROMPTS = (256, 512, 768, 1024), (1, 2, 4, 8), (1, 10, 100, 1000)
STEPS = 2
NOISE = 0.2  # of a power: what a measurement may be off


def run(folder: Path, *, full: bool) -> Iterator[str | Row]:
    """Draw ever more and give the lines of the report. ``full``: SD v1.5's shapes in bf16; else the embedded model in fp32."""
    model, precision, scale = EMBEDDED, "fp32", 2
    if full:
        model, precision, scale = random_models.write(folder / "model", "sd15", "bf16"), "bf16", 1
    name = "SD v1.5's shapes" if full else "embedded"
    yield f"{name}, {precision}; {STEPS} steps, guidance on; seconds of the second picture of a process"
    sizes = [size_px // scale for size_px in SIZES_PX]
    drawings = {f"{size}x{size}": (size**2, Drawing("ours", precision, str(model), size, STEPS)) for size in sizes}
    yield from _rows("size", drawings, expected=2)
    smallest = sizes[0]
    drawings = {
        f"batch size {count}": (count, Drawing("ours", precision, str(model), smallest, STEPS, batch_size=count))
        for count in BATCHES
    }
    yield from _rows("batch", drawings, expected=1)
    yield f"prompts one after the other in one process, embedded, {STEPS} steps"
    yield from _prompts()


def _rows(what: str, drawings: dict[str, tuple[int, Drawing]], expected: float) -> Iterator[Row]:
    """``expected`` is the largest power of time; that of memory, as far as drawing takes it, is 1."""
    before = None
    for name, (amount, drawing) in drawings.items():
        found = measure(drawing)
        drawing_bytes = max(1, found.peak_bytes - found.loaded_bytes)
        powers = ["", ""]
        if before is not None:
            steps = zip((found.next_s, drawing_bytes), before[1:])
            powers = [math.log(now / then) / math.log(amount / before[0]) for now, then in steps]
        row = {what: name, "s": found.next_s, "power": powers[0], "peak GB": found.peak_bytes / 1e9}
        row |= {"of it for drawing": drawing_bytes / 1e9, "its power": powers[1]}
        is_fast = before is not None and (powers[0] > expected + NOISE or powers[1] > 1 + NOISE)
        yield row | {f"at most {expected:g} and 1": "TOO FAST" if is_fast else "yes" if before else ""}
        before = amount, found.next_s, drawing_bytes


def _prompts() -> Iterator[Row]:
    done = subprocess.run(
        [sys.executable, "-m", "src.bench.growth"], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"bench growth: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    yield from map(json.loads, done.stdout.splitlines())


def main() -> None:
    """Draw prompt after prompt in this process; a line of JSON at each of PROMPTS."""
    from src import lean_imports, quiet

    quiet.silence_libraries()
    config = AppConfig()
    config.model.model_id, config.model.device = str(EMBEDDED), "cpu"
    with lean_imports.for_drawing(config.optimization):
        from src.generator import TextToImageGenerator
    generator = TextToImageGenerator(config)
    generator.load_model()
    generator.generate("a circle", seed=0, num_inference_steps=STEPS)
    started, done = time.perf_counter(), 0
    for count in PROMPTS:
        for number in range(done, count):
            generator.generate(f"a red circle on a white background, {number}", seed=number, num_inference_steps=STEPS)
        done = count
        print(
            json.dumps(
                {
                    "prompts": count,
                    "ms each": (time.perf_counter() - started) / count * 1e3,
                    "peak GB": peak_memory_bytes() / 1e9,
                }
            )
        )


if __name__ == "__main__":
    main()

"""How time and memory grow with the picture, the batch and the number of prompts: no step above the expected power.

The power of a step is log(ratio of what was measured) / log(ratio of the size). Attention's time goes with the square of
the number of pixels, all else with the number itself; memory with the number itself, for attention works in pieces.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from src.bench import random_models
from src.bench.report import Row
from src.bench.sides import Drawing, measure
from src.config import AppConfig
from src.model_files import EMBEDDED

SIZES_PX, BATCHES, PROMPTS = (256, 512, 768, 1024), (1, 2, 4, 8), (1, 10, 100, 1000)
STEPS = 2


def run(folder: Path, *, full: bool) -> Iterator[str | Row]:
    """Draw ever more and give the lines of the report. ``full``: SD v1.5's shapes in bf16; else the embedded model."""
    model, size_px = EMBEDDED, 128
    if full:
        model, size_px = random_models.write(folder / "model", "sd15", "bf16"), 256
    name = "SD v1.5's shapes, bf16" if full else "embedded, fp32"
    yield f"{name}; {STEPS} steps, guidance on; the second picture of a process, and what it held beyond the smallest"
    sizes = SIZES_PX if full else tuple(size // 2 for size in SIZES_PX)
    drawings = {
        f"{size}x{size}": (size**2, Drawing("ours", "bf16" if full else "fp32", str(model), size, STEPS)) for size in sizes
    }
    yield from _rows("size", drawings)
    drawings = {
        f"batch size {count}": (
            count,
            Drawing("ours", "bf16" if full else "fp32", str(model), size_px, STEPS, batch_size=count),
        )
        for count in BATCHES
    }
    yield from _rows("batch", drawings)
    yield f"prompts one after the other in one process, embedded, {STEPS} steps"
    yield from _prompts()


def _rows(what: str, drawings: dict[str, tuple[int, Drawing]]) -> Iterator[Row]:
    before = None
    for name, (amount, drawing) in drawings.items():
        found = measure(drawing)
        power = "" if before is None else math.log(found.next_s / before[1]) / math.log(amount / before[0])
        yield {what: name, "s": found.next_s, "power": power, "peak GB": found.peak_bytes / 1e9}
        before = amount, found.next_s


def _prompts() -> Iterator[Row]:
    from src.generator import TextToImageGenerator

    config = AppConfig()
    config.model.model_id, config.model.device = str(EMBEDDED), "cpu"
    generator = TextToImageGenerator(config)
    generator.load_model()
    generator.generate("a circle", seed=0, num_inference_steps=STEPS)
    started, done = time.perf_counter(), 0
    for count in PROMPTS:
        for number in range(done, count):
            generator.generate(f"a red circle on a white background, {number}", seed=number, num_inference_steps=STEPS)
        done = count
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        yield {"prompts": count, "ms each": (time.perf_counter() - started) / count * 1e3, "peak GB": peak_bytes / 1e9}

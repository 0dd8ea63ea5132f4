"""Predicted and measured peaks. On a card each row of the budget guide under its cap; on a CPU ours and the stock script's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from src import base_models
from src.bench import random_models
from src.bench.report import Row
from src.bench.sides import Drawing, measure
from src.errors import UserError
from src.memory_prediction import GIB
from src.model_files import EMBEDDED

STEPS = 2
# Card in GiB, model, picture: the budget guide, and what goes beyond.
CARDS = (
    (2.0, "small-sd", 512), (3.0, "sd15", 512), (4.0, "sd15", 512), (6.0, "sd15", 512), (8.0, "sdxl", 1024),
    (2.0, "sd15", 512), (6.0, "sdxl", 1024), (4.0, "sdxl", 1024),
)  # fmt: skip
ON_CPU = (("small-sd", 512), ("sd15", 512), ("sd21", 768), ("sdxl", 1024))


def run(folder: Path, *, full: bool) -> Iterator[str | Row]:
    """Draw and give the lines of the report. ``full``: models of the well-known shapes with random weights."""
    if base_models.pick_device("auto").type == "cuda":  # of a Mac the CPU is measured
        yield from _on_card(folder)
        return
    yield f"the process's resident memory at its peak, {STEPS} steps, guidance on; there is no card here"
    models = {"embedded": (EMBEDDED, 128)}
    if full:
        models = {name: (folder / name, size_px) for name, size_px in ON_CPU}
    for name, (model, size_px) in models.items():
        precision = "bf16" if name == "sdxl" else "fp32"  # on disk: as the models come; SDXL in half precision
        if full:
            random_models.write(model, name, precision)
        for side in ("stock fp32", "ours fp32", "ours bf16"):
            kind, run_in = side.split()
            if name == "sdxl" and run_in == "fp32":
                continue  # 14 GB, and minutes a step
            found = measure(Drawing(kind, run_in, str(model), size_px, STEPS, pictures=1))
            predicted = found.predicted_bytes
            error = f"{found.peak_bytes / predicted - 1:+.0%}" if predicted else ""
            yield {
                "model": f"{name}, {size_px} px, {side}", "predicted GiB": predicted / GIB if predicted else "",
                "measured GiB": found.peak_bytes / GIB, "error": error,
            }  # fmt: skip


def _on_card(folder: Path) -> Iterator[str | Row]:
    yield f"torch is held to what a card of this size leaves it; fp16, {STEPS} steps, guidance on"
    for cap_gib, name, size_px in CARDS:
        model = folder / name
        if not model.is_dir():
            random_models.write(model, name, "fp16")
        row = {"card": f"{cap_gib:g} GiB, {name}, {size_px} px"}
        try:
            found = measure(Drawing("ours", "fp16", str(model), size_px, STEPS, max_vram_gb=cap_gib))
        except UserError as error:
            yield row | {"plan": str(error), "predicted GiB": "", "measured GiB": "", "error": "", "s a picture": ""}
            continue
        yield row | {
            "plan": found.plan, "predicted GiB": found.predicted_bytes / GIB, "measured GiB": found.peak_bytes / GIB,
            "error": f"{found.peak_bytes / found.predicted_bytes - 1:+.0%}", "s a picture": found.next_s,
        }  # fmt: skip

"""Seconds a picture and peak memory on this machine: ours beside the script that everybody writes first, and its rivals.

Each side loads and draws in a process of its own, in turn.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from src import devices
from src.bench import random_models, sdcpp_side
from src.bench.report import Row
from src.bench.sides import Drawing, Measured, measure
from src.errors import usage_error
from src.model_files import EMBEDDED

STEPS = 20
STOCK = "stock fp32"


def run(
    folder: Path, *, full: bool, compiled: bool = False, openvino: Path | None = None, sdcpp: Path | None = None
) -> Iterator[str | Row]:
    """Draw with all sides and give the lines of the report. ``full``: a model of SD v1.5's shapes at 512x512, one round.

    ``compiled``: the script with a compiled U-Net, too; ``openvino``: the interpreter of an environment with optimum-intel;
    ``sdcpp``: the program sd-cli, which knows the full-size shapes only.
    """
    name, model, size_px, rounds = "embedded", shutil.copytree(EMBEDDED, folder / "embedded"), 128, 3
    if full:
        name, model = "SD v1.5's shapes, random weights in fp32", random_models.write(folder / "model", "sd15")
        size_px, rounds = 512, 1
    if sdcpp is not None and not full:
        raise usage_error("--sdcpp needs --full: stable-diffusion.cpp knows the shapes of well-known models only")
    left_out = {"compiled": not compiled, "OpenVINO": openvino is None, "stable-diffusion.cpp": sdcpp is None}
    # Where nothing says what the CPU can, all is measured.
    has_bf16 = devices.cpu_has_bf16() or devices.cpu_vectors() is None
    sides = [side for side in sides_of(has_bf16) if not left_out.get(side.split()[0])]
    yield f"{name}, {size_px} px, {STEPS} steps, guidance on, batch size 1; median of {rounds} rounds in turn; ratio by next s"
    times: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            kind, precision = side.split()
            pictures = 1 if full and kind == "stock" else 2  # whose first is no slower, and takes minutes
            drawing = Drawing(kind, precision, str(model), size_px, STEPS, pictures=pictures)
            python = openvino if kind == "OpenVINO" else None
            is_cpp = kind == "stable-diffusion.cpp"
            times[side].append(sdcpp_side.measure(drawing, sdcpp) if is_cpp else measure(drawing, python))
            if len(times[side]) == rounds:
                yield _row(side, times)
    if openvino is not None:
        (rival,) = {run.plan for side in sides if side.startswith("OpenVINO") for run in times[side]}
        yield f"{rival} by optimum-intel, static shapes, in the precision it chooses; all sides sample with DPM++ 2M"
    if not has_bf16:
        yield "this CPU is not known to multiply bf16, and would take hours to imitate it: those sides are left out"
    if sdcpp is not None:
        (options,) = {run.plan for run in times["stable-diffusion.cpp f16"]}
        yield f"stable-diffusion.cpp with {options}, one picture"


def sides_of(has_bf16: bool) -> tuple[str, ...]:
    """All that can be measured, program and precision; bf16 where the CPU multiplies it."""
    best = "bf16" if has_bf16 else "fp32"
    rivals = (f"compiled {best}", f"OpenVINO {best}", "stable-diffusion.cpp f16")
    return (STOCK, "stock bf16", *rivals, "ours fp32", "ours bf16") if has_bf16 else (STOCK, *rivals, "ours fp32")


def _row(side: str, times: dict[str, list[Measured]]) -> Row:
    load_s, first_s, next_s, peak_bytes = (
        statistics.median(getattr(run, field) for run in times[side]) for field in ("load_s", "first_s", "next_s", "peak_bytes")
    )
    stock_s = statistics.median(run.next_s for run in times[STOCK])
    return {
        "": side, "load s": load_s, "first s": first_s, "next s": next_s, "peak GB": peak_bytes / 1e9,
        "times as fast": stock_s / next_s,
    }  # fmt: skip

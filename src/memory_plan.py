"""Chooses the fastest placement that fits a card, within what the switches allow. No torch, no weights."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from src import devices
from src.config import MEMORY_MODES, QUANTIZATIONS, OptimizationConfig
from src.errors import UserError, usage_error
from src.memory_prediction import CPU, CPU_TILED, GIB, PLANS, RAN_OUT, Estimate, Placement, Request, offloaded_bytes, predict
from src.model_shapes import ModelShapes

# Windows' driver does not run out: near the limit it moves memory to the machine's own, and a picture takes minutes. ComfyUI,
# with more Windows users than anybody, keeps this much free there.
WINDOWS_RESERVE_BYTES = 600 << 20
# Decided anew for each request; all other switches when a model is loaded.
PLANNED = {
    "memory": "auto",
    "enable_vae_slicing": False,
    "enable_vae_tiling": False,
    "enable_model_cpu_offload": False,
    "enable_sequential_cpu_offload": False,
}
MODES = {"fast": None, "balanced": "model", "low": "group", "minimal": "sequential"}  # the offload that a mode begins with


@dataclass(frozen=True)
class Plan:
    """The chosen placement, and every other that was open: ``rejected`` are faster and do not fit, ``smaller`` come after."""

    placement: Placement
    estimate: Estimate
    fits: bool  # in the budget; without a card, in the main memory that is free, as far as that is known
    rejected: tuple[tuple[Placement, int], ...]  # with their peak in bytes
    smaller: tuple[tuple[Placement, int], ...]
    budget_bytes: int | None  # None: no card
    notes: tuple[str, ...] = ()  # what the user should know beside: a switch without effect, memory that is short
    quantize: str | None = None  # the form of the U-Net's matrices
    measured: Mapping[str, int] = field(default_factory=dict)  # placement -> bytes: what it took the last time
    way_out: str = ""  # where nothing fits: what would

    @property
    def peak_bytes(self) -> int:
        """What the plan needs: as measured, where it was, else as predicted."""
        return _peak(self.placement, self.estimate, self.measured)

    @property
    def rows(self) -> list[tuple[Placement, int, bool]]:
        """Every placement that was open, from fast to small, with its peak in bytes and whether that fits."""
        rows = (*self.rejected, (self.placement, self.peak_bytes), *self.smaller)
        budget, too_large = self.budget_bytes, [placement for placement, _ in self.rejected]
        return [
            (placement, peak, self.fits and placement not in too_large if budget is None else peak <= budget)
            for placement, peak in rows
        ]


def budget_of(options: OptimizationConfig) -> int | None:
    """``max_vram_gb`` in bytes; None where it is not set. Raises UserError (usage) for what is no amount of memory."""
    wanted_gib = options.max_vram_gb
    if wanted_gib is None:
        return None
    if not (math.isfinite(wanted_gib * GIB) and wanted_gib > 0):
        raise usage_error(f"--max-vram {wanted_gib:g} is no amount of memory; give GiB above 0, e.g. --max-vram 6")
    return int(wanted_gib * GIB)


def card_budget(free_bytes: int, options: OptimizationConfig) -> int:
    """Bytes that a plan may use of a card's free ones: all, less Windows' reserve there, or ``max_vram_gb``. Raises as that."""
    wanted_bytes = budget_of(options)
    usable_bytes = free_bytes - (WINDOWS_RESERVE_BYTES if devices.driver_spills() else 0)
    return usable_bytes if wanted_bytes is None else min(usable_bytes, wanted_bytes)


def _has_compiler() -> bool:
    """Whether torch.compile finds what turns its code into programs: triton needs one, too, but on Windows brings its own."""
    if sys.platform == "win32":
        return importlib.util.find_spec("triton") is not None or shutil.which("cl") is not None
    return any(map(shutil.which, ("g++", "c++", "clang++", "gcc", "cc", "clang")))


def check_switches(options: OptimizationConfig) -> None:
    """Refuse unknown modes and switches that contradict each other, before a model is loaded. Raises UserError (usage)."""
    budget_of(options)
    if options.enable_torch_compile and not _has_compiler():
        needed = "triton-windows (pip) for a card, Visual C++ for a CPU" if sys.platform == "win32" else "a C++ compiler (g++)"
        raise usage_error(f"--torch-compile needs {needed}; leave it out")
    if options.memory not in MEMORY_MODES:
        raise usage_error(f"memory '{options.memory}' is not known; choose {', '.join(MEMORY_MODES)}")
    if options.quantize not in (None, *QUANTIZATIONS):
        raise usage_error(f"quantize '{options.quantize}' is not known; choose {' or '.join(QUANTIZATIONS)}")
    if options.enable_model_cpu_offload and options.enable_sequential_cpu_offload:
        raise usage_error(
            "model offload and sequential offload exclude each other; set one (sequential needs less, and is slower)"
        )
    if options.enable_xformers and options.enable_attention_slicing:
        raise usage_error(
            "--xformers and --attention-slicing exclude each other: each is a way to compute attention; leave one out"
        )
    offload = _wanted_offload(options)
    if offload is not None and MODES.get(options.memory, offload) != offload:
        raise usage_error(f"{offload} offload and --memory {options.memory} contradict each other; leave one out")
    wanted = offload or MODES.get(options.memory)
    if options.quantize and wanted in ("group", "sequential"):
        raise usage_error(
            f"--quantize {options.quantize} and {wanted} offload exclude each other: quantised layers are moved whole; "
            "use --memory balanced, or leave --quantize out"
        )


def check_device(options: OptimizationConfig, device: str) -> None:
    """Refuse switches that the device cannot follow, before a model is fetched. ``device`` as configured or as torch calls it.

    Raises UserError (usage).
    """
    if options.enable_xformers:
        check_xformers(device)
    if device != "mps" and not (device == "auto" and devices.has_apple_gpu()):
        return
    if options.enable_attention_slicing:
        raise usage_error("--attention-slicing draws black pictures on a Mac (pytorch#187521); leave it out")
    if options.quantize:
        raise usage_error(f"--quantize {options.quantize} needs an NVIDIA card; leave it out")


def check_xformers(device: str) -> None:
    """Refuse xformers where it is not, or where it has no code. ``device`` as configured or as torch calls it."""
    if importlib.util.find_spec("xformers") is None:
        raise usage_error(
            "xformers is not installed; install it, or leave it out: torch's own attention is as fast on most cards"
        )
    if device in ("cpu", "mps") or (device == "auto" and not devices.detect_cards()):
        raise usage_error("--xformers needs an NVIDIA card; leave it out")


def no_card_to_quantize_on(kind: str) -> UserError:
    """The error for quantised weights on a CPU."""
    return usage_error(f"--quantize {kind} needs a card: on a CPU it is slower than without; leave it out")


def choose(
    shapes: ModelShapes,
    request: Request,
    budget_bytes: int | None,
    forced: OptimizationConfig,
    *,
    memory_bytes: int | None = None,
    measured: Mapping[str, int] | None = None,
) -> Plan:
    """Choose the fastest plan that fits ``budget_bytes`` (None: there is no card) and keeps to the switches that are set.

    When none fits, the smallest is returned with ``fits=False``; under ``memory="fast"`` the smallest that is all on the
    card. ``memory_bytes`` is the main memory that is free, where that is known: without a card plans are compared with it, and
    with one an offload that keeps more weights there is noted. ``measured`` are peaks in bytes of earlier runs of this very
    request, by placement: they stand for predictions; by placement and RAN_OUT what was too little. Raises UserError (usage)
    as ``check_switches`` does, and for quantised weights without a card.
    """
    check_switches(forced)
    if forced.quantize and budget_bytes is None:
        raise no_card_to_quantize_on(forced.quantize)
    candidates, measured = _candidates(budget_bytes is not None, forced, request), measured or {}
    if forced.disable_safety_checker:
        request = replace(request, safety_checker=False)
    estimates = [(placement, predict(shapes, request, placement)) for placement in candidates]
    if budget_bytes is None:  # tiles make a difference for pictures that are larger than one
        estimates = [item for item in estimates if item is estimates[0] or item[1].peak_bytes < estimates[0][1].peak_bytes]
    peaks = tuple((placement, _peak(placement, estimate, measured)) for placement, estimate in estimates)
    limit_bytes = memory_bytes if budget_bytes is None else budget_bytes
    fitting = [i for i, (_, peak) in enumerate(peaks) if limit_bytes is None or peak <= limit_bytes]
    chosen = fitting[0] if fitting else len(peaks) - 1
    if forced.memory == "fast" and budget_bytes is not None and candidates[chosen].offload is not None:
        chosen = max(i for i, placement in enumerate(candidates) if placement.offload is None)
    placement, estimate = estimates[chosen]
    fits = chosen in fitting
    plan = Plan(
        placement, estimate, fits, peaks[:chosen], peaks[chosen + 1 :], budget_bytes,
        quantize=request.quantize, measured=measured,
    )  # fmt: skip
    least_bytes = min(peak for _, peak in peaks)
    way_out = "" if fits or budget_bytes is None else _way_out(shapes, request, budget_bytes, forced, least_bytes)
    notes = (*_notes(plan, forced, memory_bytes, request), *_notes_of_offload(plan, shapes, request, memory_bytes))
    return replace(plan, notes=notes, way_out=way_out)


def _way_out(
    shapes: ModelShapes, request: Request, budget_bytes: int, forced: OptimizationConfig, least_bytes: int
) -> str:  # fmt: skip
    """The first of the switches that are set without which something fits; else a higher ``--max-vram``, if one was given,
    by the least that is needed with the others as they are; else a smaller picture or model."""
    free = {"memory": "auto", "enable_model_cpu_offload": False, "enable_sequential_cpu_offload": False}
    changes = {
        f"--memory {forced.memory}": free if MODES.get(forced.memory) else None,
        "--model-cpu-offload": free if forced.enable_model_cpu_offload else None,
        "--quantize nf4 in place of int8": {"quantize": "nf4"} if forced.quantize == "int8" else None,
        f"--quantize {forced.quantize}": {**free, "quantize": None} if forced.quantize else None,
        "--deep-cache": {} if request.deep_cache > 1 else None,
        "--attention-slicing": {"enable_attention_slicing": False} if request.attention_slicing else None,
    }
    for name, change in changes.items():
        if change is None:
            continue
        asked = replace(request, quantize=change.get("quantize", request.quantize))
        asked = replace(asked, deep_cache=1) if name == "--deep-cache" else asked
        asked = replace(asked, attention_slicing=False) if name == "--attention-slicing" else asked
        options = replace(forced, **change)
        peaks = [predict(shapes, asked, placement).peak_bytes for placement in _candidates(True, options, asked)]
        if any(peak <= budget_bytes for peak in peaks):
            return name if " in place of " in name else f"leaving out {name}"
    least_gib = math.ceil(10 * least_bytes / GIB) / 10
    is_held = forced.max_vram_gb is not None and budget_bytes >= 0.99 * forced.max_vram_gb * GIB  # else less than that is free
    return f"--max-vram {least_gib:g}" if is_held and least_gib > forced.max_vram_gb else "a smaller picture or model"


def _notes(plan: Plan, forced: OptimizationConfig, memory_bytes: int | None, request: Request) -> Iterator[str]:
    if forced.enable_vae_slicing:
        yield "--vae-slicing has no effect: pictures are encoded and decoded one at a time in any case"
    if plan.budget_bytes is not None:
        if not plan.fits and forced.memory == "fast":
            yield "all on the card is predicted not to fit; should memory run out, a smaller plan is taken"
        was_asked_for = "sequential" in (_wanted_offload(forced), MODES.get(forced.memory))
        if request.deep_cache > 1 and plan.placement.offload == "sequential" and not was_asked_for:
            yield "--deep-cache rules out group offload, which is faster than this plan"
        return
    if offload := _wanted_offload(forced):
        yield f"{offload} CPU offload has no effect without a card"
    if forced.memory != "auto":
        yield f"--memory {forced.memory} has no effect without a card"
    if forced.max_vram_gb is not None:
        yield f"--max-vram {forced.max_vram_gb:g} has no effect without a card"
    if not plan.fits:
        yield f"needs {plan.peak_bytes / GIB:.2f} of {memory_bytes / GIB:.2f} GiB of free memory; may swap"


def _notes_of_offload(plan: Plan, shapes: ModelShapes, request: Request, memory_bytes: int | None) -> Iterator[str]:
    """Of main memory, which holds what is not at work."""
    needed_bytes = offloaded_bytes(shapes, request)
    if plan.placement.offload is not None and memory_bytes is not None and needed_bytes > memory_bytes:
        free = f"of which {memory_bytes / GIB:.2f} GiB are free"
        yield f"keeps {needed_bytes / GIB:.2f} GiB of weights in main memory, {free}; may swap"


def _peak(placement: Placement, estimate: Estimate, measured: Mapping[str, int]) -> int:
    """A measurement covers denoising and decoding; that the prompt is encoded, before, is still predicted."""
    known = measured.get(placement.name)
    peak_bytes = estimate.peak_bytes if known is None else max(known, estimate.encode.total_bytes)
    return max(peak_bytes, measured.get(placement.name + RAN_OUT, 0))


def _candidates(has_card: bool, forced: OptimizationConfig, request: Request) -> list[Placement]:
    """The placements that keep to the switches, from fast to small. A mode is where they begin, a switch is the only one."""
    if not has_card:
        return [CPU_TILED] if forced.enable_vae_tiling else [CPU, CPU_TILED]
    offload, first = _wanted_offload(forced), MODES.get(forced.memory)
    order = [None, "model", "group", "sequential"]
    return [
        placement
        for placement in PLANS
        if placement.on_card
        and (offload is None or placement.offload == offload)
        and order.index(placement.offload) >= order.index(first)
        and (placement.vae_tiling or not forced.enable_vae_tiling)
        and (forced.quantize is None or placement.offload in (None, "model"))  # others move parts of a layer
        and (request.deep_cache == 1 or placement.offload != "group")  # which expects the blocks in their order
    ]


def _wanted_offload(forced: OptimizationConfig) -> str | None:
    return "model" if forced.enable_model_cpu_offload else "sequential" if forced.enable_sequential_cpu_offload else None

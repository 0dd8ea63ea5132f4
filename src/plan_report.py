"""A memory plan in words: one line of it, and the table of every plan that was open."""

from __future__ import annotations

from src.memory_plan import Plan
from src.memory_prediction import ALLOCATOR_LOSS, GIB


def describe(plan: Plan) -> str:
    """One line: the plan, its peak (as measured, else as predicted) of the budget, and what it consists of (GiB)."""
    words = plan.placement.name.replace("-", " ").replace("+vae", " + VAE").replace("gpu", "GPU").replace("cpu", "CPU")
    quantized = f", {plan.quantize} U-Net" if plan.quantize else ""
    predicted = f"predicted peak {plan.estimate.peak_bytes / GIB:.2f} GiB"
    if is_measured := plan.placement.name in plan.measured:
        predicted = f"measured peak {plan.peak_bytes / GIB:.2f} GiB"
    of_budget = "" if plan.budget_bytes is None else f" of {plan.budget_bytes / GIB:.2f} GiB"
    parts = f"weights {plan.estimate.weights_bytes / GIB:.2f}, activations {plan.estimate.denoise.activations_bytes / GIB:.2f}"
    parts += f", decode {plan.estimate.decode.activations_bytes / GIB:.2f}"
    if is_measured:
        parts = f"predicted {plan.estimate.peak_bytes / GIB:.2f}: {parts}"
    line = f"{words}{quantized}, {predicted}{of_budget} ({parts})"
    if plan.fits or plan.budget_bytes is None or plan.smaller:
        return line
    return f"{line}; even this plan does not fit, {plan.way_out} would"


def table(plan: Plan) -> str:
    """Every plan with its peak and whether it fits, then the phases of the chosen one. GiB, aligned columns."""
    rows = [f"{'plan':<26}{'peak GiB':>9}  fits"]
    for placement, peak_bytes, fits in plan.rows:
        mark = "  <- chosen" if placement is plan.placement else ""
        mark += "  (measured)" if placement.name in plan.measured else ""
        rows.append(f"{placement.name:<26}{peak_bytes / GIB:>9.2f}  {'yes' if fits else 'no'}{mark}".rstrip())
    rows += ["", f"{'the chosen plan by phase':<26}{'weights':>9}{'activations':>13}{'total':>9}"]
    for phase in plan.estimate.phases:
        sizes = f"{phase.weights_bytes / GIB:>9.2f}{phase.activations_bytes / GIB:>13.2f}{phase.total_bytes / GIB:>9.2f}"
        rows.append(f"{phase.name:<26}{sizes}")
    outside = f"{plan.estimate.denoise.outside_bytes / GIB:.2f} GiB outside torch's allocator"
    overhead = f"{outside} and {ALLOCATOR_LOSS:.0%} of the activations lost in it"
    return "\n".join([*rows, f"a total includes {overhead}", "", f"plan: {describe(plan)}"])

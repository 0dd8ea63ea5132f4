"""Plans a training within the memory that there is: gradient checkpointing where it is needed, advice where nothing fits.

No torch, no weights; what a plan needs is predicted by src/training_memory.py, or was measured by an earlier run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any

from src.estimate import find_model, find_place
from src.measured_peaks import MeasuredPeaks
from src.memory_prediction import ALLOCATOR_LOSS, CONTEXT_BYTES, GIB, RAN_OUT, Phase
from src.model_shapes import ModelShapes
from src.train_config import TrainRun
from src.training_memory import TrainingNeed, adapter_numbers, predict
from src.unet_weights import QUANTIZED_BYTES

RESOLUTION_STEP_PX = 64
MARGIN = 1.05  # so much more than what was too little is taken to be needed


@dataclass(frozen=True)
class TrainingPlan:
    """The decided settings, the memory of each phase, and whether that fits."""

    need: TrainingNeed  # with gradient_checkpointing decided
    phases: tuple[Phase, ...]
    budget_bytes: int | None  # None: no limit is known
    advice: tuple[str, ...] = ()  # where it does not fit: switches with which it would
    least: str = ""  # and where there are none: what all of them come to
    known: Mapping[str, int] = field(default_factory=dict)  # by `kind_of`, of earlier steps; with RAN_OUT: too little
    excess: float = 1.0  # what a step is taken to need over what is predicted, where nothing is known

    @property
    def measured_bytes(self) -> int | None:
        """What a step took, the last time."""
        return self.known.get(kind_of(self.need.gradient_checkpointing))

    @property
    def short_bytes(self) -> int | None:
        """What was too little for a step, the last time."""
        return self.known.get(kind_of(self.need.gradient_checkpointing) + RAN_OUT)

    def bytes_of(self, phase: Phase) -> int:
        """As measured, where it was, else as predicted."""
        if phase.name != "train":
            return phase.total_bytes
        known = max(self.measured_bytes or 0, round(MARGIN * (self.short_bytes or 0)))
        return known or round(self.excess * phase.total_bytes)

    @property
    def peak_bytes(self) -> int:
        return max(map(self.bytes_of, self.phases))

    @property
    def fits(self) -> bool:
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes


def kind_of(checkpoints_gradients: bool | None) -> str:
    """What a step's measured peak goes by."""
    return "gradient checkpointing" if checkpoints_gradients else "no gradient checkpointing"


def step_key(
    device: str, model: str, shapes: ModelShapes, need: TrainingNeed, run: TrainRun, *, are_several: bool = False
) -> str:
    """Everything that a step's peak depends on beside gradient checkpointing. ``device`` is the card's name."""
    train = run.train
    asked = replace(need, gradient_checkpointing=None, samples=False)  # a step needs the same, whatever is chosen there
    precision = {"auto": "no" if need.precision == "fp32" else need.precision}.get(train.mixed_precision, train.mixed_precision)
    parts = (
        "training", device, model, sum(shapes.parameters.values()), *astuple(asked), are_several, precision,
        train.gradient_accumulation_steps > 1, getattr(train, "dropout", 0), train.masked_loss,
    )  # fmt: skip
    return " | ".join(map(str, parts))


def choose(
    shapes: ModelShapes, need: TrainingNeed, budget_bytes: int | None, *, on_card: bool = True,
    known: Mapping[str, int] | None = None,
) -> TrainingPlan:  # fmt: skip
    """Decide on gradient checkpointing, if the user has not: only where the step would not fit without it.

    ``budget_bytes``: the card's memory, or the main memory that is free. Where nothing fits, the smaller plan is returned
    with ``fits=False`` and advice. ``known`` is what earlier steps of this very need took (see `TrainingPlan`).
    """
    plan = _smallest_that_fits(shapes, need, budget_bytes, on_card, known)
    if plan.fits:
        return plan
    step = next(phase for phase in plan.phases if phase.name == "train")
    advice, least = _advice(shapes, need, budget_bytes, on_card, max(1.0, plan.bytes_of(step) / step.total_bytes))
    return replace(plan, advice=tuple(advice), least=least)


def describe(plan: TrainingPlan) -> str:
    """One line: what is decided, the predicted peak of the budget, and the phase that makes it (GiB)."""
    need, budget = plan.need, plan.budget_bytes
    decided = [kind_of(need.gradient_checkpointing)]
    decided += [f"{need.quantize} U-Net"] if need.quantize else []
    largest = max(plan.phases, key=plan.bytes_of)
    parts = f"{largest.name}: weights {largest.weights_bytes / GIB:.2f}, activations {largest.activations_bytes / GIB:.2f}"
    of_budget = "" if budget is None else f" of {budget / GIB:.2f}"
    if largest.name != "train" or not plan.known or not (plan.measured_bytes or plan.short_bytes):
        line = f"{', '.join(decided)}, predicted peak {plan.peak_bytes / GIB:.2f}{of_budget} GiB ({parts})"
    elif plan.peak_bytes == plan.measured_bytes:
        line = f"{', '.join(decided)}, measured peak {plan.peak_bytes / GIB:.2f}{of_budget} GiB"
    else:
        now = "" if budget is None else f", and {budget / GIB:.2f} are free now"
        line = f"{', '.join(decided)}, ran out with {plan.short_bytes / GIB:.2f} GiB the last time{now}"
    if plan.fits:
        return line
    if plan.advice:
        return f"{line}; does not fit, {' or '.join(plan.advice)} would"
    return f"{line}; does not fit{plan.least}; use a smaller model"


@dataclass(frozen=True)
class Answer:
    """What a training would need, for a person (``text``) and for a program (``as_json``)."""

    model: str
    family: str
    device: str  # what is trained on, in words
    plan: TrainingPlan
    adapter_numbers: int
    is_card: bool

    def text(self) -> str:
        """Some lines of text: what is asked, the phases with their peaks, and the plan."""
        need = self.plan.need
        learns = "U-Net and text encoders" if need.text_encoders else "U-Net"
        weights = f"{need.quantize}, the rest {need.precision}" if need.quantize else need.precision
        what = f"adapter rank {need.rank}, {need.targets}" if need.part is None else f"learns  {need.part}"
        lines = [
            f"model   {self.model} ({self.family}), frozen weights in {weights}",
            f"{what}, {self.adapter_numbers:,} numbers ({learns}), {need.optimizer}",
            f"data    {need.resolution_px}x{need.resolution_px}, batch size {need.batch_size}",
            f"device  {self.device}",
            "",
            f"{'phase':<10}{'weights':>9}{'activations':>13}{'total':>9}  GiB",
        ]
        for phase in self.plan.phases:
            sizes = (phase.weights_bytes, phase.activations_bytes, phase.total_bytes)
            lines.append("{:<10}{:>9.2f}{:>13.2f}{:>9.2f}".format(phase.name, *(size / GIB for size in sizes)))
        overhead = f"{CONTEXT_BYTES / GIB:.2f} GiB outside torch's allocator and {ALLOCATOR_LOSS:.0%} of the activations"
        lines += [f"a total includes {overhead} lost in it", "", f"plan: {describe(self.plan)}"]
        return "\n".join(lines if self.is_card else [*lines, "to plan for a card that is not here, add --max-vram GB"])

    def as_json(self) -> dict[str, Any]:
        """The same as plain values. ``budget_bytes`` is the main memory that is free where there is no card."""
        plan = self.plan
        sizes = ("name", "weights_bytes", "activations_bytes", "total_bytes")
        phases = [{name: getattr(phase, name) for name in sizes} for phase in plan.phases]
        return {
            "model": self.model, "family": self.family, "device": self.device, **asdict(plan.need),
            "adapter_numbers": self.adapter_numbers, "predicted_peak_bytes": plan.peak_bytes,
            "budget_bytes": plan.budget_bytes, "fits": plan.fits, "advice": list(plan.advice), "phases": phases,
        }  # fmt: skip


def estimate(run: TrainRun) -> Answer:
    """Plan ``run`` for the card at hand, or one with ``train.max_vram_gb`` where there is none. Loads nothing.

    Raises UserError as `src.estimate.estimate` does.
    """
    config = run.app_config()
    config.optimization.max_vram_gb = run.train.max_vram_gb
    place = find_place(config)
    source, shapes = find_model(config)
    is_card = place.budget_bytes is not None
    of_the_machine = "fp32" if place.name == "mps" else place.precision  # what training takes there
    need = TrainingNeed.of(run.train, shapes.native_px, precision_of(run, of_the_machine))
    peaks = MeasuredPeaks(run.paths.folder("cache"))
    known = peaks.of(step_key(place.name, source.name, shapes, need, run)) if is_card else {}
    plan = choose(shapes, need, place.budget_bytes if is_card else place.memory_bytes, on_card=is_card, known=known)
    return Answer(source.name, shapes.family, place.words, plan, adapter_numbers(shapes, need), is_card)


def precision_of(run: TrainRun, of_the_machine: str) -> str:
    """What the frozen weights are in: as asked for, else as training computes, else what the machine is good at."""
    if run.model.precision != "auto":
        return run.model.precision
    return {"auto": of_the_machine, "no": "fp32"}.get(run.train.mixed_precision, run.train.mixed_precision)


def _smallest_that_fits(
    shapes: ModelShapes, need: TrainingNeed, budget_bytes: int | None, on_card: bool, known: Mapping[str, int] | None = None,
    excess: float = 1.0,
) -> TrainingPlan:  # fmt: skip
    wanted = need.gradient_checkpointing
    for checkpointing in (False, True) if wanted is None else (wanted,):
        decided = replace(need, gradient_checkpointing=checkpointing)
        plan = TrainingPlan(decided, predict(shapes, decided, on_card=on_card), budget_bytes, known=known or {}, excess=excess)
        step = next(phase for phase in plan.phases if phase.name == "train")
        if budget_bytes is None or plan.bytes_of(step) <= budget_bytes:  # nothing else becomes smaller by it
            break
    return plan


def _advice(
    shapes: ModelShapes, need: TrainingNeed, budget_bytes: int | None, on_card: bool, excess: float
) -> tuple[list[str], str]:
    """Single switches with which the training would fit; if there are none, what all of them come to.

    ``excess``: how much more than predicted a step of ``need`` takes; one of another need is taken to err alike.
    """
    smaller = {"--gradient_checkpointing": {"gradient_checkpointing": None}} if need.gradient_checkpointing is False else {}
    if need.batch_size > 1:
        smaller["--batch_size 1"] = {"batch_size": 1}
    if need.part is not None:
        smaller |= {"--optimizer adafactor": {"optimizer": "adafactor"}} if need.optimizer != "adafactor" else {}
        smaller |= {"--ema_decay none": {"ema": False}} if need.ema else {}
        smaller |= {"--train mid": {"part": "mid"}} if need.part != "mid" else {}
    elif need.quantize is None and on_card:
        smaller |= {f"--quantize {name}": {"quantize": name} for name in QUANTIZED_BYTES}
    if need.samples:
        smaller["--no-samples"] = {"samples": False}
    if need.text_encoders:
        smaller["no --train_text_encoder"] = {"text_encoders": False}

    def fits(change: dict[str, Any]) -> bool:
        return _smallest_that_fits(shapes, replace(need, **change), budget_bytes, on_card, excess=excess).fits

    found = [words for words, change in smaller.items() if fits(change)]
    sizes_px = range(need.resolution_px - RESOLUTION_STEP_PX, 255, -RESOLUTION_STEP_PX)
    found += [f"--resolution {size_px}" for size_px in sizes_px if fits({"resolution_px": size_px})][:1]
    if found or not smaller:
        return found, ""
    least = {name: value for change in smaller.values() for name, value in change.items()}
    peak = _smallest_that_fits(shapes, replace(need, **least), budget_bytes, on_card, excess=excess).peak_bytes
    words = [name for name in smaller if not name.startswith("--quantize") or name.endswith("nf4")]
    verb = "come" if len(words) > 1 else "comes"
    return [], f" ({' and '.join(words)} {verb} to {peak / GIB:.2f} GiB)"

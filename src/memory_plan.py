"""Predicts the peak memory of a run and chooses the fastest plan that fits. Bytes from shapes: no torch, no weights.

A run has three phases: the prompt is encoded, the latent is denoised, the picture is decoded. Each needs the weights that a
placement keeps on the card, and its activations (src/model_shapes.py). The peak is the largest phase, plus what torch's
allocator loses and what lies outside it. Allocated weights and activations, in GiB, against published measurements on NVIDIA
cards (where no losses are counted):

    predicted  published
        3.15       3.06   SD 1.x, 512x512, fp16, with safety checker  (diffusers' benchmark data set)
        4.94       4.35   the same, four pictures decoded at once
        8.85       8.96   SDXL, 1024x1024, bf16                       (sayakpaul/sample-datasets, A100)
       17.70      16.83   the same, fp32
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from src.config import OptimizationConfig
from src.errors import usage_error
from src.model_shapes import Config, ModelShapes, bundled_shapes, decoder_activation_bytes, read_shapes, unet_activation_bytes

__all__ = [
    "CPU", "PLANS", "VAE_TILE_PX", "Estimate", "ModelShapes", "Phase", "Placement", "Plan", "Request",
    "bundled_shapes", "choose", "describe", "predict", "read_shapes", "table",
]  # fmt: skip

GIB = 1 << 30
ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}

VAE_TILE_PX = 512  # a VAE's own tile is its training size: at that size it would not tile at all
CONTEXT_BYTES = GIB // 2  # outside the allocator: CUDA context and kernels; on a CPU, the interpreter and its libraries
ALLOCATOR_LOSS = 0.10  # of the activations: blocks are rounded up and split; weights are placed once and stay


@dataclass(frozen=True)
class Request:
    """What is to be drawn, as far as memory depends on it."""

    width_px: int
    height_px: int
    batch_size: int = 1
    guidance: bool = True  # doubles the U-Net's batch
    precision: str = "fp16"  # fp16 | bf16 | fp32
    lora_bytes: int = 0  # adapters, as they lie on the card
    safety_checker: bool = True  # counted only where the model ships one


@dataclass(frozen=True)
class Placement:
    """Where weights live and how the picture is decoded."""

    name: str
    offload: str | None = None  # None | "model": one component on the card | "sequential": one layer
    vae_slicing: bool = True  # one picture at a time; as fast as all at once
    vae_tiling: bool = False  # tiles of VAE_TILE_PX

    @property
    def on_card(self) -> bool:
        return self.name != "cpu"


CPU = Placement("cpu")
PLANS = (  # from fast to small; CPU is never chosen for a card
    Placement("gpu"),
    Placement("gpu+vae-tiling", vae_tiling=True),
    Placement("model-offload", offload="model"),
    Placement("model-offload+vae-tiling", offload="model", vae_tiling=True),
    Placement("sequential-offload", offload="sequential", vae_tiling=True),
    CPU,
)


@dataclass(frozen=True)
class Phase:
    """Memory of one phase of a run."""

    name: str  # encode | denoise | decode
    weights_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        return CONTEXT_BYTES + self.weights_bytes + round((1 + ALLOCATOR_LOSS) * self.activations_bytes)


@dataclass(frozen=True)
class Estimate:
    """The three phases in time order."""

    encode: Phase
    denoise: Phase
    decode: Phase

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        return self.encode, self.denoise, self.decode

    @property
    def weights_bytes(self) -> int:
        """The most weights that are resident at one time."""
        return max(phase.weights_bytes for phase in self.phases)

    @property
    def peak_bytes(self) -> int:
        return max(phase.total_bytes for phase in self.phases)


@dataclass(frozen=True)
class Plan:
    """The chosen placement, and every other that was open: ``rejected`` are faster and do not fit, ``smaller`` come after."""

    placement: Placement
    estimate: Estimate
    fits: bool
    rejected: tuple[tuple[Placement, int], ...]  # with their predicted peak in bytes
    smaller: tuple[tuple[Placement, int], ...]
    budget_bytes: int | None  # None: no card


def predict(shapes: ModelShapes, request: Request, placement: Placement) -> Estimate:
    """Predict the memory of a run. Raises UserError (usage) for an unknown precision."""
    if request.precision not in ELEMENT_BYTES:
        raise usage_error(f"precision '{request.precision}' is unknown; choose {', '.join(ELEMENT_BYTES)}")
    encoders = shapes.text_encoders
    return Estimate(
        encode=Phase(
            "encode",
            max((_resident_bytes(shapes, request, placement, name) for name in encoders), default=0),
            max((_text_activations(text, ELEMENT_BYTES[request.precision]) for text in encoders.values()), default=0),
        ),
        denoise=Phase(
            "denoise", _resident_bytes(shapes, request, placement, "unet"), _unet_activations(shapes, request, placement)
        ),
        decode=Phase(
            "decode", _resident_bytes(shapes, request, placement, "vae"), _decoder_activations(shapes, request, placement)
        ),
    )


def choose(shapes: ModelShapes, request: Request, budget_bytes: int | None, forced: OptimizationConfig) -> Plan:
    """Choose the fastest plan that fits ``budget_bytes`` (None: there is no card) and keeps to the switches that are set.

    When none fits, the smallest is returned with ``fits=False``. Raises UserError (usage) for contradictory switches.
    """
    candidates = _candidates(budget_bytes is not None, forced)
    if forced.disable_safety_checker:
        request = replace(request, safety_checker=False)
    estimates = [(placement, predict(shapes, request, placement)) for placement in candidates]
    peaks = tuple((placement, estimate.peak_bytes) for placement, estimate in estimates)
    fitting = [i for i, (_, peak) in enumerate(peaks) if budget_bytes is None or peak <= budget_bytes]
    chosen = fitting[0] if fitting else len(peaks) - 1
    placement, estimate = estimates[chosen]
    return Plan(placement, estimate, bool(fitting), peaks[:chosen], peaks[chosen + 1 :], budget_bytes)


def describe(plan: Plan) -> str:
    """One line: the plan, its predicted peak of the budget, and what it consists of (GiB)."""
    words = plan.placement.name.replace("-", " ").replace("+vae", " + VAE").replace("gpu", "GPU").replace("cpu", "CPU")
    of_budget = "" if plan.budget_bytes is None else f" of {plan.budget_bytes / GIB:.2f} GiB"
    parts = f"weights {plan.estimate.weights_bytes / GIB:.2f}, activations {plan.estimate.denoise.activations_bytes / GIB:.2f}"
    parts += f", decode {plan.estimate.decode.activations_bytes / GIB:.2f}"
    line = f"{words}, predicted peak {plan.estimate.peak_bytes / GIB:.2f} GiB{of_budget} ({parts})"
    return line if plan.fits else f"{line}; even this plan does not fit, a smaller picture or model would"


def table(plan: Plan) -> str:
    """Every plan with its predicted peak and whether it fits, then the phases of the chosen one. GiB, aligned columns."""
    rows = [f"{'plan':<26}{'peak GiB':>9}  fits"]
    for placement, peak_bytes in (*plan.rejected, (plan.placement, plan.estimate.peak_bytes), *plan.smaller):
        fits = plan.budget_bytes is None or peak_bytes <= plan.budget_bytes
        mark = "  <- chosen" if placement is plan.placement else ""
        rows.append(f"{placement.name:<26}{peak_bytes / GIB:>9.2f}  {'yes' if fits else 'no'}{mark}".rstrip())
    rows += ["", f"{plan.placement.name + ', by phase':<26}{'weights':>9}{'activations':>13}{'total':>9}"]
    for phase in plan.estimate.phases:
        sizes = f"{phase.weights_bytes / GIB:>9.2f}{phase.activations_bytes / GIB:>13.2f}{phase.total_bytes / GIB:>9.2f}"
        rows.append(f"{phase.name:<26}{sizes}")
    overhead = f"{CONTEXT_BYTES / GIB:.1f} GiB outside torch's allocator and {ALLOCATOR_LOSS:.0%} of the activations lost in it"
    return "\n".join([*rows, f"a total includes {overhead}", "", f"plan: {describe(plan)}"])


def _candidates(has_card: bool, forced: OptimizationConfig) -> list[Placement]:
    """The placements that keep to the switches, from fast to small."""
    if forced.enable_model_cpu_offload and forced.enable_sequential_cpu_offload:
        raise usage_error(
            "model offload and sequential offload exclude each other; set one (sequential needs less, and is slower)"
        )
    offload = "model" if forced.enable_model_cpu_offload else "sequential" if forced.enable_sequential_cpu_offload else None
    if not has_card:
        if offload:
            raise usage_error(f"{offload} offload moves weights off a card, and this run has none; leave the switch out")
        return [replace(CPU, vae_tiling=forced.enable_vae_tiling)]
    return [
        placement
        for placement in PLANS
        if placement.on_card
        and (offload is None or placement.offload == offload)
        and (placement.vae_tiling or not forced.enable_vae_tiling)
    ]


def _resident_bytes(shapes: ModelShapes, request: Request, placement: Placement, at_work: str) -> int:
    """Weights on the card while one component works. diffusers never offloads a safety checker."""
    checked = request.safety_checker and "safety_checker" in shapes.parameters
    checker = shapes.parameters["safety_checker"] * _element_bytes(shapes, request, "safety_checker") if checked else 0
    if placement.offload == "sequential":
        return checker + shapes.largest_layer[at_work] * _element_bytes(shapes, request, at_work)
    names = {at_work} if placement.offload == "model" else shapes.parameters.keys() - {"safety_checker"}
    weights = sum(shapes.parameters[name] * _element_bytes(shapes, request, name) for name in names)
    return checker + weights + (request.lora_bytes if "unet" in names else 0)


def _element_bytes(shapes: ModelShapes, request: Request, component: str) -> int:
    """SDXL's VAE overflows in fp16 and says so (``force_upcast``); other families carry the flag without needing it."""
    if component == "vae" and shapes.family == "SDXL" and request.precision == "fp16" and shapes.vae.get("force_upcast", True):
        return ELEMENT_BYTES["fp32"]
    return ELEMENT_BYTES[request.precision]


def _latent_size(shapes: ModelShapes, request: Request) -> tuple[int, int]:
    return -(-request.height_px // shapes.latent_scale), -(-request.width_px // shapes.latent_scale)


def _text_activations(text: Config, element_bytes: int) -> int:
    """Every layer's hidden states are kept (clip skip reads them), and the widest layer's input and output."""
    tokens = text["max_position_embeddings"]
    return tokens * element_bytes * ((text["num_hidden_layers"] + 3) * text["hidden_size"] + 3 * text["intermediate_size"])


def _unet_activations(shapes: ModelShapes, request: Request, placement: Placement) -> int:
    batch = request.batch_size * (2 if request.guidance else 1)
    element_bytes = ELEMENT_BYTES[request.precision]
    return unet_activation_bytes(shapes.unet, _latent_size(shapes, request), batch, element_bytes, workspace=placement.on_card)


def _decoder_activations(shapes: ModelShapes, request: Request, placement: Placement) -> int:
    """One decode, and the finished pictures beside it: as slices or tiles, and once more when they are joined."""
    element_bytes = _element_bytes(shapes, request, "vae")
    joined = 2 * request.batch_size * 3 * request.height_px * request.width_px * element_bytes
    batch = 1 if placement.vae_slicing else request.batch_size
    height, width = _latent_size(shapes, request)
    if placement.vae_tiling:
        tile = max(1, VAE_TILE_PX // shapes.latent_scale)
        height, width = min(height, tile), min(width, tile)
    return joined + decoder_activation_bytes(shapes.vae, (height, width), batch, element_bytes, workspace=placement.on_card)

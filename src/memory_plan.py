"""Predicts the peak memory of a run and chooses the fastest plan that fits. Bytes from shapes: no torch, no weights.

A run has three phases: the prompt is encoded, the latent is denoised, the picture is decoded. Each needs the weights that a
placement keeps on the card, and its activations (src/model_shapes.py). The peak is the largest phase, plus what torch's
allocator loses and what lies outside it. Allocated weights and activations, in GiB, against published measurements on NVIDIA
cards (where no losses are counted):

    predicted  published
        3.15       3.06   SD 1.x, 512x512, fp16, with safety checker  (diffusers' benchmark data set)
        8.85       8.96   SDXL, 1024x1024, bf16                       (sayakpaul/sample-datasets, A100)
       17.70      16.83   the same, fp32
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from src.config import OptimizationConfig
from src.errors import usage_error
from src.model_shapes import Config, ModelShapes, decoder_activation_bytes, unet_activation_bytes
from src.request import PictureRequest
from src.tensor_files import read_header

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
    precision: str = "fp16"  # a key of ELEMENT_BYTES
    lora_bytes: int = 0  # adapters, as they lie on the card: see adapter_bytes
    safety_checker: bool = True  # counted only where the model ships one

    @classmethod
    def of(
        cls, picture: PictureRequest, native_px: int, precision: str, *, lora_bytes: int = 0, safety_checker: bool = True
    ) -> Request:
        """What a run of ``picture`` asks for, on a model that draws ``native_px`` squares unless it is told otherwise."""
        return cls(
            width_px=picture.width or native_px,
            height_px=picture.height or native_px,
            batch_size=min(picture.batch_size, picture.num_images),
            guidance=picture.guidance_scale > 1,
            precision=precision,
            lora_bytes=lora_bytes,
            safety_checker=safety_checker,
        )


@dataclass(frozen=True)
class Placement:
    """Where weights live and how a picture is decoded: always one at a time, which is as fast as a batch."""

    name: str
    offload: str | None = None  # None | "model": one component on the card | "sequential": one layer
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
    fits: bool  # in the budget; without a card, in the main memory that is free, as far as that is known
    rejected: tuple[tuple[Placement, int], ...]  # with their predicted peak in bytes
    smaller: tuple[tuple[Placement, int], ...]
    budget_bytes: int | None  # None: no card
    notes: tuple[str, ...] = ()  # what the user should know beside: a switch without effect, memory that is short

    @property
    def rows(self) -> list[tuple[Placement, int, bool]]:
        """Every placement that was open, from fast to small, with its predicted peak in bytes and whether that fits."""
        rows = (*self.rejected, (self.placement, self.estimate.peak_bytes), *self.smaller)
        budget = self.budget_bytes
        return [(placement, peak, self.fits if budget is None else peak <= budget) for placement, peak in rows]


def budget_of(options: OptimizationConfig) -> int | None:
    """``max_vram_gb`` in bytes; None where it is not set. Raises UserError (usage) for what is no amount of memory."""
    wanted_gib = options.max_vram_gb
    if wanted_gib is None:
        return None
    if not (math.isfinite(wanted_gib * GIB) and wanted_gib > 0):
        raise usage_error(f"--max-vram {wanted_gib:g} is no amount of memory; give GiB above 0, e.g. --max-vram 6")
    return int(wanted_gib * GIB)


def adapter_bytes(files: Iterable[Path], precision: str) -> int:
    """LoRA files as they lie on the card: every number in the run's precision, whatever it is in the file.

    Other files of an adapter than .safetensors hold no numbers. Raises UserError as ``read_header`` does.
    """
    headers = [read_header(file) for file in files if file.suffix == ".safetensors"]
    numbers = sum(math.prod(tensor.shape) for header in headers for tensor in header.tensors.values())
    return numbers * ELEMENT_BYTES[precision]


def predict(shapes: ModelShapes, request: Request, placement: Placement) -> Estimate:
    """Predict the memory of a run."""
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


def choose(
    shapes: ModelShapes,
    request: Request,
    budget_bytes: int | None,
    forced: OptimizationConfig,
    *,
    memory_bytes: int | None = None,
) -> Plan:
    """Choose the fastest plan that fits ``budget_bytes`` (None: there is no card) and keeps to the switches that are set.

    When none fits, the smallest is returned with ``fits=False``. Without a card there is one plan, and it is compared with
    ``memory_bytes``, the main memory that is free, where that is given. Raises UserError (usage) for contradictory switches
    and an impossible ``max_vram_gb``.
    """
    budget_of(forced)
    candidates = _candidates(budget_bytes is not None, forced)
    if forced.disable_safety_checker:
        request = replace(request, safety_checker=False)
    estimates = [(placement, predict(shapes, request, placement)) for placement in candidates]
    peaks = tuple((placement, estimate.peak_bytes) for placement, estimate in estimates)
    limit_bytes = memory_bytes if budget_bytes is None else budget_bytes
    fitting = [i for i, (_, peak) in enumerate(peaks) if limit_bytes is None or peak <= limit_bytes]
    chosen = fitting[0] if fitting else len(peaks) - 1
    placement, estimate = estimates[chosen]
    notes = []
    if budget_bytes is None and (offload := _wanted_offload(forced)):
        notes.append(f"{offload} CPU offload has no effect without a card")
    if budget_bytes is None and not fitting:
        notes.append(f"needs {estimate.peak_bytes / GIB:.2f} of {memory_bytes / GIB:.2f} GiB of free memory; may swap")
    return Plan(placement, estimate, bool(fitting), peaks[:chosen], peaks[chosen + 1 :], budget_bytes, tuple(notes))


def describe(plan: Plan) -> str:
    """One line: the plan, its predicted peak of the budget, and what it consists of (GiB)."""
    words = plan.placement.name.replace("-", " ").replace("+vae", " + VAE").replace("gpu", "GPU").replace("cpu", "CPU")
    of_budget = "" if plan.budget_bytes is None else f" of {plan.budget_bytes / GIB:.2f} GiB"
    parts = f"weights {plan.estimate.weights_bytes / GIB:.2f}, activations {plan.estimate.denoise.activations_bytes / GIB:.2f}"
    parts += f", decode {plan.estimate.decode.activations_bytes / GIB:.2f}"
    line = f"{words}, predicted peak {plan.estimate.peak_bytes / GIB:.2f} GiB{of_budget} ({parts})"
    if plan.fits or plan.budget_bytes is None:
        return line
    return f"{line}; even this plan does not fit, a smaller picture or model would"


def table(plan: Plan) -> str:
    """Every plan with its predicted peak and whether it fits, then the phases of the chosen one. GiB, aligned columns."""
    rows = [f"{'plan':<26}{'peak GiB':>9}  fits"]
    for placement, peak_bytes, fits in plan.rows:
        mark = "  <- chosen" if placement is plan.placement else ""
        rows.append(f"{placement.name:<26}{peak_bytes / GIB:>9.2f}  {'yes' if fits else 'no'}{mark}".rstrip())
    rows += ["", f"{'the chosen plan by phase':<26}{'weights':>9}{'activations':>13}{'total':>9}"]
    for phase in plan.estimate.phases:
        sizes = f"{phase.weights_bytes / GIB:>9.2f}{phase.activations_bytes / GIB:>13.2f}{phase.total_bytes / GIB:>9.2f}"
        rows.append(f"{phase.name:<26}{sizes}")
    overhead = f"{CONTEXT_BYTES / GIB:.1f} GiB outside torch's allocator and {ALLOCATOR_LOSS:.0%} of the activations lost in it"
    return "\n".join([*rows, f"a total includes {overhead}", "", f"plan: {describe(plan)}"])


def _candidates(has_card: bool, forced: OptimizationConfig) -> list[Placement]:
    """The placements that keep to the switches, from fast to small."""
    offload = _wanted_offload(forced)
    if not has_card:
        return [replace(CPU, vae_tiling=forced.enable_vae_tiling)]
    return [
        placement
        for placement in PLANS
        if placement.on_card
        and (offload is None or placement.offload == offload)
        and (placement.vae_tiling or not forced.enable_vae_tiling)
    ]


def _wanted_offload(forced: OptimizationConfig) -> str | None:
    if forced.enable_model_cpu_offload and forced.enable_sequential_cpu_offload:
        raise usage_error(
            "model offload and sequential offload exclude each other; set one (sequential needs less, and is slower)"
        )
    return "model" if forced.enable_model_cpu_offload else "sequential" if forced.enable_sequential_cpu_offload else None


def _resident_bytes(shapes: ModelShapes, request: Request, placement: Placement, at_work: str) -> int:
    """Weights on the card while one component works. Never offloaded: a safety checker (by diffusers), adapters (by us)."""
    checked = request.safety_checker and "safety_checker" in shapes.parameters
    checker = shapes.parameters["safety_checker"] * _element_bytes(shapes, request, "safety_checker") if checked else 0
    always = checker + request.lora_bytes
    if placement.offload == "sequential":
        return always + shapes.largest_layer[at_work] * _element_bytes(shapes, request, at_work)
    names = {at_work} if placement.offload == "model" else shapes.parameters.keys() - {"safety_checker"}
    return always + sum(shapes.parameters[name] * _element_bytes(shapes, request, name) for name in names)


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
    """One decode, and the finished picture beside it: in tiles, and once more when they are joined."""
    element_bytes = _element_bytes(shapes, request, "vae")
    joined = 2 * 3 * request.height_px * request.width_px * element_bytes
    height, width = _latent_size(shapes, request)
    if placement.vae_tiling:
        tile = max(1, VAE_TILE_PX // shapes.latent_scale)
        height, width = min(height, tile), min(width, tile)
    return joined + decoder_activation_bytes(shapes.vae, (height, width), element_bytes, workspace=placement.on_card)

"""Predicts what a training needs of a card's memory, and decides whether it needs gradient checkpointing. No torch, no weights.

A training has three phases, one after the other: pictures are encoded, then captions; the adapter learns; samples are drawn
by the live U-Net, and decoded. Learning needs the frozen weights, the adapter with its gradient and the optimizer's numbers,
and what each layer keeps for the backward pass. The layers are those of src/training/speed.py: a frozen convolution keeps
nothing, three projections of one input keep it once, attention is fused. Where weights themselves learn (``part``), they,
their gradients and averages are float32, and their layers keep their inputs.

Peak of live tensors in one training step beside all weights, batch 1, bf16, rank 4 (SDXL: 8), in MB (10^6), computed and
traced (tests/test_training_memory.py has the tracer):

                                     whole step     with gradient checkpointing
    SD 1.5    512 px  attention       712     712              176     177
    SD 1.5    512 px  kohya           872     864              233     224
    SD 1.5    512 px  conv            953     955              241     243
    SD 2.1    768 px  attention      1598    1596              396     398
    SDXL     1024 px  attention      5394    5415              517     507
    SDXL     1024 px  kohya          6532    6557              622     592
    SDXL     1024 px  conv           6969    6935              737     738
    small-sd  512 px  attention       443     441              143     144

No card was at hand: what cuDNN, the allocator and CUDA itself add is that of src/memory_prediction.py, not measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from src.estimate import find_model, find_place
from src.memory_prediction import ALLOCATOR_LOSS, CONTEXT_BYTES, GIB, VAE_TILE_PX, Phase
from src.model_shapes import (
    Block,
    Config,
    MapBytes,
    ModelShapes,
    decoder_activation_bytes,
    encoder_activation_bytes,
    unet_activation_bytes,
    unet_blocks,
)
from src.train_config import LoopConfig, TrainConfig, TrainRun
from src.unet_parts import LAST_BLOCKS, convolution_numbers, part_numbers
from src.unet_weights import (
    ELEMENT_BYTES,
    QUANTIZED_BYTES,
    attention_matrices,
    largest_matrix,
    other_matrices,
    transformers,
    unet_bytes,
)

TOKENS = 77  # of one window of the text encoders; a longer caption has more, and adds little
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 1, "prodigy": 16}  # a number that learns, beside itself
WORKING_TRANSFORMER = 12  # maps alive beside what is kept, at most; traced
RESOLUTION_STEP_PX = 64
_TARGETS_LIKE = {"cross-attention": "attention"}  # whose layers keep what those of this part keep; of any other: all layers


@dataclass(frozen=True)
class TrainingNeed:
    """What is to be learnt, as far as memory depends on it."""

    resolution_px: int
    batch_size: int = 1
    rank: int = 4
    targets: str = "attention"
    use_dora: bool = False
    precision: str = "bf16"  # of the frozen weights, a key of ELEMENT_BYTES
    quantize: str | None = None  # a key of QUANTIZED_BYTES
    optimizer: str = "adamw"
    ema: bool = False
    text_encoders: bool = False  # they learn, too
    samples: bool = False  # are drawn meanwhile
    gradient_checkpointing: bool | None = None  # None: where the budget asks for it
    part: str | None = None  # of the U-Net, whose own weights learn; None: an adapter learns

    @classmethod
    def of(cls, train: LoopConfig, native_px: int, precision: str) -> TrainingNeed:
        """What a run of these settings asks for, of a model that draws ``native_px`` squares."""
        is_adapter = isinstance(train, TrainConfig)
        rank, targets = (train.rank, train.targets) if is_adapter else (0, _TARGETS_LIKE.get(train.part, "conv"))
        return cls(
            train.resolution or native_px, train.batch_size, rank, targets, train.use_dora, precision,
            train.quantize, train.optimizer, ema=train.ema_decay is not None, text_encoders=train.train_text_encoder,
            samples=train.samples, gradient_checkpointing=train.gradient_checkpointing, part=train.part,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """The decided settings, the memory of each phase, and whether that fits."""

    need: TrainingNeed  # with gradient_checkpointing decided
    phases: tuple[Phase, ...]
    budget_bytes: int | None  # None: no limit is known
    advice: tuple[str, ...] = ()  # where it does not fit: switches with which it would
    least: str = ""  # and where there are none: what all of them come to

    @property
    def peak_bytes(self) -> int:
        return max(phase.total_bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes


def choose(shapes: ModelShapes, need: TrainingNeed, budget_bytes: int | None, *, on_card: bool = True) -> TrainingPlan:
    """Decide on gradient checkpointing, if the user has not: only where the step would not fit without it.

    ``budget_bytes``: the card's memory, or the main memory that is free. Where nothing fits, the smaller plan is returned
    with ``fits=False`` and advice.
    """
    plan = _smallest_that_fits(shapes, need, budget_bytes, on_card)
    if plan.fits:
        return plan
    advice, least = _advice(shapes, need, budget_bytes, on_card)
    return replace(plan, advice=tuple(advice), least=least)


def describe(plan: TrainingPlan) -> str:
    """One line: what is decided, the predicted peak of the budget, and the phase that makes it (GiB)."""
    need, budget = plan.need, plan.budget_bytes
    decided = ["gradient checkpointing" if need.gradient_checkpointing else "no gradient checkpointing"]
    decided += [f"{need.quantize} U-Net"] if need.quantize else []
    largest = max(plan.phases, key=lambda phase: phase.total_bytes)
    parts = f"{largest.name}: weights {largest.weights_bytes / GIB:.2f}, activations {largest.activations_bytes / GIB:.2f}"
    of_budget = "" if budget is None else f" of {budget / GIB:.2f}"
    line = f"{', '.join(decided)}, predicted peak {plan.peak_bytes / GIB:.2f}{of_budget} GiB ({parts})"
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
        overhead = f"{CONTEXT_BYTES / GIB:.1f} GiB outside torch's allocator and {ALLOCATOR_LOSS:.0%} of the activations"
        lines += [f"a total includes {overhead} lost in it", "", f"plan: {describe(self.plan)}"]
        return "\n".join(lines if self.is_card else [*lines, "to plan for a card that is not here, add --max-vram GB"])

    def as_json(self) -> dict[str, Any]:
        """The same as plain values. ``budget_bytes`` is the main memory that is free where there is no card."""
        plan = self.plan
        phases = [{**asdict(phase), "total_bytes": phase.total_bytes} for phase in plan.phases]
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
    plan = choose(shapes, need, place.budget_bytes if is_card else place.memory_bytes, on_card=is_card)
    return Answer(source.name, shapes.family, place.words, plan, adapter_numbers(shapes, need), is_card)


def precision_of(run: TrainRun, of_the_machine: str) -> str:
    """What the frozen weights are in: as asked for, else as training computes, else what the machine is good at."""
    if run.model.precision != "auto":
        return run.model.precision
    return {"auto": of_the_machine, "no": "fp32"}.get(run.train.mixed_precision, run.train.mixed_precision)


def _smallest_that_fits(shapes: ModelShapes, need: TrainingNeed, budget_bytes: int | None, on_card: bool) -> TrainingPlan:
    wanted = need.gradient_checkpointing
    for checkpointing in (False, True) if wanted is None else (wanted,):
        decided = replace(need, gradient_checkpointing=checkpointing)
        plan = TrainingPlan(decided, predict(shapes, decided, on_card=on_card), budget_bytes)
        step = next(phase for phase in plan.phases if phase.name == "train")
        if budget_bytes is None or step.total_bytes <= budget_bytes:  # nothing else becomes smaller by it
            break
    return plan


def _advice(shapes: ModelShapes, need: TrainingNeed, budget_bytes: int | None, on_card: bool) -> tuple[list[str], str]:
    """Single switches with which the training would fit; if there are none, what all of them come to."""
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
        return _smallest_that_fits(shapes, replace(need, **change), budget_bytes, on_card).fits

    found = [words for words, change in smaller.items() if fits(change)]
    sizes_px = range(need.resolution_px - RESOLUTION_STEP_PX, 255, -RESOLUTION_STEP_PX)
    found += [f"--resolution {size_px}" for size_px in sizes_px if fits({"resolution_px": size_px})][:1]
    if found or not smaller:
        return found, ""
    least = {name: value for change in smaller.values() for name, value in change.items()}
    peak = _smallest_that_fits(shapes, replace(need, **least), budget_bytes, on_card).peak_bytes
    words = [name for name in smaller if not name.startswith("--quantize") or name.endswith("nf4")]
    verb = "come" if len(words) > 1 else "comes"
    return [], f" ({' and '.join(words)} {verb} to {peak / GIB:.2f} GiB)"


def predict(shapes: ModelShapes, need: TrainingNeed, *, on_card: bool = True) -> tuple[Phase, ...]:
    """The phases in time order: encode, train, and samples where they are drawn."""
    element_bytes = ELEMENT_BYTES[need.precision]
    encoder_bytes = element_bytes if need.part is None else 4  # the weights to be saved are loaded in fp32, all of them
    latent = -(-need.resolution_px // shapes.latent_scale)
    frozen = unet_bytes(shapes, need.precision, need.quantize)
    encoders = {name: shapes.parameters[name] * encoder_bytes for name in shapes.text_encoders}
    numbers = adapter_numbers(shapes, need)
    frozen -= numbers * element_bytes if need.part else 0
    learning = numbers * (8 + OPTIMIZER_BYTES[need.optimizer] + 4 * need.ema)
    if need.part and need.optimizer == "adafactor":  # sums of rows and columns, of each place of a kernel
        wide, narrow = convolution_numbers(shapes, need.part)
        learning += round(wide * 4 * 6 / 9 + narrow * 4 * 2) - numbers * OPTIMIZER_BYTES["adafactor"]
    learning_weights = frozen + learning + (sum(encoders.values()) if need.text_encoders else 0)
    vae_element_bytes = 4 if on_card else encoder_bytes  # the trainer has it in fp32 on every card
    vae = shapes.parameters["vae"] * vae_element_bytes
    pixels = 3 * need.resolution_px**2 * vae_element_bytes
    encode = [
        Phase("encode", vae, pixels + encoder_activation_bytes(shapes.vae, (latent, latent), vae_element_bytes, on_card)),
        Phase("encode", sum(encoders.values()), 0),
    ]
    step = step_activation_bytes(shapes.unet, (latent, latent), need, workspace=on_card)
    step += _restored_bytes(shapes.unet, (latent, latent), need)
    if need.text_encoders:
        step += sum(text_activation_bytes(text, need) for text in shapes.text_encoders.values())
    phases = [max(encode, key=lambda phase: phase.total_bytes), Phase("train", learning_weights, step)]
    if need.samples:
        tile = min(latent, VAE_TILE_PX // shapes.latent_scale) if on_card else latent
        drawn = unet_activation_bytes(shapes.unet, (latent, latent), 2, element_bytes, workspace=on_card)
        decoded = decoder_activation_bytes(shapes.vae, (tile, tile), vae_element_bytes, workspace=on_card) + 2 * pixels
        draw, decode = Phase("samples", learning_weights, drawn), Phase("samples", learning_weights + vae, decoded)
        phases.append(max(draw, decode, key=lambda phase: phase.total_bytes))
    return tuple(phases)


@dataclass(frozen=True)
class _Segment:
    """One ResNet or transformer block, as the backward pass sees it. All in bytes."""

    enters: int  # its input, kept in any case
    inside: int  # what its layers keep beside that; with gradient checkpointing, only while its turn lasts
    working: int = 0  # alive beside that while it is computed


def step_activation_bytes(unet: Config, latent_size: tuple[int, int], need: TrainingNeed, workspace: bool = False) -> int:
    """Peak of live tensors in one training step of the U-Net, beside all weights. ``latent_size`` (H, W).

    With gradient checkpointing each segment keeps its input alone, and computes the rest again when its turn comes.
    ``workspace``: a convolution copies its input and output once more, as cuDNN does.
    """
    held = peak = 0
    for segment in _segments(unet, MapBytes(latent_size, need.batch_size, ELEMENT_BYTES[need.precision]), need, workspace):
        held += segment.enters + (0 if need.gradient_checkpointing else segment.inside)
        peak = max(peak, held + segment.working + (segment.inside if need.gradient_checkpointing else 0))
    return peak


def _segments(unet: Config, maps: MapBytes, need: TrainingNeed, workspace: bool) -> Iterator[_Segment]:
    """In the order of the forward pass. Before the first layer that learns, nothing is kept."""
    down, mid, up = unet_blocks(unet)
    blocks = (*down, *([mid] if mid else []), *up)
    first = {"mid": len(down), "last-blocks": len(blocks) - LAST_BLOCKS}.get(need.part or "", 0)
    for block in blocks[:first]:  # no gradient gets there: only what is passed to the way up waits
        yield from (_Segment(maps(channels, block.level) * (block in down), 0) for _, channels in block.resnets)
    learns = need.targets == "conv"
    for block in blocks[first:]:
        if need.part == "mid" and block is not mid:
            need = replace(need, targets="attention")  # passed through, all of it frozen
        convolutions = need.targets == "conv"
        for number, (channels_in, channels_out) in enumerate(block.resnets):
            x, y = maps(channels_in, block.level), maps(channels_out, block.level)
            inside = x + 2 * y + (x + y) * convolutions  # two norms, the first convolution; what convolutions that learn read
            working = x + 3 * y + (2 * x + 3 * y) * convolutions + (x + y) * workspace
            yield _Segment(x, inside if learns else 0, working)
            if block is not mid or number == 0:  # the middle has one transformer between two ResNets
                yield from _transformer_segments(block, maps, need)
                learns = learns or block.depth > 0
        if block.resample and convolutions and block in up:
            yield _Segment(maps(block.channels, block.level - 1), 0)


def _transformer_segments(block: Block, maps: MapBytes, need: TrainingNeed) -> Iterator[_Segment]:
    if not block.depth:
        return
    y = maps(block.channels, block.level)
    wide = need.targets != "attention"
    # Norm 1 and its input, query, key, value, output; the sum, norm 2, query, output; the sum; 8 of projection and 4 of gate.
    # What the feed-forward layers read (1 and 4) is kept where they learn.
    # DoRA needs the outputs of every adapted layer, of weight and adapter. The narrow products are ``rank`` wide.
    kept = 22 + 5 * wide + (8 + 3 * wide) * need.rank / block.channels
    kept += (13 + 21 * wide) * need.use_dora
    working = WORKING_TRANSFORMER + 30 * (wide and need.use_dora)
    text = 2 * need.batch_size * TOKENS * block.channels * ELEMENT_BYTES[need.precision]
    yield _Segment(y + y * wide, 0)  # the norm around the blocks, and its projection
    for _ in range(block.depth):
        yield _Segment(y, round(kept * y) + text, working * y)
    yield _Segment(y * wide, 0)


def text_activation_bytes(text: Config, need: TrainingNeed) -> int:
    """What a text encoder that learns keeps for the backward pass of one batch of captions."""
    y = need.batch_size * TOKENS * text["hidden_size"] * ELEMENT_BYTES[need.precision]
    layers = text["num_hidden_layers"]
    layer = 11 + 4 * (text.get("hidden_act", "quick_gelu") == "quick_gelu") + 5 * (need.targets != "attention")
    return y * (layers + 2 * layer) if need.gradient_checkpointing else y * (layers * layer + 8)


def _restored_bytes(unet: Config, latent_size: tuple[int, int], need: TrainingNeed) -> int:
    """The largest quantised matrix, in full precision while it is used; of int8 also a product, of whole numbers at first."""
    if need.quantize is None:
        return 0
    matrix = largest_matrix(unet) * ELEMENT_BYTES[need.precision]
    maps, (down, _, _) = MapBytes(latent_size, need.batch_size, 4), unet_blocks(unet)
    products = [maps(8 * block.channels, block.level) for block in down if block.depth and need.quantize == "int8"]
    return max(matrix, *products) if products else matrix


def adapter_numbers(shapes: ModelShapes, need: TrainingNeed) -> int:
    """How many numbers learn: a part, or rank * (inputs + outputs) of each layer, with DoRA its outputs once more."""
    if need.part is not None:
        return part_numbers(shapes, need.part)
    sizes = list(_target_sizes(shapes.unet, need.targets))
    if need.text_encoders:
        for name, text in shapes.text_encoders.items():
            unused_last = name == "text_encoder" and len(shapes.text_encoders) > 1
            sizes += _text_target_sizes(text, need.targets, unused_last)
    return sum(need.rank * (inputs + outputs) + outputs * need.use_dora for inputs, outputs in sizes)


def _target_sizes(unet: Config, targets: str) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of every layer of the U-Net that gets an adapter; a convolution's inputs count its kernel."""
    down, mid, up = unet_blocks(unet)
    for block in (*down, *([mid] if mid else []), *up):
        for _ in range(transformers(block, mid)):
            yield from attention_matrices(block)
            yield from other_matrices(block) if targets != "attention" else []
        if targets == "conv":
            for inputs, outputs in block.resnets:
                yield from ((9 * inputs, outputs), (9 * outputs, outputs), (4 * unet["block_out_channels"][0], outputs))
                yield from [(inputs, outputs)] if inputs != outputs else []
            yield from [(9 * block.channels, block.channels)] if block.resample else []


def _text_target_sizes(text: Config, targets: str, unused_last: bool) -> list[tuple[int, int]]:
    width, hidden = text["hidden_size"], text["intermediate_size"]
    layer = [(width, width)] * 4 + ([(width, hidden), (hidden, width)] if targets != "attention" else [])
    return layer * (text["num_hidden_layers"] - unused_last)

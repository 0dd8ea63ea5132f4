"""Predicts what a training needs of a card's memory. No torch, no weights; src/training_plan.py decides by it.

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
from dataclasses import dataclass, replace

from src.memory_prediction import VAE_TILE_PX, Phase
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
from src.train_config import LoopConfig, TrainConfig
from src.unet_parts import LAST_BLOCKS, convolution_numbers, part_numbers
from src.unet_weights import (
    ELEMENT_BYTES,
    attention_matrices,
    largest_matrix,
    other_matrices,
    unet_bytes,
)

TOKENS = 77  # of one window of the text encoders; a longer caption has more, and adds little
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 1, "prodigy": 16}  # a number that learns, beside itself
WORKING_TRANSFORMER = 12  # maps alive beside what is kept, at most; traced
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
        for (channels_in, channels_out), depth in block.pairs:
            x, y = maps(channels_in, block.level), maps(channels_out, block.level)
            inside = x + 2 * y + (x + y) * convolutions  # two norms, the first convolution; what convolutions that learn read
            working = x + 3 * y + (2 * x + 3 * y) * convolutions + (x + y) * workspace
            yield _Segment(x, inside if learns else 0, working)
            yield from _transformer_segments(block, depth, maps, need)
            learns = learns or depth > 0
        if block.resample and convolutions and block in up:
            yield _Segment(maps(block.channels, block.level - 1), 0)


def _transformer_segments(block: Block, depth: int, maps: MapBytes, need: TrainingNeed) -> Iterator[_Segment]:
    if not depth:
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
    for _ in range(depth):
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
    products = [maps(8 * block.channels, block.level) for block in down if any(block.depths) and need.quantize == "int8"]
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
        for depth in block.depths:
            yield from attention_matrices(block, depth)
            yield from other_matrices(block, depth) if targets != "attention" else []
        if targets == "conv":
            for inputs, outputs in block.resnets:
                yield from ((9 * inputs, outputs), (9 * outputs, outputs), (4 * unet["block_out_channels"][0], outputs))
                yield from [(inputs, outputs)] if inputs != outputs else []
            yield from [(9 * block.channels, block.channels)] if block.resample else []


def _text_target_sizes(text: Config, targets: str, unused_last: bool) -> list[tuple[int, int]]:
    width, hidden = text["hidden_size"], text["intermediate_size"]
    layer = [(width, width)] * 4 + ([(width, hidden), (hidden, width)] if targets != "attention" else [])
    return layer * (text["num_hidden_layers"] - unused_last)

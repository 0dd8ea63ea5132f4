"""What the weights of a U-Net are made of: matrices, which can be quantised, and the groups that group offload moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from src.model_shapes import Block, Config, ModelShapes, conv, resnet_layers, time_of, transformer_layers, unet_blocks

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
# bitsandbytes' forms of a weight: a byte and a scale per row; half a byte and a scale per 64 numbers.
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
NF4_BLOCK = 64  # numbers that share a scale; bitsandbytes takes no rows that end within one


def unet_bytes(shapes: ModelShapes, precision: str, quantize: str | None) -> int:
    """The U-Net's weights as they lie on the card: matrices quantised where that is asked for, the rest in ``precision``."""
    whole = shapes.parameters["unet"] * ELEMENT_BYTES[precision]
    if quantize is None:
        return whole
    shrunk = [(inputs, outputs) for inputs, outputs in matrices(shapes.unet) if quantize == "int8" or inputs % NF4_BLOCK == 0]
    numbers = sum(inputs * outputs for inputs, outputs in shrunk)
    rows = sum(outputs for _, outputs in shrunk) * 4 * (quantize == "int8")
    return whole - round(numbers * (ELEMENT_BYTES[precision] - QUANTIZED_BYTES[quantize])) + rows


def largest_matrix(unet: Config) -> int:
    """Numbers in the largest linear layer."""
    return max(inputs * outputs for inputs, outputs in matrices(unet))


@dataclass(frozen=True)
class OffloadGroups:
    """Parameters of a U-Net as ``optimizations.apply`` offloads it in groups."""

    resident: int  # on the card through the whole pass: what belongs to no block
    largest: int  # a ResNet block, a transformer or a resampler: the one with the most parameters


def offload_groups(shapes: ModelShapes) -> OffloadGroups:
    """The groups of a U-Net: each ResNet block, each transformer, each resampler is one."""
    down, mid, up = unet_blocks(shapes.unet)
    time = time_of(shapes.unet)
    groups = []
    for block in (*down, *([mid] if mid else []), *up):
        groups += [sum(resnet_layers(inputs, outputs, time)) for inputs, outputs in block.resnets]
        groups += [sum(transformer_layers(block.channels, depth, block.context)) for depth in block.depths]
        groups += [conv(block.channels, block.channels)] * block.resample
    return OffloadGroups(shapes.parameters["unet"] - sum(groups), max(groups))


def matrices(unet: Config) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of every linear layer."""
    down, mid, up = unet_blocks(unet)
    first, (time_width, numbers) = unet["block_out_channels"][0], time_of(unet)
    yield from ((first, time_width), (time_width, time_width))
    if unet.get("time_cond_proj_dim"):
        yield (unet["time_cond_proj_dim"], first)
    if unet.get("addition_embed_type") == "text_time":
        yield from ((unet["projection_class_embeddings_input_dim"], time_width), (time_width, time_width))
    if unet.get("addition_embed_type") == "text":
        text = unet["cross_attention_dim"]
        yield from ((text, text), (text, text), (text, text), (text, time_width))
    for block in (*down, *([mid] if mid else []), *up):
        yield from ((time_width, numbers * channels_out) for _, channels_out in block.resnets)
        for depth in block.depths:
            yield from attention_matrices(block, depth)
            yield from other_matrices(block, depth)[0 if unet.get("use_linear_projection", False) else 2 :]


def attention_matrices(block: Block, depth: int) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of the attention layers of one of a block's transformers."""
    width, context = block.channels, block.context
    for _ in range(depth):
        yield from [(width, width)] * 6  # query and output of both, key and value of the first
        yield from [(context, width)] * 2


def other_matrices(block: Block, depth: int) -> list[tuple[int, int]]:
    """The projections around the blocks, which may be 1x1 convolutions, and the feed-forward layers."""
    width = block.channels
    return [(width, width)] * 2 + [(width, 8 * width), (4 * width, width)] * depth

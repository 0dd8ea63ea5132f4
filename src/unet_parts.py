"""The parts of a U-Net that a fine-tuning may train alone: which parameters they are, and how many. No torch."""

from __future__ import annotations

from src.model_shapes import Block, ModelShapes, conv, linear, norm, resnet_layers, time_of, transformer_layers, unet_blocks

LAST_BLOCKS = 2  # of the way up, those of the highest resolutions
OUTPUT = ("conv_norm_out.", "conv_out.")


def is_in_part(name: str, part: str, up_blocks: int) -> bool:
    """Whether the parameter of this name belongs to the part, of a U-Net with so many blocks on the way up."""
    if part == "cross-attention":
        return ".attn2." in name
    if part == "mid":
        return name.startswith("mid_block.")
    last = tuple(f"up_blocks.{number}." for number in range(max(0, up_blocks - LAST_BLOCKS), up_blocks))
    return part == "all" or name.startswith((*last, *OUTPUT))


def part_numbers(shapes: ModelShapes, part: str) -> int:
    """How many numbers learn."""
    down, mid, up = unet_blocks(shapes.unet)
    first, time = shapes.unet["block_out_channels"][0], time_of(shapes.unet)
    if part == "all":
        return shapes.parameters["unet"]
    if part == "cross-attention":
        return sum(_cross_attention(block) for block in (*down, *([mid] if mid else []), *up))
    if part == "mid":
        return _block(mid, time) if mid else 0
    output = norm(first) + conv(first, shapes.unet.get("out_channels", 4))
    return output + sum(_block(block, time) for block in up[-LAST_BLOCKS:])


def convolution_numbers(shapes: ModelShapes, part: str) -> tuple[int, int]:
    """How many of the numbers that learn are in kernels of 3x3, and how many in kernels of 1x1."""
    down, mid, up = unet_blocks(shapes.unet)
    middle = [mid] if mid else []
    blocks = {"all": [*down, *middle, *up], "mid": middle, "last-blocks": up[-LAST_BLOCKS:]}.get(part, [])
    wide = narrow = 0
    for block in blocks:
        square = block.channels**2
        wide += sum(9 * (inputs + outputs) * outputs for inputs, outputs in block.resnets) + 9 * square * block.resample
        narrow += sum(inputs * outputs for inputs, outputs in block.resnets if inputs != outputs)
        narrow += 0 if shapes.unet.get("use_linear_projection", False) else 2 * square * len(block.depths)
    return wide, narrow


def _cross_attention(block: Block) -> int:
    """Query and output of the picture's width, key and value from the text's."""
    width, context = block.channels, block.context
    layer = linear(width, width, bias=False) + 2 * linear(context, width, bias=False) + linear(width, width)
    return sum(block.depths) * layer


def _block(block: Block, time: tuple[int, int]) -> int:
    count = sum(sum(resnet_layers(inputs, outputs, time)) for inputs, outputs in block.resnets)
    count += sum(sum(transformer_layers(block.channels, depth, block.context)) for depth in block.depths)
    return count + conv(block.channels, block.channels) * block.resample

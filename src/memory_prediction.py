"""Predicts the peak memory of a run in each placement. Bytes from shapes: no torch, no weights.

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
from dataclasses import dataclass
from pathlib import Path

from src.model_shapes import (
    Config,
    MapBytes,
    ModelShapes,
    decoder_activation_bytes,
    sliced_scores_bytes,
    unet_activation_bytes,
    unet_blocks,
)
from src.request import PictureRequest
from src.tensor_files import read_header
from src.unet_weights import ELEMENT_BYTES, largest_matrix, offload_groups, unet_bytes

GIB = 1 << 30

VAE_TILE_PX = 512  # a VAE's own tile is its training size: at that size it would not tile at all
CONTEXT_BYTES = GIB // 2  # of a card, outside the allocator: CUDA context and kernels
PROCESS_BYTES = 380 << 20  # without a card: the interpreter and the libraries as main.py imports them (src/lean_imports.py)
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
    quantize: str | None = None  # int8 | nf4: the U-Net's matrices
    deep_cache: int = 1  # what it keeps and leaves out is not predicted, but goes into what is measured
    token_merging: float = 0.0
    attention_slicing: bool = False  # scores of half of the heads at once, in place of a fused kernel

    @classmethod
    def of(
        cls,
        picture: PictureRequest,
        native_px: int,
        precision: str,
        *,
        lora_bytes: int = 0,
        safety_checker: bool = True,
        quantize: str | None = None,
        attention_slicing: bool = False,
        unet: Config | None = None,
    ) -> Request:
        """What a run of ``picture`` asks for, on a model that draws ``native_px`` squares unless it is told otherwise.

        ``unet``: its configuration, of a model that may draw without guidance (LCM), or one picture at a time (inpainting).
        """
        unet = unet or {}
        return cls(
            width_px=picture.width or native_px,
            height_px=picture.height or native_px,
            batch_size=1 if unet.get("in_channels") == 9 else min(picture.batch_size, picture.num_images),
            guidance=picture.guidance_scale > 1 and unet.get("time_cond_proj_dim") is None,
            precision=precision,
            lora_bytes=lora_bytes,
            safety_checker=safety_checker,
            quantize=quantize,
            deep_cache=picture.deep_cache,
            token_merging=picture.token_merging,
            attention_slicing=attention_slicing,
        )


@dataclass(frozen=True)
class Placement:
    """Where weights live and how a picture is decoded: always one at a time, which is as fast as a batch."""

    name: str
    # None | "model": one component on the card | "group": one block, and the next one on its way | "sequential": one layer
    offload: str | None = None
    vae_tiling: bool = False  # tiles of VAE_TILE_PX

    @property
    def on_card(self) -> bool:
        return not self.name.startswith("cpu")


RAN_OUT = ", ran out"  # behind a placement's name, in what is remembered: so much was too little for it
CPU, CPU_TILED = Placement("cpu"), Placement("cpu+vae-tiling", vae_tiling=True)
PLANS = (  # from fast to small; CPU is never chosen for a card
    Placement("gpu"),
    Placement("gpu+vae-tiling", vae_tiling=True),
    Placement("model-offload", offload="model"),
    Placement("model-offload+vae-tiling", offload="model", vae_tiling=True),
    Placement("group-offload", offload="group", vae_tiling=True),
    Placement("sequential-offload", offload="sequential", vae_tiling=True),
    CPU,
)


@dataclass(frozen=True)
class Phase:
    """Memory of one phase of a run."""

    name: str  # encode | denoise | decode
    weights_bytes: int
    activations_bytes: int
    outside_bytes: int = CONTEXT_BYTES  # of what torch's allocator holds

    @property
    def total_bytes(self) -> int:
        return self.outside_bytes + self.weights_bytes + round((1 + ALLOCATOR_LOSS) * self.activations_bytes)


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


def adapter_bytes(files: Iterable[Path], precision: str) -> int:
    """LoRA files as they lie on the card: every number in the run's precision, whatever it is in the file.

    Other files of an adapter than .safetensors hold no numbers. Raises UserError as ``read_header`` does.
    """
    headers = [read_header(file) for file in files if file.suffix == ".safetensors"]
    numbers = sum(math.prod(tensor.shape) for header in headers for tensor in header.tensors.values())
    return numbers * ELEMENT_BYTES[precision]


def predict(shapes: ModelShapes, request: Request, placement: Placement) -> Estimate:
    """Predict the memory of a run."""
    encoders, outside_bytes = shapes.text_encoders, CONTEXT_BYTES if placement.on_card else PROCESS_BYTES
    return Estimate(
        encode=Phase(
            "encode",
            max((_resident_bytes(shapes, request, placement, name) for name in encoders), default=0),
            max((_text_activations(text, ELEMENT_BYTES[request.precision]) for text in encoders.values()), default=0),
            outside_bytes,
        ),
        denoise=Phase(
            "denoise",
            _resident_bytes(shapes, request, placement, "unet"),
            _unet_activations(shapes, request, placement),
            outside_bytes,
        ),
        decode=Phase(
            "decode",
            _resident_bytes(shapes, request, placement, "vae"),
            _decoder_activations(shapes, request, placement),
            outside_bytes,
        ),
    )


def offloaded_bytes(shapes: ModelShapes, request: Request) -> int:
    """Weights that a plan with offload keeps in main memory: all that diffusers moves, at work or not."""
    return sum(_component_bytes(shapes, request, name) for name in shapes.parameters.keys() - {"safety_checker"})


def _resident_bytes(shapes: ModelShapes, request: Request, placement: Placement, at_work: str) -> int:
    """Weights on the card while one component works. Never offloaded: a safety checker (by diffusers), adapters (by us)."""
    checked = request.safety_checker and "safety_checker" in shapes.parameters
    checker = _component_bytes(shapes, request, "safety_checker") if checked else 0
    always = checker + request.lora_bytes
    if placement.offload == "group" and at_work == "unet":
        groups = offload_groups(shapes)  # two of them: the next one is fetched while one works
        return always + (groups.resident + 2 * groups.largest) * _element_bytes(shapes, request, at_work)
    if placement.offload in ("group", "sequential"):
        return always + shapes.largest_layer[at_work] * _element_bytes(shapes, request, at_work)
    names = {at_work} if placement.offload == "model" else shapes.parameters.keys() - {"safety_checker"}
    return always + sum(_component_bytes(shapes, request, name) for name in names)


def _component_bytes(shapes: ModelShapes, request: Request, component: str) -> int:
    if component == "unet":
        return unet_bytes(shapes, request.precision, request.quantize)
    return shapes.parameters[component] * _element_bytes(shapes, request, component)


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
    size, element_bytes = _latent_size(shapes, request), ELEMENT_BYTES[request.precision]
    activations = unet_activation_bytes(shapes.unet, size, batch, element_bytes, workspace=placement.on_card)
    if request.attention_slicing:
        activations += sliced_scores_bytes(shapes.unet, size, 4 if shapes.unet.get("upcast_attention") else element_bytes)
    if request.quantize == "nf4":  # a matrix is brought back while it is used
        return activations + largest_matrix(shapes.unet) * element_bytes
    if request.quantize == "int8":  # a product is whole numbers of four bytes first
        maps, (down, _, _) = MapBytes(size, batch, 4), unet_blocks(shapes.unet)
        return activations + max(maps(8 * block.channels, block.level) for block in down if any(block.depths))
    return activations


def _decoder_activations(shapes: ModelShapes, request: Request, placement: Placement) -> int:
    """One decode, and the finished picture beside it: in tiles, and once more when they are joined."""
    element_bytes = _element_bytes(shapes, request, "vae")
    joined = 2 * 3 * request.height_px * request.width_px * element_bytes
    height, width = _latent_size(shapes, request)
    if placement.vae_tiling:
        tile = max(1, VAE_TILE_PX // shapes.latent_scale)
        height, width = min(height, tile), min(width, tile)
    return joined + decoder_activation_bytes(shapes.vae, (height, width), element_bytes, workspace=placement.on_card)

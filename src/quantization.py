"""A frozen U-Net's matrices in fewer bits, by bitsandbytes: 8 with a scale per row, or NF4 (Dettmers et al. 2023,
arXiv 2305.14314), 4 with a scale per 64 numbers. Convolutions, norms and the adapter keep their precision.

SDXL's U-Net in bf16 holds 5.14 GB, 3.00 GB with int8, 2.06 GB with nf4 (computed); SD 1.5's 1.72, 1.46 and 1.35 GB, as most
of it are convolutions. On the CPU the output of a U-Net of SDXL's kind with random weights changes by 0.3 % (int8) and 6 %
(nf4); no card was at hand to measure speed.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import usage_error
from src.unet_weights import NF4_BLOCK

INT8_CAPABILITY = (7, 5)  # of CUDA: bitsandbytes' products of int8 need Turing, NF4 only Pascal


def check_card(kind: str | None, device: torch.device) -> None:
    """Raises UserError (usage) for a card that knows no such products."""
    if kind == "int8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < INT8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise usage_error(f"--quantize int8 needs an NVIDIA card of 2018 or later, and this is a {name}; use --quantize nf4")


def quantize_unet(unet: nn.Module, kind: str) -> None:
    """Replace every linear layer of a frozen U-Net by its ``"int8"`` or ``"nf4"`` form, in place, before it gets an adapter.

    The numbers are rounded when the U-Net is moved to its device (``unet.to(device)``, the CPU included): one layer at a
    time, so that the card never holds the whole model in full precision. Raises UserError (usage) without bitsandbytes.
    """
    layers = _layers_of_bitsandbytes()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every layer that is not in fp16
    for parent in list(unet.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and not (kind == "nf4" and layer.in_features % NF4_BLOCK):
                setattr(parent, name, _quantized(layers, layer, kind))


def _quantized(layers: Any, layer: nn.Linear, kind: str) -> nn.Linear:
    size = (layer.in_features, layer.out_features)
    weight, bias = layer.weight.detach(), layer.bias
    if kind == "nf4":
        options = {"quant_type": "nf4", "compress_statistics": False}
        replaced = layers.Linear4bit(*size, bias=bias is not None, compute_dtype=weight.dtype, device="meta", **options)
        replaced.weight = layers.Params4bit(weight, requires_grad=False, **options)
    else:
        kind_of_layer = _frozen(layers.Linear8bitLt)
        replaced = kind_of_layer(*size, bias=bias is not None, has_fp16_weights=False, threshold=0.0, device="meta")
        replaced.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        replaced.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return replaced


@functools.cache
def _frozen(base: type) -> type:
    """bitsandbytes' layer holds its numbers beside the weight, too, where moving the U-Net would leave them; and it keeps its
    input for the backward pass, which a frozen weight does not need and gradient checkpointing could not give back."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
            ctx.layer, ctx.dtype = layer, x.dtype
            return base.forward(layer, x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            state = ctx.layer.state  # W = CB SCB / 127, rows scaled
            weight = state.CB.to(ctx.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1 / 127))
            return gradient.to(ctx.dtype) @ weight, None

    class Linear8bitLt(base):
        def forward(self, x: Tensor) -> Tensor:
            needs_gradient = torch.is_grad_enabled() and x.requires_grad
            return Product.apply(x, self) if needs_gradient else super().forward(x)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            for holder in (self.weight, self.state):
                if holder.CB is not None:
                    holder.CB, holder.SCB = self.weight.data, holder.SCB.to(self.weight.device)
            return self

    return Linear8bitLt


def _layers_of_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise usage_error(
            "--quantize needs the package bitsandbytes; pip install bitsandbytes, or leave --quantize out"
        ) from None
    return bitsandbytes.nn

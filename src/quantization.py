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

from torch import nn

from src.errors import usage_error
from src.unet_weights import NF4_BLOCK


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
        kind_of_layer = _moved_whole(layers.Linear8bitLt)
        replaced = kind_of_layer(*size, bias=bias is not None, has_fp16_weights=False, threshold=0.0, device="meta")
        replaced.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        replaced.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return replaced


@functools.cache
def _moved_whole(base: type) -> type:
    """bitsandbytes' layer holds its numbers beside the weight, too, where moving the U-Net would leave them."""

    class Linear8bitLt(base):
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

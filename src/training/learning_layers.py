"""Layers whose own weights learn: held in float32 (master weights), computed in the precision of what comes in.

Adam's steps on bf16 weights are mostly rounded away (a step of 1e-5 of a weight is a hundredth of its last bit), so the
weights, their gradients and the optimizer stay float32. The rounded copy of a weight lives while its layer computes, in the
forward and again in the backward pass, and no longer: the memory of a second copy of the model is not spent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.cpu_kernels import product


def exchange_learning_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the layers that learn compute in ``dtype`` without autocast. In place, by their class: names and weights stay."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not own or not own[0].requires_grad:
            continue
        if type(module) in _CLASSES and getattr(module, "padding_mode", "zeros") == "zeros":
            module.__class__ = _CLASSES[type(module)]
        elif dtype != torch.float32:
            module.forward = torch.autocast(own[0].device.type, dtype)(module.forward)


class LearningLinear(nn.Linear):
    """A linear layer that learns."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias)


class LearningConv2d(nn.Conv2d):
    """A convolution that learns."""

    def forward(self, x: Tensor) -> Tensor:
        return _Convolution.apply(x, self.weight, self.bias, self)


class LearningGroupNorm(nn.GroupNorm):
    """A group norm that learns."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, _as(self.weight, x), _as(self.bias, x), self.eps)


class LearningLayerNorm(nn.LayerNorm):
    """A layer norm that learns."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, _as(self.weight, x), _as(self.bias, x), self.eps)


_CLASSES: dict[type, type] = {
    nn.Linear: LearningLinear, nn.Conv2d: LearningConv2d, nn.GroupNorm: LearningGroupNorm, nn.LayerNorm: LearningLayerNorm,
}  # fmt: skip


def _as(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x.reshape(-1, x.shape[-1]), _as(weight, x), _as(bias, x)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N, outputs)
        grad_x = product(rows, _as(weight, grad).t()).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = product(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t()).to(weight.dtype)
        return grad_x, grad_weight, rows.sum(0, dtype=weight.dtype) if ctx.has_bias else None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.conv2d(x, _as(weight, x), _as(bias, x), layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        has_bias = layer.bias is not None
        found = torch.ops.aten.convolution_backward(
            grad, x, _as(weight, x), [layer.out_channels] if has_bias else None, layer.stride, layer.padding, layer.dilation,
            False, [0, 0], layer.groups, [ctx.needs_input_grad[0], True, has_bias],
        )  # fmt: skip
        return found[0], found[1].to(weight.dtype), found[2].to(weight.dtype) if has_bias else None, None

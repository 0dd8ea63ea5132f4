"""Muon: each matrix moves along the nearest orthogonal matrix of its momentum (Jordan et al. 2024; Liu et al. 2025).

    m = b m + (1 - b) g        u = (1 - b) g + b m        (Nesterov)
    w = w - lr (0.2 sqrt(max(rows, columns)) orthogonal(u) + decay w)

All directions of a matrix then learn equally fast, not only those of the largest gradients. The factor gives a step the size of
AdamW's, so that both share a learning rate. Vectors, embeddings and the first layers are AdamW's (Loshchilov and Hutter 2019).
torch.optim.Muon takes no convolutions, whose kernel is a matrix of (out, in * height * width).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration: brings singular values near 1 in five steps
ITERATIONS = 5
STEP_SIZE = 0.2  # root of the mean square of AdamW's steps
MIN_SIDE = 16  # a thinner matrix has few directions to balance
FIRST_LAYERS = ("conv_in", "patch_embedding")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices inside the model, other matrices, and vectors (norms and biases), which do not decay."""
    embeddings = {id(item.weight) for item in model.modules() if isinstance(item, nn.Embedding)}
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, item in model.named_parameters():
        if not item.requires_grad:
            continue
        is_first = id(item) in embeddings or any(part in name for part in FIRST_LAYERS)
        if item.ndim < 2:
            vectors.append(item)
        elif is_first or min(item.shape[0], item[0].numel()) < MIN_SIDE:
            outer.append(item)
        else:
            inner.append(item)
    groups = [(inner, True, weight_decay), (outer, False, weight_decay), (vectors, False, 0.0)]
    return [{"params": items, "is_matrix": flag, "weight_decay": decay} for items, flag, decay in groups if items]


class Muon(torch.optim.Optimizer):
    """Over `parameter_groups`; ``momentum`` is the matrices', ``betas`` are AdamW's."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0, "is_matrix": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moving:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["is_matrix"]:
                self._along_orthogonal(moving, group)
            else:
                for parameter in moving:
                    self._as_adamw(parameter, parameter.grad, self.state[parameter], group)

    def _along_orthogonal(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape at once: one by one a 128 x 128 matrix keeps one core busy and leaves the others idle."""
        alike = defaultdict(list)
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"]
            momentum.lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(momentum, group["momentum"])
            matrix = update.flatten(1) if update.ndim == 2 else update.permute(0, 2, 3, 1).flatten(1)  # a view: channels last
            alike[matrix.shape, matrix.device].append((parameter, matrix))
        for (shape, _), pairs in alike.items():
            directions = orthogonal(torch.stack([matrix for _, matrix in pairs]))
            for (parameter, _), direction in zip(pairs, directions):
                if parameter.ndim == 4:
                    rows, columns, height, width = parameter.shape
                    direction = direction.view(rows, height, width, columns).permute(0, 3, 1, 2)
                parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"] * STEP_SIZE * max(shape) ** 0.5)

    @staticmethod
    def _as_adamw(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter), step=0)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        state["step"] = step = state["step"] + 1
        first, second = group["betas"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        deviation = (square / (1 - second**step)).sqrt_().add_(1e-8)
        parameter.addcdiv_(mean, deviation, value=-group["lr"] / (1 - first**step))


def orthogonal(matrices: Tensor) -> Tensor:
    """Near ``U V^T`` of each ``U S V^T`` of (N, rows, columns): singular values of 0.7 to 1.2. In bf16 where that is fast.

    Each step is a polynomial in x x^T times x, so all five are one such polynomial times the first x. In fp32 it is worked out
    on the small square x x^T, which for the wide matrices of convolutions takes a third of the time; bf16 is too coarse for it.
    """
    x = matrices.to(torch.bfloat16 if has_fast_bf16(matrices.device) else torch.float32)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    is_wide = x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]
    x = _polynomial(x @ x.mT) @ x if is_wide else _iterated(x)
    return x.mT if is_tall else x


def _iterated(x: Tensor) -> Tensor:
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _polynomial(square: Tensor) -> Tensor:
    """p(x x^T) such that p(x x^T) x is what the iterations make of x."""
    product = factor = _factor(square)
    for _ in range(ITERATIONS - 1):
        square = factor @ factor @ square  # of factor x, for all these commute
        factor = _factor(square)
        product = factor @ product
    return product


def _factor(square: Tensor) -> Tensor:
    """What one iteration multiplies x by: a + b x x^T + c (x x^T)^2."""
    a, b, c = QUINTIC
    factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


@cache  # each matrix of each step asks
def has_fast_bf16(device: torch.device) -> bool:
    """Whether it multiplies bf16 in hardware: old cards and CPUs only imitate it."""
    if device.type == "cuda":  # torch.cuda.is_bf16_supported asks the current card, whichever that is
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(found.get("amx_bf16") or found.get("avx512_bf16"))

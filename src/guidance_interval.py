"""Guidance in a part of the schedule alone: outside of it the U-Net draws the prompt's half of the batch, in half the time.

At high noise levels guidance takes variety away, at low ones it changes next to nothing (Kynkäänniemi et al. 2024,
arXiv 2404.07724). The interval is one of noise levels, as in the paper: the same for every sampler and number of steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def limit_guidance(unet: nn.Module, start: float, end: float, timesteps: int) -> list[Any]:
    """Guide from ``start`` to ``end``, shares of the ``timesteps`` of the schedule, 0 being noise; returns hooks to remove.

    The U-Net must be called as diffusers' pipelines call it for guidance: the negative prompt's half of the batch first.
    Outside of the interval both halves of its output are the prompt's, so that u + s * (c - u) is c for every scale s.
    """
    if start <= 0 and end >= 1:
        return []
    is_halved = False

    def halve(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal is_halved
        is_halved = not start <= 1 - float(args[1]) / timesteps <= end
        return _second_half((args, named), len(args[0])) if is_halved else None

    def double(_: nn.Module, args: tuple[Any, ...], output: tuple[Tensor]) -> tuple[Tensor] | None:
        return (torch.cat([output[0], output[0]]),) if is_halved else None

    return [unet.register_forward_pre_hook(halve, with_kwargs=True), unet.register_forward_hook(double)]


def _second_half(value: Any, batch_size: int) -> Any:
    """The second half of every batch of that size in tensors, tuples and dictionaries."""
    if isinstance(value, dict):
        return {name: _second_half(item, batch_size) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_second_half(item, batch_size) for item in value)
    return value.chunk(2)[1] if isinstance(value, Tensor) and value.ndim and len(value) == batch_size else value

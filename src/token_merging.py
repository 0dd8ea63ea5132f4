"""Token merging: self-attention at a U-Net's highest resolution over fewer tokens, those that are alike taken as their mean.

ToMe for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604), with A1111's choices: self-attention alone, and the
upper left token of each 2x2 cell is one that others may be merged into, where the paper draws one at random. Every picture
is matched by itself and in float32, so that neither seed nor neighbours in a batch have a say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.errors import usage_error

_SCORES = 1 << 24  # similarities at once: 64 MiB


def merge_tokens(unet: nn.Module, ratio: float) -> list[Any]:
    """Let self-attention at the highest resolution that has any work on ``1 - ratio`` of its tokens; returns hooks to remove.

    Raises UserError (usage) for a compiled U-Net, which would not look at the hooks.
    """
    if ratio <= 0:
        return []
    if any(module._compiled_call_impl is not None for module in unet.modules()):
        raise usage_error("--token-merging and --torch-compile do not go together; leave one of the two out")
    handles = []
    for transformer in _highest_transformers(unet):
        merger = _Merger(ratio)
        handles.append(transformer.register_forward_pre_hook(merger.note_grid))
        for block in transformer.transformer_blocks:
            handles.append(block.attn1.register_forward_pre_hook(merger.before))
            handles.append(block.attn1.register_forward_hook(merger.after))
    return handles


def find_places(tokens: Tensor, grid: tuple[int, int], ratio: float) -> tuple[Tensor, int]:
    """Where each of one picture's tokens (L, C), h rows of w, goes: (L,) indices, and how many places there are.

    The ``ratio * L`` tokens most similar (by cosine) to an upper left one go to its place, all others to their own.
    """
    height, width = grid
    number = torch.arange(height * width, device=tokens.device)
    is_target = (number // width % 2 == 0) & (number % width % 2 == 0)
    targets, others = number[is_target], number[~is_target]
    unit = nn.functional.normalize(tokens.float(), dim=-1)
    goal = unit[targets].t()
    best = [(unit[rows] @ goal).max(-1) for rows in others.split(max(1, _SCORES // len(targets)))]
    similarity, nearest = (torch.cat(parts) for parts in zip(*best))
    order = similarity.argsort(descending=True, stable=True)
    count = min(int(ratio * len(number)), len(others))
    merged, kept = order[:count], order[count:].sort().values
    places = torch.empty_like(number)
    places[targets] = torch.arange(len(targets), device=tokens.device)
    places[others[merged]] = nearest[merged]
    places[others[kept]] = torch.arange(len(targets), len(targets) + len(kept), device=tokens.device)
    return places, len(number) - count


def merge(tokens: Tensor, places: Tensor, count: int) -> Tensor:
    """Tokens (L, C) -> (count, C), the mean of those that share a place."""
    # A card adds in any order; in float64 that does not show.
    wide = tokens.to(torch.float32 if tokens.device.type == "mps" else torch.float64)
    sums = wide.new_zeros(count, tokens.shape[1]).index_add_(0, places, wide)
    return (sums / torch.bincount(places, minlength=count)[:, None]).to(tokens.dtype)


class _Merger:
    """The hooks around the self-attentions of one transformer."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._grid = (0, 0)
        self._places: list[Tensor] = []

    def note_grid(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._grid = tuple(args[0].shape[-2:])  # of (B, C, h, w); attention sees (B, h * w, C)

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found = [find_places(tokens, self._grid, self._ratio) for tokens in args[0]]
        self._places = [places for places, _ in found]
        return torch.stack([merge(tokens, *place) for tokens, place in zip(args[0], found)]), *args[1:]

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Every token is given what its place was given."""
        return torch.stack([result[places] for result, places in zip(output, self._places)])


def _highest_transformers(unet: nn.Module) -> list[nn.Module]:
    """The transformers of the first block that has any on the way down, and of the last one on the way up."""
    down = [block.attentions for block in unet.down_blocks if hasattr(block, "attentions")]
    up = [block.attentions for block in unet.up_blocks if hasattr(block, "attentions")]
    return [*(down[0] if down else ()), *(up[-1] if up else ())]

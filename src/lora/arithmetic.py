"""Sums, truncations and sizes of adapters, computed on their pairs of factors: no weight-sized matrix is ever made.

A layer adds ``scale * up @ down`` to its weight; a convolution's (r, in, h, w) counts as (r, in * h * w).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from src.errors import refused
from src.lora.formats import LoraLayer, Where
from src.lora.names import canonical
from src.tensor_files import quoted


def added(weighted: Sequence[tuple[str, Mapping[Where, LoraLayer], float]]) -> dict[Where, LoraLayer]:
    """The sum of adapters ``(name, layers, weight)`` as one, exact: factors side by side, rank the sum of their ranks.

    float32, alpha = rank. Raises UserError (refused) for a DoRA, whose effect is no sum, and for shapes that differ.
    """
    parts: dict[Where, list[tuple[str, LoraLayer, float]]] = {}
    for name, layers, weight in weighted:
        _refuse_dora(name, layers, "its lengths belong to one weight and cannot be added to another's")
        for (component, module), layer in layers.items():
            parts.setdefault((component, canonical(component, module)), []).append((name, layer, weight))
    return {where: _side_by_side(where, items) for where, items in parts.items()}


def resized(name: str, layers: Mapping[Where, LoraLayer], rank: int) -> tuple[dict[Where, LoraLayer], dict[Where, float]]:
    """The best adapter of at most ``rank`` in each layer (Eckart and Young 1936), and the share of energy that it keeps.

    Energy is the square of the Frobenius norm. Layers of that rank or less stay as they are, with a share of 1; the others
    are float32, alpha = rank. Raises UserError (refused) for a DoRA.
    """
    _refuse_dora(name, layers, "its lengths were learnt for this rank")
    small: dict[Where, LoraLayer] = {}
    kept: dict[Where, float] = {}
    for where, layer in layers.items():
        small[where], kept[where] = (layer, 1.0) if layer.rank <= rank else _truncated(layer, rank)
    return small, kept


def norm(layer: LoraLayer) -> float:
    """The Frobenius norm of ``scale * up @ down``: for a DoRA, of what is added before the lengths are set."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    return abs(layer.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def total_kept(layers: Mapping[Where, LoraLayer], kept: Mapping[Where, float]) -> float:
    """The share of the whole adapter's energy, given each layer's."""
    energy = {where: norm(layer) ** 2 for where, layer in layers.items()}
    whole = sum(energy.values())
    return sum(energy[where] * kept[where] for where in energy) / whole if whole else 1.0


def _side_by_side(where: Where, items: Sequence[tuple[str, LoraLayer, float]]) -> LoraLayer:
    first_name, first, _ = items[0]
    shape, out = first.down.shape[1:], first.up.shape[0]
    downs, ups = [], []
    for name, layer, weight in items:
        # A Linear and a 1x1 convolution are the same thing.
        if layer.up.shape[0] != out or (*layer.down.shape[1:], 1, 1)[:3] != (*shape, 1, 1)[:3]:
            raise refused(
                f"{first_name} and {name}: layer {quoted(where[1])} has another shape in each; they are for different models"
            )
        downs.append(layer.down.float().reshape(layer.rank, *shape))
        ups.append(layer.up.float().flatten(1) * (layer.scale * weight))
    down = torch.cat(downs)
    return _plain(down, torch.cat(ups, dim=1))


def _truncated(layer: LoraLayer, rank: int) -> tuple[LoraLayer, float]:
    """Singular values of up @ down by way of the two small triangles of its factors; float64."""
    up_basis, up_rest = torch.linalg.qr(layer.up.double().flatten(1) * layer.scale)  # (out, k), (k, r)
    down_basis, down_rest = torch.linalg.qr(layer.down.double().flatten(1).T)  # (in, m), (m, r)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    root = values[:rank].sqrt()  # shared between both factors, so that neither is large
    up = up_basis @ (left[:, :rank] * root)
    down = (root[:, None] * right[:rank]) @ down_basis.T
    energy = values.square()
    kept = float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    return _plain(down.float().reshape(-1, *layer.down.shape[1:]), up.float()), kept


def _plain(down: Tensor, up: Tensor) -> LoraLayer:
    """A layer of scale 1 from down (r, in) or (r, in, h, w) and up (out, r)."""
    return LoraLayer(down.contiguous(), up.reshape(*up.shape, *[1] * (down.ndim - 2)).contiguous(), float(down.shape[0]), 1.0)


def _refuse_dora(name: str, layers: Mapping[Where, LoraLayer], reason: str) -> None:
    if any(layer.magnitude is not None for layer in layers.values()):
        raise refused(f"{name}: is a DoRA; {reason}; use a plain LoRA")

"""DeepCache: of several calls of a U-Net in succession one is whole, the others run its outermost layers alone.

What lies deep in a U-Net hardly changes from one step to the next, so it is kept: on the calls between, the last layer of
the last up block is given what the layer before it gave at the last whole call, beside the new sample's first features
(Ma et al. 2023, arXiv 2312.00858, the outermost skip branch). Hooks do it, and take the inner blocks out of the U-Net for
the time of such a call: its own code then runs what is left, and accelerate's offloading and adapters are where they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.errors import usage_error


def reuse_deep_features(unet: nn.Module, interval: int) -> list[Any]:
    """Make one call of ``interval`` whole, the first one always; returns hooks to remove. One run of a sampler, one cache.

    Samplers of second order call the U-Net twice a step: calls are counted. Raises UserError (usage) under group offload.
    """
    if interval <= 1:
        return []
    if any(hasattr(module, "_diffusers_hook") for module in unet.modules()):
        raise usage_error("--deep-cache leaves out blocks that group offload expects in their order; leave one of the two out")
    return _StepCache(unet, interval).attach()


class _StepCache:
    def __init__(self, unet: nn.Module, interval: int) -> None:
        self._unet, self._interval = unet, interval
        self._skip_channels = unet.conv_in.out_channels
        self._features: Tensor | None = None  # (B, C, h, w), of the last whole call
        self._calls = 0  # since then, it included
        last = unet.up_blocks[-1]
        self._last_layer = last.resnets[-1]
        shallow = {(unet, "down_blocks"): [], (unet, "mid_block"): None, (unet, "up_blocks"): [last]}
        shallow |= {(last, name): [getattr(last, name)[-1]] for name in ("resnets", "attentions") if hasattr(last, name)}
        self._whole = {(module, name): getattr(module, name) for module, name in shallow}
        self._shallow = {place: part if part is None else nn.ModuleList(part) for place, part in shallow.items()}

    def attach(self) -> list[Any]:
        return [
            self._unet.register_forward_pre_hook(self._before),
            self._last_layer.register_forward_pre_hook(self._keep_or_put_in),
            self._unet.register_forward_hook(self._after, always_call=True),  # after an error, too
            self,  # and, where the run is interrupted, which hooks do not see, when the hooks are removed
        ]

    def remove(self) -> None:
        """Make the U-Net whole."""
        _put(self._whole)

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        fits = self._features is not None and len(self._features) == len(args[0])  # guidance may end: half the batch
        if not fits or self._calls == self._interval:
            self._features, self._calls = None, 0
        else:
            if hasattr(self._unet, "_hf_hook"):  # model offload: it brings what it sees to the card, and must see all
                self._unet._hf_hook.pre_forward(self._unet)
            _put(self._shallow)
        self._calls += 1

    def _keep_or_put_in(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The last layer's input is (B, C + skip, h, w): what came from below, and the new sample's first features."""
        if self._features is None:
            self._features = args[0][:, : -self._skip_channels].clone()
            return None
        return torch.cat([self._features, args[0][:, -self._skip_channels :]], dim=1), *args[1:]

    def _after(self, *_: Any) -> None:
        _put(self._whole)


def _put(parts: dict[tuple[nn.Module, str], nn.Module | None]) -> None:
    for (module, name), part in parts.items():
        setattr(module, name, part)

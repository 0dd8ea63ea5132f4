"""The part of a U-Net that learns, when its own weights do: the same to the loop as an adapter is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import usage_error
from src.unet_parts import is_in_part


class UnetNetwork:
    """The parameters of one part (`src.unet_parts`) learn, in float32; all others are frozen, in ``computes_in``."""

    def __init__(self, unet: nn.Module, part: str, learning_rate: float, computes_in: torch.dtype) -> None:
        """Raises UserError (usage) when the U-Net has no such part."""
        self.models = {"unet": unet}
        self._learning_rate = learning_rate
        blocks = len(unet.up_blocks)
        for name, parameter in unet.named_parameters():
            learns = is_in_part(name, part, blocks)
            parameter.requires_grad_(learns)
            parameter.data = parameter.data.to(torch.float32 if learns else computes_in)
        if not self.trainable():
            raise usage_error(f"--train {part}: this U-Net has no such part; choose another")

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every tensor that learns, by name: ``unet.<parameter>``."""
        return {f"unet.{name}": item for name, item in self.models["unet"].named_parameters() if item.requires_grad}

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's one parameter group (``base_lr`` keeps the full learning rate)."""
        return [{"params": list(self.trainable().values()), "lr": self._learning_rate, "base_lr": self._learning_rate}]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every trainable tensor. Raises ValueError when names or shapes are not these."""
        mine = self.trainable()
        if {name: tuple(item.shape) for name, item in mine.items()} != {n: tuple(t.shape) for n, t in tensors.items()}:
            raise ValueError("the tensors are those of another part or model")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(tensors[name])

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """What an adapter has for prior preservation, which there is none of here."""
        raise NotImplementedError("weights that learn cannot be taken off")
        yield

"""LoRA adapters of any common origin: attach, detach, report. `read_adapter` (src/lora/reading.py) reads them.

An adapter is attached with forward hooks: the module computes what it always did, and ``up(down(x))`` is added to its
output. No weight of the model is ever changed, so taking the hooks off gives the model back bit for bit, and an adapter
is exchanged in milliseconds, without reading the model again and wherever its weights lie (card, memory or, offloaded,
nowhere yet): accelerate's offloading replaces ``module.forward``, and hooks run around that.

LoRA: Hu et al. 2021, arXiv 2106.09685. Rank-stabilised scale: Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.errors import refused, usage_error
from src.lora.formats import LoraLayer, module_aliases
from src.lora.reading import Adapter, read_adapter
from src.tensor_files import quoted

__all__ = ["Adapter", "AdapterStack", "LoraReport", "read_adapter"]

COMPONENTS = {"unet": "unet", "text_encoder": "text encoder", "text_encoder_2": "text encoder 2"}  # name -> as said to people


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What an attached adapter touches."""

    name: str
    family: str  # the adapter's, or the model's where the adapter does not tell
    format: str
    ranks: tuple[int, ...]  # those that occur, ascending
    alphas: tuple[float, ...]
    matched: int  # layers
    total: int
    unmatched: tuple[str, ...]  # "component: module" as the file calls it
    per_component: dict[str, int]  # matched layers, components without any left out

    def line(self) -> str:
        """``LoRA dog: SD1, kohya, rank 4, alpha 4, 192/192 layers (unet 128, text encoder 64)``."""
        where = ", ".join(f"{COMPONENTS[component]} {count}" for component, count in self.per_component.items())
        return (
            f"LoRA {self.name}: {self.family}, {self.format}, rank {_range(self.ranks)}, alpha {_range(self.alphas)}, "
            f"{self.matched}/{self.total} layers ({where})"
        )


class AdapterStack:
    """The adapters of one pipeline. Modules without an adapter, and components without any, are left as they are."""

    def __init__(self, pipeline: Any, family: str) -> None:
        """``pipeline`` has ``unet``, ``text_encoder`` and perhaps ``text_encoder_2``; ``family`` is SD1, SD2 or SDXL."""
        self.family = family
        self._models: dict[str, nn.Module] = {
            component: model for component in COMPONENTS if (model := getattr(pipeline, component, None)) is not None
        }
        self._modules = {
            component: {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
            for component, model in self._models.items()
        }
        self._aliases = {component: module_aliases(component, modules) for component, modules in self._modules.items()}
        self._attached: tuple[tuple[Adapter, float], ...] = ()
        self._handles: list[Any] = []

    def match(self, adapter: Adapter, allow_partial: bool = False) -> LoraReport:
        """Say what ``adapter`` would touch, without attaching it. Raises UserError (refused) as `set` does."""
        return self._resolve(adapter, allow_partial)[1]

    def set(self, adapters: Iterable[tuple[Adapter, float]], allow_partial: bool = False) -> list[LoraReport]:
        """Attach exactly these adapters, each with its weight, in place of whatever is attached; weight 0 is no adapter.

        Raises UserError: usage for a weight that is not finite; refused, with nothing changed, for an adapter of another
        family, one that fits nowhere, one whose shapes differ, and, unless ``allow_partial``, one that fits in part.
        """
        wanted = tuple(adapters)
        for adapter, weight in wanted:
            if not math.isfinite(weight):
                raise usage_error(f"LoRA {adapter.name}: the weight {weight} is not a number to draw with; use e.g. 0.8")
        resolved = [self._resolve(adapter, allow_partial) for adapter, _ in wanted]
        if wanted != self._attached:
            parts: dict[nn.Module, list[tuple[LoraLayer, float]]] = {}
            for (layers, _), (_, weight) in zip(resolved, wanted):
                for module, layer in layers.items() if weight else ():
                    parts.setdefault(module, []).append((layer, weight))
            self._replace_hooks(parts)
            self._attached = wanted
        return [report for _, report in resolved]

    def clear(self) -> None:
        """Detach everything: the model is again what it was, bit for bit."""
        if self._attached:
            self._replace_hooks({})
            self._attached = ()

    def _resolve(self, adapter: Adapter, allow_partial: bool) -> tuple[dict[nn.Module, LoraLayer], LoraReport]:
        """Find the module of each layer, and refuse what does not fit."""
        label = f"LoRA {adapter.name}"
        if adapter.family not in (None, self.family):
            raise refused(f"{label} is for {adapter.family}, the model is {self.family}; take a LoRA made for {self.family}")
        total = len(adapter.layers)
        found: dict[nn.Module, LoraLayer] = {}
        unmatched: list[str] = []
        counts: Counter[str] = Counter()
        for (component, name), layer in adapter.layers.items():
            module_name = self._aliases.get(component, {}).get(name)
            if module_name is None:
                unmatched.append(f"{component}: {name}")
                continue
            module = self._modules[component][module_name]
            if module in found:
                raise refused(f"{label} has layer {quoted(name)} twice, under two names; the file is damaged")
            _check_shapes(layer, module, f"{label}: layer {quoted(name)}", self.family)
            found[module] = layer
            counts[component] += 1
        if not found:
            raise refused(f"{label}: none of its {total} layers exists in this {self.family} model; it is for another model")
        if unmatched and not allow_partial:
            raise refused(
                f"{label}: only {len(found)} of its {total} layers exist in this {self.family} model "
                f"(not {quoted(unmatched[0])}); use --allow-partial to draw with those alone"
            )
        report = LoraReport(
            adapter.name, adapter.family or self.family, adapter.format,
            ranks=tuple(sorted({layer.rank for layer in found.values()})),
            alphas=tuple(sorted({layer.alpha for layer in found.values()})),
            matched=len(found), total=total, unmatched=tuple(unmatched),
            per_component={component: counts[component] for component in COMPONENTS if counts[component]},
        )  # fmt: skip
        return found, report

    def _replace_hooks(self, parts: Mapping[nn.Module, Sequence[tuple[LoraLayer, float]]]) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = [module.register_forward_hook(_LowRankSum(module, part)) for module, part in parts.items()]
        # Compiled code does not look again whether a module has hooks: unless it is forgotten, the change would go unseen.
        if any(part._compiled_call_impl is not None for model in self._models.values() for part in model.modules()):
            torch.compiler.reset()


class _LowRankSum:
    """The forward hook of one module: all its adapters as one pair of products, of rank R = the sum of their ranks."""

    def __init__(self, module: nn.Module, parts: Sequence[tuple[LoraLayer, float]]) -> None:
        self._weight_shape = _weight_shape(module)
        self._parts = parts
        self._down: Tensor | None = None
        self._up: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The output says where and in which precision the module computes; its weight may be offloaded or stored smaller.
        if self._down is None or self._down.device != output.device or self._down.dtype != output.dtype:
            self._down, self._up = self._fold(output.device, output.dtype)
        x = inputs[0].to(output.device, output.dtype)
        if isinstance(module, nn.Conv2d):  # _conv_forward has the module's stride, padding and padding mode
            update = F.conv2d(module._conv_forward(x, self._down, None), self._up)
        else:
            update = F.linear(F.linear(x, self._down), self._up)
        return output.add_(update)  # in place: the output is the module's own, and a wide layer's is large

    @torch.no_grad()
    def _fold(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Concatenate along the rank, with weight and scale folded into ``up``; computed in float32, rounded once."""
        out, *rest = self._weight_shape  # rest: (in,) or (in, h, w)
        down = torch.cat([layer.down.to(device).float().reshape(layer.rank, *rest) for layer, _ in self._parts])
        ups = [layer.up.to(device).float().flatten(1) * (layer.scale * weight) for layer, weight in self._parts]
        up = torch.cat(ups, dim=1).reshape(out, -1, *[1] * (len(rest) - 1))
        return down.to(dtype), up.to(dtype)  # (R, in) and (out, R), or (R, in, h, w) and (out, R, 1, 1)


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in) or (out, in, h, w), also where the weight itself is packed or elsewhere."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels // module.groups, *module.kernel_size


def _check_shapes(layer: LoraLayer, module: nn.Module, label: str, family: str) -> None:
    """A Linear and a 1x1 convolution are the same thing, so (r, in) and (r, in, 1, 1) fit both."""
    wanted = _weight_shape(module)
    given = (layer.up.shape[0], *layer.down.shape[1:])
    if (*wanted, 1, 1)[:4] != (*given, 1, 1)[:4]:
        raise refused(f"{label} is for a weight of {_by(given)}, this {family} model has {_by(wanted)}; take another LoRA")


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"

"""LoRA adapters of any common origin: attach, detach, report. `read_adapter` (src/lora/reading.py) reads them.

An adapter is attached with forward hooks: the module computes what it always did, and ``up(down(x))`` is added to its
output. No weight of the model is ever changed, so taking the hooks off gives the model back bit for bit, and an adapter
is exchanged in milliseconds, without reading the model again and wherever its weights lie (card, memory or, offloaded,
nowhere yet): accelerate's offloading replaces ``module.forward``, and hooks run around that.

In a compiled model hooks stay where they once were and only what they add is exchanged, filled up with zeros to the largest
rank so far: the compiled code fits as it is. It is made anew when layers come in that no adapter has touched yet, and once
more when a rank grows or a DoRA comes or goes.

A weight other than 1 goes part of the way, or beyond, from the model's weight to the adapted one; for a DoRA, too, as in
A1111 and ComfyUI.

LoRA: Hu et al. 2021, arXiv 2106.09685. Rank-stabilised scale: Kalajdzievski 2023, arXiv 2312.03732. DoRA: Liu et al. 2024,
arXiv 2402.09353.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
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
        """``LoRA dog: SD1, kohya, rank 4, alpha 4, 176/176 layers (unet 128, text encoder 48)``."""
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
        self._hooks: dict[nn.Module, tuple[_LowRankSum, Any]] = {}  # and the handle to remove it by
        self._watched: set[nn.Module] = set()  # compiled models, whose hooks are made ready before each call

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
        compiled = {model for model in self._models.values() if _is_compiled(model)}
        within = {module for model in compiled for module in model.modules()}
        stay = {module: hook for module, (hook, _) in self._hooks.items() if module in within}
        # First of all, because a DoRA may be refused here, and then nothing shall have changed.
        made = {module: _LowRankSum(module, parts.get(module, ())) for module in {**stay, **parts}}
        for module, (_, handle) in self._hooks.items():
            if module not in stay:
                handle.remove()
        kept = {module: self._hooks[module] for module in stay}
        for module, hook in stay.items():
            hook.become(made[module])
        new = {module: hook for module, hook in made.items() if module not in stay}
        self._hooks = kept | {module: (hook, module.register_forward_hook(hook)) for module, hook in new.items()}
        for model in compiled - self._watched:
            model.register_forward_pre_hook(self._make_ready, with_kwargs=True)
        self._watched |= compiled
        # Compiled code does not look again whether a module has hooks: unless it is forgotten, the change would go unseen.
        if within & new.keys():
            torch.compiler.reset()

    def _make_ready(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Fold what is new outside of compiled code, which would be made anew for it."""
        device = next(value.device for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        modules = self._modules[next(component for component, known in self._models.items() if known is model)]
        for module in modules.values():
            if module in self._hooks:
                self._hooks[module][0].make_ready(device, model.dtype)


def _is_compiled(model: nn.Module) -> bool:
    return any(part._compiled_call_impl is not None for part in model.modules())


class _LowRankSum:
    """The forward hook of one module: all its adapters as one pair of products, of rank R = the sum of their ranks.

    An adapter of weight w changes the module's weight W into W + w * (W' - W), W' being the adapted one. For a DoRA, W' is
    V = W + scale * up @ down with its rows (or columns) brought to given lengths, that is V times a gain for each of them:

        rows     (W' - W) x = (gain - 1) * (W x) + gain * scale * up(down(x)),  where W x is the output without its bias
        columns  (W' - W) x = W ((gain - 1) * x) + scale * up(down(gain * x)),  where W is the module itself, run again
    """

    def __init__(self, module: nn.Module, parts: Sequence[tuple[LoraLayer, float]]) -> None:
        self._weight_shape = _weight_shape(module)
        self._parts = parts
        self._least_rank = 0  # zeros fill up to it
        self._gains = [None if layer.magnitude is None else _gain(module, layer) for layer, _ in parts]
        self._bias: Tensor | None = None
        if any(gain is not None for gain in self._gains) and module.bias is not None:
            with align_module_device(module):
                self._bias = module.bias.detach().to("cpu", torch.float32)
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        self._row_gain: Tensor | None = None  # the sum of w * (gain - 1)
        self._column_gain: Tensor | None = None
        self._offset: Tensor | None = None

    def become(self, other: _LowRankSum) -> None:
        """Add from now on what ``other`` does, in products of no smaller a rank than before."""
        rank = max(self._least_rank, sum(layer.rank for layer, _ in self._parts))
        for name, value in vars(other).items():
            setattr(self, name, value)
        self._least_rank = rank

    def make_ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Fold now, if that has not been done yet."""
        if self._down is None:
            self._fold(device, dtype)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The output says where and in which precision the module computes; its weight may be offloaded or stored smaller.
        if self._down is None or self._down.device != output.device or self._down.dtype != output.dtype:
            self._fold(output.device, output.dtype)
        x = inputs[0].to(output.device, output.dtype)
        if isinstance(module, nn.Conv2d):  # _conv_forward has the module's stride, padding and padding mode
            update = F.conv2d(module._conv_forward(x, self._down, None), self._up)
        else:
            update = F.linear(F.linear(x, self._down), self._up)
        if self._row_gain is not None:
            update.addcmul_(output, self._row_gain)
        if self._column_gain is not None:
            update.add_(module.forward(x * self._column_gain))
        if self._offset is not None:
            update.add_(self._offset)
        return output.add_(update)  # in place: the output is the module's own, and a wide layer's is large

    @torch.no_grad()
    def _fold(self, device: torch.device, dtype: torch.dtype) -> None:
        """Concatenate along the rank, with weights, scales and gains folded in; computed in float32, rounded once."""
        out, *rest = self._weight_shape  # rest: (in,) or (in, h, w)
        tail = [1] * (len(rest) - 1)
        downs, ups = [], []
        rows, columns = torch.zeros(out, 1, device=device), torch.zeros(1, rest[0], *tail, device=device)
        for (layer, weight), gain in zip(self._parts, self._gains):
            down = layer.down.to(device).float().reshape(layer.rank, *rest)
            up = layer.up.to(device).float().flatten(1) * (layer.scale * weight)
            if gain is not None and gain.ndim == 1:
                gain = gain.to(device)[:, None]
                rows += weight * (gain - 1)
                up = up * gain
            elif gain is not None:
                gain = gain.to(device).reshape(columns.shape)
                columns += weight * (gain - 1)
                down = down * gain
            downs.append(down)
            ups.append(up)
        if (missing := self._least_rank - sum(layer.rank for layer, _ in self._parts)) > 0:
            downs.append(torch.zeros(missing, *rest, device=device))
            ups.append(torch.zeros(out, missing, device=device))
        self._down = torch.cat(downs).to(dtype)  # (R, in) or (R, in, h, w)
        self._up = torch.cat(ups, dim=1).reshape(out, -1, *tail).to(dtype)  # (out, R) or (out, R, 1, 1)
        kinds = {gain.ndim == 1 for gain in self._gains if gain is not None}
        self._row_gain = rows.reshape(out, *tail).to(dtype) if True in kinds else None
        self._column_gain = columns.squeeze(0).to(dtype) if False in kinds else None
        if self._bias is not None:  # it is in the output that the rows' gain multiplies, and once more in a second run
            offset = -self._bias.to(device)[:, None] * (rows + (1.0 if False in kinds else 0.0))
            self._offset = offset.reshape(out, *tail).to(dtype)


@torch.no_grad()
def _gain(module: nn.Module, layer: LoraLayer) -> Tensor:
    """What brings the rows, or columns, of W + scale * up @ down to a DoRA's lengths; float32, on the CPU.

    (out,) for rows; (1, in) or (1, in, 1, 1) for columns. A row of zeros has no direction, and stays.
    """
    with align_module_device(module):  # accelerate's offloading keeps the weight elsewhere between two calls
        weight = module.weight.detach()
        if weight.shape != _weight_shape(module) or not weight.is_floating_point():
            raise refused("a DoRA needs the model's own weights, and these are quantised; take a plain LoRA")
        weight = weight.float()
        change = layer.up.to(weight.device).float().flatten(1) @ layer.down.to(weight.device).float().flatten(1)
        adapted = weight + layer.scale * change.reshape(weight.shape)
        assert layer.magnitude is not None
        if layer.magnitude.ndim == 1:
            length = adapted.flatten(1).norm(dim=1)
        else:
            length = adapted.transpose(0, 1).flatten(1).norm(dim=1).reshape(layer.magnitude.shape)
        gain = layer.magnitude.to(weight.device).float() / length
        return torch.where(length > 0, gain, 1.0).cpu()


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

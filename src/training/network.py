"""The part that learns: low-rank layers that peft puts into the live models, and their way out as plain tensors.

LoRA: Hu et al. 2021, arXiv 2106.09685. DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer as PeftLayer
from torch import Tensor, nn

from src.errors import usage_error
from src.lora.formats import LoraLayer, Where
from src.train_config import TrainConfig, learning_rates

ADAPTER = "default"  # peft's name for it
ATTENTION = r"\.to_(q|k|v|out\.0)$"
# Diffusers' default is attention alone; kohya's reaches all of a transformer block and the projections around it, and with
# convolutions the residual blocks and the changes of resolution, too (LoCon).
TRANSFORMER = rf"{ATTENTION}|\.ff\.net\.(0\.proj|2)$|\.proj_(in|out)$"
RESNET = r"\.(conv1|conv2|conv_shortcut|time_emb_proj)$|samplers\.0\.conv$"
UNET_TARGETS = {"attention": ATTENTION, "kohya": TRANSFORMER, "conv": f"{TRANSFORMER}|{RESNET}"}
TEXT_ATTENTION = r"\.self_attn\.(q|k|v|out)_proj$"
TEXT_LAYER = rf"{TEXT_ATTENTION}|\.mlp\.fc[12]$"
TEXT_TARGETS = {"attention": TEXT_ATTENTION, "kohya": TEXT_LAYER, "conv": TEXT_LAYER}
_LAYER_NUMBER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")


class LoraNetwork:
    """The adapter in the making. ``models``: component (unet, text_encoder, text_encoder_2) -> live model, frozen by this."""

    def __init__(self, models: Mapping[str, nn.Module], train: TrainConfig, *, computes_in: torch.dtype) -> None:
        """New layers are the identity: ``up`` is zero. They are the same for the same ``train.seed``, on every device.

        ``computes_in``: the precision of autocast. Raises UserError (usage) when the models have no such layers.
        """
        self.models = dict(models)
        self._layers: dict[Where, PeftLayer] = {}
        self._train = train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.seed)
            for component, model in self.models.items():
                self._inject(component, model, computes_in)

    def _inject(self, component: str, model: nn.Module, computes_in: torch.dtype) -> None:
        train = self._train
        model.requires_grad_(False)
        names = target_names(component, model, train.targets, has_second="text_encoder_2" in self.models)
        if not names:
            raise usage_error(f"targets '{train.targets}': the {component} has no such layers; choose another set")
        settings = LoraConfig(
            r=train.rank, lora_alpha=train.rank if train.alpha is None else train.alpha, lora_dropout=train.dropout,
            target_modules=names, use_rslora=train.use_rslora, use_dora=train.use_dora, init_lora_weights=True,
        )  # fmt: skip
        inject_adapter_in_model(settings, model)
        for name, module in model.named_modules():
            if isinstance(module, PeftLayer):
                # Autocast rounds what the products read anyway; peft would first make a float32 copy of every input.
                module.cast_input_dtype_enabled = computes_in == torch.float32
                self._layers[component, name] = module
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every tensor that learns by name: ``unet.<module>.down`` (r, in...), ``.up`` (out, r...), ``.magnitude`` (DoRA)."""
        named: dict[str, nn.Parameter] = {}
        for (component, module), layer in self._layers.items():
            parts = {"down": layer.lora_A, "up": layer.lora_B, "magnitude": layer.lora_magnitude_vector}
            named |= {f"{component}.{module}.{part}": held[ADAPTER].weight for part, held in parts.items() if ADAPTER in held}
        return named

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: one a model, each with its own learning rate (``base_lr`` keeps the full one)."""
        rates = learning_rates(self._train)
        named = self.trainable()
        groups = {
            component: [parameter for name, parameter in named.items() if name.startswith(f"{component}.")]
            for component in self.models
        }
        return [
            {"params": parameters, "lr": rates[component], "base_lr": rates[component]}
            for component, parameters in groups.items()
        ]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every trainable tensor. Raises ValueError when names or shapes are not these."""
        mine = self.trainable()
        if {name: tuple(item.shape) for name, item in mine.items()} != {n: tuple(t.shape) for n, t in tensors.items()}:
            raise ValueError("the tensors are those of another adapter")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(tensors[name])

    def layers(self, tensors: Mapping[str, Tensor] | None = None) -> dict[Where, LoraLayer]:
        """The adapter as the rest of the program knows it, float32 on the CPU; of ``tensors`` in place of the live ones."""
        tensors = self.trainable() if tensors is None else tensors
        found: dict[Where, LoraLayer] = {}
        for (component, module), layer in self._layers.items():
            name = f"{component}.{module}"
            magnitude = tensors.get(f"{name}.magnitude")
            found[component, module] = LoraLayer(
                _copy(tensors[f"{name}.down"]), _copy(tensors[f"{name}.up"]),
                alpha=float(layer.lora_alpha[ADAPTER]), scale=float(layer.scaling[ADAPTER]),
                magnitude=None if magnitude is None else _copy(magnitude).flatten(),
            )  # fmt: skip
        return found

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """The models as they were before, module by module and with their own names, until the block ends."""
        for (component, name), layer in self._layers.items():
            self._put(component, name, layer.get_base_layer())
        try:
            yield
        finally:
            for (component, name), layer in self._layers.items():
                self._put(component, name, layer)

    def _put(self, component: str, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.models[component].get_submodule(parent), leaf, module)


class MovingAverage:
    """An exponential moving average of the trainable tensors: smoother than the last step, and often better."""

    def __init__(self, trainable: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in trainable.items()}

    @torch.no_grad()
    def update(self, trainable: Mapping[str, Tensor], step: int) -> None:
        """After optimizer step ``step`` (from 1). The decay warms up, so that the zeros of the start do not linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in trainable.items():
            self.tensors[name].lerp_(tensor.detach(), 1 - decay)

    @contextmanager
    def swapped_in(self, trainable: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """The average in place of the live tensors, until the block ends. Nothing is copied."""
        live = {name: parameter.data for name, parameter in trainable.items()}
        for name, parameter in trainable.items():
            parameter.data = self.tensors[name]
        try:
            yield
        finally:
            for name, parameter in trainable.items():
                parameter.data = live[name]


def target_names(component: str, model: nn.Module, targets: str, has_second: bool = False) -> list[str]:
    """The modules of a model that are adapted.

    SDXL reads its text encoders before their last layer. The second one's last layer still makes the pooled embedding; the
    first one's has no effect at all, so it gets no adapter, which would have no gradient.
    """
    pattern = re.compile(UNET_TARGETS[targets] if component == "unet" else TEXT_TARGETS[targets])
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and pattern.search(f".{name}")
    ]
    if component == "text_encoder" and has_second:
        numbers = [int(match[1]) for name in names if (match := _LAYER_NUMBER.search(name))]
        names = [name for name in names if f"encoder.layers.{max(numbers)}." not in name]
    return names


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()

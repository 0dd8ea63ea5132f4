"""Optimizers by name, the learning rate of a step, and an optimizer's state as tensors and plain numbers (no pickle)."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src.errors import usage_error
from src.train_config import TrainConfig

COSINE_CYCLES = 4  # of cosine_with_restarts
POLYNOMIAL_POWER = 2.0
OF_THE_RUN = ("lr", "base_lr", "weight_decay")  # in a group; what else is there is state, such as Prodigy's estimate


def build_optimizer(groups: Sequence[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``train.optimizer`` names. Raises UserError (usage) when its package is not installed."""
    options: dict[str, Any] = {"weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if train.optimizer == "adamw8bit":
        return _adamw8bit()(groups, **options)
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # With a learning rate of ours in place of its own schedule, as LoRA trainers use it.
        return Adafactor(groups, **options, scale_parameter=False, relative_step=False, warmup_init=False)
    from prodigyopt import Prodigy  # it finds the learning rate itself: the one given is a factor, best at 1

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
        return Prodigy(groups, **options, use_bias_correction=True, safeguard_warmup=True)


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise usage_error(
            "optimizer adamw8bit needs the package bitsandbytes; pip install bitsandbytes, or use --optimizer adamw"
        ) from None
    return AdamW8bit


def lr_factor(train: TrainConfig, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by at optimizer step ``step`` (from 0): 0 to 1.

    The same curves as ``diffusers.optimization.get_scheduler``; a function of the step alone, so a resumed run cannot drift.
    """
    warmup = train.lr_warmup_steps
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if train.lr_scheduler == "linear":
        return max(0.0, 1 - progress)
    if train.lr_scheduler == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if train.lr_scheduler == "cosine_with_restarts":
        return 0.0 if progress >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * (COSINE_CYCLES * progress % 1))))
    if train.lr_scheduler == "polynomial":
        return max(0.0, 1 - progress) ** POLYNOMIAL_POWER
    return 1.0


def pack_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], str]:
    """The optimizer's state as tensors by name (``"12.exp_avg"``), no copies, and JSON for the rest."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        flat: dict[str, Any] = {}
        for name, value in values.items():  # bitsandbytes packs some of its own into a dict, and takes them back without it
            flat |= value if isinstance(value, dict) else {name: value}
        for name, value in flat.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach()
            else:
                numbers.setdefault(str(index), {})[name] = value
    groups = [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]
    for number, group in enumerate(groups):
        for name, value in list(group.items()):
            if isinstance(value, Tensor):
                tensors[f"group{number}.{name}"] = value.detach()
                del group[name]
    return tensors, json.dumps({"kind": type(optimizer).__name__, "numbers": numbers, "groups": groups})


def unpack_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], text: str) -> None:
    """Put what `pack_state` gave back into an optimizer over the same parameters.

    Learning rates and weight decay stay those of ``optimizer``: a resume may have been told others. Raises ValueError,
    KeyError, IndexError for another optimizer, or other parameters.
    """
    held = json.loads(text)
    if held["kind"] != type(optimizer).__name__:
        raise ValueError(f"its optimizer was {held['kind']}, not {type(optimizer).__name__}")
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in held["numbers"].items()}
    groups = [dict(group) for group in held["groups"]]
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][key] = tensor
        else:
            state.setdefault(int(owner), {})[key] = tensor
    mine = optimizer.state_dict()["param_groups"]
    if len(mine) != len(groups):
        raise ValueError("the optimizer's state is that of other parameters")
    for group, own in zip(groups, mine):
        group |= {"params": own["params"]} | {key: own[key] for key in OF_THE_RUN if key in own}
        for key, value in own.items():  # JSON has lists where an optimizer has tuples (betas)
            if isinstance(value, tuple):
                group[key] = tuple(group[key])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        for key in values.keys() & {"exp_avg", "exp_avg_sq"}:  # the fused kernels do not look
            if values[key].shape != parameters[index].shape:
                raise ValueError(f"the optimizer's state has shape {tuple(values[key].shape)} for parameter {index}")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimizer.state.items():  # the fused kernels read all in the memory's order, such as channels last
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

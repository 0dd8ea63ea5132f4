"""The parts of a U-Net: how many numbers they have, and the memory that their training is predicted to need, traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from transformers.optimization import Adafactor

from src.finetune_config import PARTS, FinetuneConfig
from src.model_shapes import bundled_shapes
from src.training import speed
from src.training.learning_layers import exchange_learning_layers
from src.training.unet_network import UnetNetwork
from src.training_memory import TrainingNeed, predict, step_activation_bytes
from src.training_plan import choose, describe
from src.unet_parts import convolution_numbers, part_numbers
from tests.test_training_memory import FusedAttention, trace_step

GIB = 2**30


@pytest.fixture(autouse=True)
def meta_device(monkeypatch) -> None:
    """Neither fused attention nor autocast is known there."""
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda query, key, value, *_, **__: FusedAttention.apply(query, key, value)
    )
    monkeypatch.setattr(speed, "_is_autocast", lambda x: False)


def build(name: str, part: str) -> UnetNetwork:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(bundled_shapes(name).unet)
    return UnetNetwork(unet, part, 1e-5, torch.bfloat16)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "small-sd", "embedded"])
def test_the_numbers_of_a_part_are_those_of_the_network(name: str, part: str) -> None:
    numbers = sum(parameter.numel() for parameter in build(name, part).trainable().values())
    assert part_numbers(bundled_shapes(name), part) == numbers > 0


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "embedded"])
def test_the_kernels_of_a_part_are_those_of_the_network(name: str, part: str) -> None:
    kernels = {
        name: weight for name, weight in build(name, part).trainable().items()
        if weight.ndim == 4 and not name.removeprefix("unet.").startswith(("conv_in", "conv_out"))
    }  # fmt: skip
    sizes = [sum(weight.numel() for weight in kernels.values() if weight.shape[-1] == side) for side in (3, 1)]
    assert convolution_numbers(bundled_shapes(name), part) == tuple(sizes)


@pytest.mark.parametrize(("side", "numbers"), [(3, 4 * 6 * 6), (1, 4 * 6 * 2)])
def test_adafactor_keeps_of_a_kernel_what_is_predicted(side: int, numbers: int) -> None:
    kernel = torch.nn.Parameter(torch.randn(4, 6, side, side))
    optimizer = Adafactor([kernel], lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False)
    kernel.grad = torch.randn_like(kernel)
    optimizer.step()
    assert sum(value.numel() for value in optimizer.state[kernel].values() if torch.is_tensor(value) and value.ndim) == numbers


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "px"), [("sd15", 512)])
def test_a_traced_step_needs_what_is_predicted(name: str, px: int, part: str, checkpointing: bool) -> None:
    network = build(name, part)
    unet = network.models["unet"].train()
    exchange_learning_layers(unet, torch.bfloat16)
    speed.exchange_layers(unet, torch.device("meta"), torch.bfloat16)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    need = TrainingNeed.of(FinetuneConfig(part=part, gradient_checkpointing=checkpointing), px, "bf16")
    for parameter in network.trainable().values():  # gradients are counted with the weights, and no part of what is traced
        parameter.register_post_accumulate_grad_hook(lambda item: setattr(item, "grad", None))
    predicted = step_activation_bytes(bundled_shapes(name).unet, (px // 8, px // 8), need)
    traced = trace_step(unet, px // 8, 1)
    print(name, part, checkpointing, predicted / 1e6, traced / 1e6)
    assert predicted == pytest.approx(traced, rel=0.12)


def test_weights_that_learn_are_counted_with_all_that_belongs_to_them() -> None:
    """fp32 weight, gradient, two moments and average: 20 bytes each; and the frozen rest in bf16."""
    shapes = bundled_shapes("sd15")
    whole = shapes.parameters["unet"]
    for part in PARTS:
        numbers = part_numbers(shapes, part)
        need = TrainingNeed.of(FinetuneConfig(part=part, gradient_checkpointing=True), 512, "bf16")
        train = next(phase for phase in predict(shapes, need) if phase.name == "train")
        assert train.weights_bytes == 20 * numbers + 2 * (whole - numbers)
    without = TrainingNeed.of(FinetuneConfig(ema_decay=None, gradient_checkpointing=True), 512, "bf16")
    assert next(phase for phase in predict(shapes, without) if phase.name == "train").weights_bytes == 16 * whole


def test_what_does_not_fit_says_which_switch_would() -> None:
    plan = choose(bundled_shapes("sd15"), TrainingNeed.of(FinetuneConfig(), 512, "bf16"), 16 * GIB)
    assert not plan.fits
    assert plan.advice == ("--optimizer adafactor", "--ema_decay none", "--train mid")
    assert "quantize" not in describe(plan)
    small = choose(bundled_shapes("sd15"), TrainingNeed.of(FinetuneConfig(part="cross-attention"), 512, "bf16"), 6 * GIB)
    assert small.fits

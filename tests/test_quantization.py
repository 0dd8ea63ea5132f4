"""Quantised weights: few bytes, nearly the same output, and an adapter that learns through them. All on the CPU."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch import nn

from src.errors import ExitCode, UserError
from src.model_shapes import bundled_shapes
from src.quantization import check_card, quantize_unet
from src.train_config import TrainConfig
from src.training.network import LoraNetwork
from src.training.speed import prepare_for_speed
from src.unet_weights import NF4_BLOCK, unet_bytes
from tests.tiny import pipelines

ERRORS = {"int8": 0.02, "nf4": 0.12}


def inputs(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], dict]:
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64)
    added = {"text_embeds": torch.randn(2, 40, dtype=dtype), "time_ids": torch.zeros(2, 6, dtype=dtype)}
    return (latents.to(dtype), torch.tensor([5, 500]), text.to(dtype)), {"added_cond_kwargs": added, "return_dict": False}


def test_int8_is_moved_whole() -> None:
    """What lies beside the weight too, before the first call and after it: offloading must leave nothing on the card."""
    pytest.importorskip("bitsandbytes")
    for calls in (0, 1):
        layers = nn.Sequential(nn.Linear(64, 32))
        quantize_unet(layers.requires_grad_(False), "int8")
        layers.to("cpu")
        expected = layers(torch.ones(2, 64)) if calls else None
        (layer,) = layers
        layers._apply(lambda tensor: tensor.clone())  # as another device would have it
        (held,) = [holder.CB for holder in (layer.weight, layer.state) if holder.CB is not None]
        assert held.data_ptr() == layer.weight.data_ptr(), "one copy, where the weight is"
        assert expected is None or torch.equal(layers(torch.ones(2, 64)), expected)
        assert type(layer).__name__ == "Linear8bitLt"


def test_int8_keeps_nothing_for_the_backward_pass_and_has_its_gradient() -> None:
    """The layer is frozen: its input need not wait, and gradient checkpointing could not take it back. dx = dy W."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    quantize_unet(layers, "int8")
    layers.to("cpu").train()
    x = torch.randn(3, 5, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layers(x)
    assert kept == []
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, (torch.Tensor, tuple, list))]
    assert held == []
    gradient = torch.randn_like(y)
    y.backward(gradient)
    (layer,) = layers
    weight = bitsandbytes.functional.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
    assert torch.allclose(x.grad, gradient @ weight, atol=1e-5)


def test_int8_is_refused_on_a_card_that_is_too_old(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1060")
    for capability, kind, is_refused in (((6, 1), "int8", True), ((6, 1), "nf4", False), ((7, 5), "int8", False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        with pytest.raises(UserError, match="use --quantize nf4") if is_refused else contextlib.nullcontext():
            check_card(kind, torch.device("cuda:0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_output_stays_near_and_the_adapter_learns(kind, dtype) -> None:
    pytest.importorskip("bitsandbytes")
    unet = pipelines.sdxl().unet.to(dtype)
    tensors, named = inputs(dtype)
    with torch.no_grad():
        before = unet(*tensors, **named)[0].float()
        quantize_unet(unet.requires_grad_(False), kind)
        unet.to("cpu")
        after = unet(*tensors, **named)[0].float()
    assert 0 < (after - before).norm() < ERRORS[kind] * before.norm()
    network = LoraNetwork({"unet": unet}, TrainConfig(rank=4), computes_in=dtype)
    for name, parameter in network.trainable().items():
        if name.endswith(".up"):
            nn.init.normal_(parameter, std=0.02)
    gradients = {}
    for prepared in (False, True):
        if prepared:
            prepare_for_speed(unet)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            unet(*tensors, **named)[0].float().square().mean().backward()
        gradients[prepared] = torch.cat([parameter.grad.flatten() for parameter in network.trainable().values()])
        unet.zero_grad()
    assert all(parameter.dtype == torch.float32 for parameter in network.trainable().values())
    assert torch.isfinite(gradients[True]).all()
    assert gradients[True].count_nonzero() > 0.9 * gradients[True].numel()
    difference = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_matrices_shrink_and_the_rest_does_not(kind) -> None:
    pytest.importorskip("bitsandbytes")
    import diffusers

    shapes = bundled_shapes("embedded")
    unet = diffusers.UNet2DConditionModel.from_config(shapes.unet).to(torch.bfloat16).requires_grad_(False)
    quantize_unet(unet, kind)
    unet.to("cpu")
    held = 0
    for module in unet.modules():
        for parameter in module.parameters(recurse=False):
            held += parameter.numel() * parameter.element_size()
            if kind == "nf4" and hasattr(parameter, "quant_state"):
                held += parameter.quant_state.absmax.numel() * parameter.quant_state.absmax.element_size()
            if kind == "int8" and parameter.dtype == torch.int8:
                held += parameter.SCB.numel() * parameter.SCB.element_size()
    assert held == pytest.approx(unet_bytes(shapes, "bf16", kind), rel=0.001)
    kinds = {type(module).__name__ for module in unet.modules() if isinstance(module, nn.Linear)}
    assert kinds == {"Linear8bitLt" if kind == "int8" else "Linear4bit"}
    assert unet.conv_in.weight.dtype == torch.bfloat16


def test_nf4_leaves_rows_that_its_blocks_do_not_fit() -> None:
    pytest.importorskip("bitsandbytes")
    net = nn.Sequential(nn.Linear(NF4_BLOCK, 48), nn.Linear(48, 8))
    quantize_unet(net, "nf4")
    net.to("cpu")
    assert [type(layer).__name__ for layer in net] == ["Linear4bit", "Linear"]
    assert net(torch.ones(1, NF4_BLOCK)).shape == (1, 8)


def test_without_the_package_it_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes") as caught:
        quantize_unet(nn.Sequential(nn.Linear(2, 2)), "nf4")
    assert caught.value.exit_code == ExitCode.USAGE

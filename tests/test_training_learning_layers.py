"""Layers that learn against torch's own: outputs and gradients, in float32 and with rounded copies of float32 weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from src.errors import UserError
from src.training.learning_layers import exchange_learning_layers
from src.training.speed import prepare_for_speed
from src.training.unet_network import UnetNetwork
from tests.tiny import pipelines

LAYERS = {
    "linear": (nn.Linear(6, 5), (2, 7, 6)), "linear without bias": (nn.Linear(6, 5, bias=False), (4, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)), "stride": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 8, 8)), "layer norm": (nn.LayerNorm(6), (2, 7, 6)),
}  # fmt: skip


def gradients(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out.float() * weights).sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_torchs_own(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs, shape = LAYERS[name]
    theirs = copy.deepcopy(theirs)
    ours = nn.Sequential(copy.deepcopy(theirs))
    exchange_learning_layers(ours, dtype)
    assert type(ours[0]).__name__.startswith("Learning")
    x = torch.randn(shape).to(dtype)
    weights = torch.randn_like(theirs(x.float()))
    expected, found = gradients(theirs.to(dtype), x, weights), gradients(ours[0], x, weights)
    assert found[0].dtype == found[1].dtype == dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.float(), other.float(), **tolerance)
    assert all(parameter.grad.dtype == parameter.dtype == torch.float32 for parameter in ours.parameters())


@pytest.mark.parametrize("part", ["all", "cross-attention"])
def test_a_u_net_that_learns_has_torchs_gradients(part: str) -> None:
    """The whole of it, with frozen layers of ours beside, against autograd through diffusers' own."""
    theirs = pipelines.sd1().unet.train()
    ours = copy.deepcopy(theirs)
    network = UnetNetwork(ours, part, 1e-3, torch.float32)
    exchange_learning_layers(ours, torch.float32)
    prepare_for_speed(ours, torch.float32)
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 4, 8, 8, generator=source), torch.tensor([10, 700]), torch.randn(2, 77, 32, generator=source)
    for unet in (theirs, ours):
        unet(*inputs).sample.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in network.trainable().items():
        torch.testing.assert_close(parameter.grad, expected[name.removeprefix("unet.")].grad, atol=2e-4, rtol=2e-4)
    frozen = [parameter for parameter in ours.parameters() if not parameter.requires_grad]
    assert bool(frozen) == (part != "all")
    assert all(parameter.grad is None for parameter in frozen)


def test_what_is_frozen_is_rounded_and_what_learns_is_not() -> None:
    unet = pipelines.sd1().unet
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    network = UnetNetwork(unet, "mid", 1e-3, torch.bfloat16)
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name] if name.startswith("mid_block.") else before[name].bfloat16())
    with pytest.raises(ValueError, match="another part"):
        network.load({})


def test_a_u_net_without_the_part_is_refused() -> None:
    unet = pipelines.sd1().unet
    unet.mid_block = None
    with pytest.raises(UserError, match="--train mid: this U-Net has no such part"):
        UnetNetwork(unet, "mid", 1e-3, torch.float32)

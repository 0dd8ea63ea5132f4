"""The exchanged layers against the libraries' own: outputs and gradients are equal, names and weights untouched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.cpu_kernels import packs_in
from src.train_config import TrainConfig
from src.training import speed
from src.training.network import LoraNetwork
from tests.tiny import pipelines

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.04}  # relative, of all gradients as one vector


def adapted(family: str, dtype: torch.dtype, **settings: object) -> tuple[nn.Module, LoraNetwork]:
    unet = getattr(pipelines, family)().unet.to(dtype).train()
    network = LoraNetwork({"unet": unet}, TrainConfig(rank=4, **settings), computes_in=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.trainable().items():
        if name.endswith(".up"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return unet, network


def run(unet: nn.Module, network: LoraNetwork, dtype: torch.dtype, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The U-Net's output and the gradient of everything that learns, as accelerate would run it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    added = {"text_embeds": draw(2, 40), "time_ids": torch.full((2, 6), 64.0)} if unet.config.addition_embed_type else None
    text = draw(2, 77, unet.config.cross_attention_dim)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        output = unet(draw(2, 4, size, size), torch.tensor([5, 700]), text, added_cond_kwargs=added, return_dict=False)[0]
    F.mse_loss(output.float(), draw(2, 4, size, size)).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.trainable().values()])
    unet.zero_grad()
    return output.detach().float(), gradient


def difference(mine: torch.Tensor, reference: torch.Tensor) -> float:
    return float((mine - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("family", "settings"),
    [("sd1", {}), ("sdxl", {}), ("sd1", {"targets": "conv", "alpha": 2.0}), ("sdxl", {"targets": "kohya"}),
     ("sd1", {"use_dora": True}), ("sdxl", {"use_rslora": True})],
)  # fmt: skip
def test_outputs_and_gradients_equal_those_of_the_libraries(family, settings, dtype) -> None:
    unet, network = adapted(family, dtype, **settings)
    output, gradient = run(unet, network, dtype)
    speed.prepare_for_speed(unet)
    fast_output, fast_gradient = run(unet, network, dtype)
    assert difference(fast_output, output) < TOLERANCE[dtype]
    assert difference(fast_gradient, gradient) < TOLERANCE[dtype]


def test_half_precision_is_as_near_to_the_truth_as_autocast() -> None:
    truth_unet, truth_network = adapted("sd1", torch.float32)
    _, truth = run(truth_unet, truth_network, torch.float32)
    unet, network = adapted("sd1", torch.bfloat16)
    _, library = run(unet, network, torch.bfloat16)
    speed.prepare_for_speed(unet)
    _, mine = run(unet, network, torch.bfloat16)
    assert difference(mine, truth) < 1.3 * difference(library, truth)


def test_checkpointed_layers_give_the_same_gradient() -> None:
    unet, network = adapted("sdxl", torch.float32)
    speed.prepare_for_speed(unet)
    _, gradient = run(unet, network, torch.float32)
    unet.enable_gradient_checkpointing()
    _, checkpointed = run(unet, network, torch.float32)
    assert torch.equal(gradient, checkpointed)


def test_names_and_weights_stay_and_a_second_call_changes_nothing() -> None:
    unet, network = adapted("sd1", torch.float32, targets="conv")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    kinds = [isinstance(module, (nn.Linear, nn.Conv2d)) for module in unet.modules()]
    speed.prepare_for_speed(unet)
    once = run(unet, network, torch.float32)
    speed.prepare_for_speed(unet)
    twice = run(unet, network, torch.float32)
    after = unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert kinds == [isinstance(module, (nn.Linear, nn.Conv2d)) for module in unet.modules()]
    assert torch.equal(once[1], twice[1])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_packed_and_ordinary_convolutions_agree_at_every_size(dtype, monkeypatch) -> None:
    gradients = {}
    for limit in (0, speed.PACKED_BYTES):
        monkeypatch.setattr(speed, "PACKED_BYTES", limit)
        unet, network = adapted("sd1", dtype)
        speed.prepare_for_speed(unet)
        packed = [module for module in unet.modules() if isinstance(module, speed.FrozenConv2d) and module.packed is not None]
        assert bool(packed) == bool(limit)
        gradients[limit] = [run(unet, network, dtype, size)[1] for size in (8, 16, 4)]
    assert any(set(module.packed) == {"forward", "backward"} for module in packed) == packs_in(dtype)
    for ordinary, mine in zip(*gradients.values()):
        assert difference(mine, ordinary) < TOLERANCE[dtype]


def test_a_frozen_convolution_keeps_no_copy_of_its_input() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    kept = {}
    for kind in (nn.Conv2d, speed.FrozenConv2d):
        layer.__class__ = kind
        sizes: list[int] = []
        x = torch.randn(1, 8, 32, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            layer(x).sum().backward()
        kept[kind] = sum(sizes), x.grad
    assert kept[nn.Conv2d][0] >= x.numel()
    assert kept[speed.FrozenConv2d][0] < x.numel() / 4
    torch.testing.assert_close(
        kept[speed.FrozenConv2d][1], torch.autograd.grad(F.conv2d(x, layer.weight, padding=1).sum(), x)[0]
    )


def test_timesteps_are_not_rounded_and_weights_of_full_precision_obey_autocast() -> None:
    unet, _ = adapted("sd1", torch.bfloat16)
    speed.prepare_for_speed(unet)
    seen = {}
    unet.time_proj.register_forward_hook(lambda module, inputs, output: seen.update(timestep=inputs[0]))
    text = torch.randn(1, 77, 32)
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), torch.tensor([999]), text)
    assert seen["timestep"].tolist() == [999]
    sdxl, _ = adapted("sdxl", torch.bfloat16)
    speed.prepare_for_speed(sdxl)
    sdxl.add_time_proj.register_forward_hook(lambda module, inputs, output: seen.update(sizes=inputs[0]))
    added = {"text_embeds": torch.randn(1, 40), "time_ids": torch.tensor([[1333.0, 2001.0, 3.0, 301.0, 1024.0, 1024.0]])}
    with torch.no_grad():
        sdxl(torch.randn(1, 4, 8, 8), torch.tensor([999]), torch.randn(1, 77, 64), added_cond_kwargs=added)
    assert seen["sizes"].tolist() == added["time_ids"].flatten().tolist()
    full, _ = adapted("sd1", torch.float32)
    speed.prepare_for_speed(full)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert full(torch.randn(1, 4, 8, 8), torch.tensor([999]), text, return_dict=False)[0].dtype == torch.bfloat16

"""The adapter in the making: what is adapted, the identity when new, out and in again, taken off and put back."""

from __future__ import annotations

import math

import pytest
import torch

from src.train_config import TrainConfig
from src.training.network import LoraNetwork, MovingAverage, target_names
from tests.tiny import pipelines


def inputs(width: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=source), torch.tensor([3, 700]), torch.randn(2, 77, width, generator=source)


def network_of(unet: torch.nn.Module, **settings: object) -> LoraNetwork:
    return LoraNetwork({"unet": unet}, TrainConfig(**settings), computes_in=torch.float32)


def stir(network: LoraNetwork) -> None:
    """Give every tensor values as after some training."""
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


@pytest.mark.parametrize("targets", ["attention", "kohya", "conv"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_is_the_identity(targets: str, dora: bool) -> None:
    unet = pipelines.sd1().unet
    before = unet(*inputs()).sample
    network = network_of(unet, targets=targets, use_dora=dora)
    torch.testing.assert_close(unet(*inputs()).sample, before, atol=1e-5 if dora else 0, rtol=0)
    stir(network)
    assert (unet(*inputs()).sample - before).abs().max() > 1e-3
    with network.taken_off():
        assert torch.equal(unet(*inputs()).sample, before)
    assert not torch.equal(unet(*inputs()).sample, before)


def test_module_counts_are_those_published_for_sd15_and_sdxl() -> None:
    """shared facts: 128/192/278 modules for SD 1.5, 560/722/788 for SDXL (meta device, real configurations)."""
    from diffusers import UNet2DConditionModel

    for folder, counts in {"sd15": (128, 192, 278), "sdxl": (560, 722, 788)}.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(f"configs/architectures/{folder}/unet"))
        assert tuple(len(target_names("unet", unet, name)) for name in ("attention", "kohya", "conv")) == counts


def test_sdxl_s_first_encoder_has_no_adapter_where_it_would_have_no_gradient() -> None:
    pipeline = pipelines.sdxl()
    models = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    network = LoraNetwork(models, TrainConfig(), computes_in=torch.float32)
    names = network.trainable()
    assert any("text_encoder.encoder.layers.1." in name for name in names)
    assert not any("text_encoder.encoder.layers.2." in name for name in names)
    assert any(".layers.2." in name for name in names if name.startswith("text_encoder_2."))


def test_only_the_adapter_learns_in_float32() -> None:
    unet = pipelines.sd1().unet.to(torch.bfloat16)
    network = network_of(unet)
    learning = {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}
    assert learning == {id(parameter) for parameter in network.trainable().values()}
    assert {parameter.dtype for parameter in network.trainable().values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("settings", "scale"), [({}, 1), ({"alpha": 8.0}, 2), ({"alpha": 8.0, "use_rslora": True}, 4)])
def test_layers_are_what_the_model_computes(settings: dict, scale: float) -> None:
    """W x + scale * up(down(x)), by hand, for one Linear."""
    unet = pipelines.sd1().unet
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = unet.get_submodule(name).weight.detach().clone()
    network = network_of(unet, rank=4, **settings)
    stir(network)
    layer = network.layers()["unet", name]
    assert layer.scale == pytest.approx(scale)
    x = torch.randn(3, 32)
    torch.testing.assert_close(unet.get_submodule(name)(x), x @ (weight + layer.scale * layer.up @ layer.down).T)


def test_first_weights_follow_the_seed_and_leave_the_global_source_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = network_of(pipelines.sd1().unet, seed=1).trainable()
    torch.manual_seed(5)
    other = network_of(pipelines.sd1().unet, seed=1).trainable()
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(5)
    pipeline = pipelines.sd1()
    torch.manual_seed(5)
    different = network_of(pipeline.unet, seed=2).trainable()
    assert torch.equal(torch.rand(1), expected)
    assert not all(torch.equal(one[name], different[name]) for name in one)


def test_tensors_go_out_and_in_again() -> None:
    network = network_of(pipelines.sd1().unet)
    stir(network)
    held = {name: tensor.detach().clone() for name, tensor in network.trainable().items()}
    other = network_of(pipelines.sd1().unet, seed=9)
    other.load(held)
    assert all(torch.equal(tensor, held[name]) for name, tensor in other.trainable().items())
    with pytest.raises(ValueError, match="another adapter"):
        network_of(pipelines.sd1().unet, rank=8).load(held)


def test_the_average_is_the_sum_by_hand_and_swaps_in_and_out() -> None:
    parameter = {"x": torch.nn.Parameter(torch.zeros(3))}
    average = MovingAverage(parameter, decay=0.9)
    expected = torch.zeros(3)
    for step in range(1, 200):
        with torch.no_grad():
            parameter["x"].fill_(float(step))
        average.update(parameter, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.tensors["x"], expected)
    with average.swapped_in(parameter):
        torch.testing.assert_close(parameter["x"].detach(), expected)
    assert parameter["x"].tolist() == [199.0] * 3
    assert math.isclose(float(expected[0]), 199 - 9, rel_tol=0.01)

"""Packed layers against the library's own: outputs equal at any size and with adapters, weights still to be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn

from src import cpu_layers
from src.config import OptimizationConfig
from src.cpu_kernels import CpuAttention
from src.cpu_layers import FusedGeglu, GatedLinear, PackedConv2d, PackedLinear, prepare_for_drawing
from src.lora.reading import read_adapter
from src.lora.stack import AdapterStack
from src.memory_prediction import CPU
from src.optimizations import apply
from tests.tiny import pipelines
from tests.tiny.adapters import (
    assert_identical,
    assert_same,
    components,
    fresh,
    merged,
    outputs,
    random_layers,
    source,
    write_kohya,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}  # relative, of the whole output

needs_packing = pytest.mark.skipif(not cpu_layers.CAN_PACK, reason="packs on x86 with oneDNN")


def draw(unet: nn.Module, size: int = 8, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = unet.dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    is_sdxl = unet.config.addition_embed_type == "text_time"
    added = {"text_embeds": noise(batch, 40), "time_ids": torch.full((batch, 6), 64.0)} if is_sdxl else None
    text = noise(batch, 77, unet.config.cross_attention_dim)
    with torch.no_grad():
        return unet(noise(batch, 4, size, size), 500, text, added_cond_kwargs=added, return_dict=False)[0].float()


def assert_close(mine: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    assert mine.shape == reference.shape
    assert (mine - reference).norm() <= TOLERANCE[dtype] * reference.norm()


def tiny_unet(family: str = "sd1", dtype: torch.dtype = torch.float32) -> nn.Module:
    return getattr(pipelines, family)().unet.to(dtype).eval()


@needs_packing
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_unet_draws_the_same_at_any_size(family: str, dtype: torch.dtype) -> None:
    unet = tiny_unet(family, dtype)
    sizes = [(8, 2), (16, 1), (8, 2), (8, 5)]  # packed for one size, anew for another, and back
    expected = [draw(unet, *size) for size in sizes]
    prepare_for_drawing(unet)
    kinds = {type(module) for module in unet.modules()}
    assert {PackedLinear, PackedConv2d, FusedGeglu, GatedLinear} <= kinds
    assert not {nn.Linear, nn.Conv2d, GEGLU} & kinds
    for size, reference in zip(sizes, expected):
        assert_close(draw(unet, *size), reference, dtype)


@needs_packing
def test_weights_are_held_once_and_can_be_read_as_they_were() -> None:
    unet = tiny_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    prepare_for_drawing(unet)
    draw(unet)
    packed = {name for name, module in unet.named_modules() if isinstance(module, cpu_layers._Packed)}
    assert {f"{name}.weight" for name in packed} == before.keys() - dict(unet.named_parameters()).keys()
    for name in packed:
        assert torch.equal(unet.get_submodule(name).weight, before[f"{name}.weight"]), name
    saved = unet.state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert unet.dtype == torch.float32


@needs_packing
def test_a_packed_unet_goes_to_another_precision_and_draws(tmp_path: Path) -> None:
    unet, expected = tiny_unet(), tiny_unet().to(torch.bfloat16)
    prepare_for_drawing(unet)
    prepare_for_drawing(expected)
    draw(unet)
    unet.to(torch.bfloat16)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert torch.equal(draw(unet), draw(expected))


@needs_packing
@pytest.mark.parametrize("dora", [None, 0, 1])
@pytest.mark.parametrize("is_packed_before", [False, True])
def test_adapters_do_the_same_on_packed_layers(dora: int | None, is_packed_before: bool, tmp_path: Path) -> None:
    """On every kind of layer; a DoRA measures the model's own weights."""
    layers = random_layers(source("SD1"), only=("unet",), targets=r".*", dora=dora)
    adapter = read_adapter(write_kohya(tmp_path / "a.safetensors", layers))
    model = fresh()
    prepare_for_drawing(model.unet)
    if is_packed_before:
        bare = outputs(components(model))
    stack = AdapterStack(model, "SD1")
    stack.set([(adapter, 1.0)])
    assert_same(outputs(components(model)), outputs(merged(source("SD1"), (layers, 1.0))), "SD1")
    stack.clear()
    if is_packed_before:
        assert_identical(outputs(components(model)), bare)


@needs_packing
def test_gradients_and_other_precisions_go_the_librarys_way() -> None:
    unet = tiny_unet()
    linear = next(module for module in unet.modules() if type(module) is nn.Linear)
    x = torch.randn(3, linear.in_features, requires_grad=True)
    expected = torch.autograd.grad(linear(x).sum(), x)[0]
    prepare_for_drawing(unet)
    draw(unet)
    assert torch.equal(torch.autograd.grad(linear(x).sum(), x)[0], expected)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.detach().to(torch.bfloat16))


@needs_packing
@pytest.mark.parametrize(
    ("switches", "attention", "packs"),
    [({}, True, True), ({"enable_attention_slicing": True}, False, True), ({"enable_torch_compile": True}, False, False)],
)
def test_a_plan_for_the_cpu_packs_unless_a_switch_stands_against_it(switches, attention, packs, monkeypatch) -> None:
    pipeline = pipelines.sd1()
    monkeypatch.setattr(type(pipeline.unet), "compile_repeated_blocks", lambda unet: None)
    apply(pipeline, CPU, OptimizationConfig(**switches), torch.device("cpu"))
    assert any(isinstance(module, PackedLinear) for module in pipeline.unet.modules()) == packs
    assert any(isinstance(item, CpuAttention) for item in pipeline.unet.attn_processors.values()) == attention

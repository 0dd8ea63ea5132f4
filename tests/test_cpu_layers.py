"""Packed layers against the library's own: outputs equal at any size and with adapters, weights still to be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from src import cpu_layers
from src.config import OptimizationConfig
from src.cpu_kernels import CpuAttention, packs_in
from src.cpu_layers import (
    FusedGeglu,
    FusedResnetBlock2D,
    GatedLinear,
    PackedConv2d,
    PackedLinear,
    prepare_decoding,
    prepare_for_drawing,
)
from src.lora.reading import read_adapter
from src.lora.stack import AdapterStack
from src.memory_prediction import CPU
from src.optimizations import apply, set_vae_tiling
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
    assert ({PackedLinear, PackedConv2d, FusedGeglu, GatedLinear} <= kinds) == packs_in(dtype)
    assert bool({nn.Linear, nn.Conv2d, GEGLU} & kinds) != packs_in(dtype)
    for size, reference in zip(sizes, expected):
        assert_close(draw(unet, *size), reference, dtype)


@needs_packing
def test_a_small_unet_keeps_the_orders_of_two_sizes(monkeypatch) -> None:
    """Guidance that ends half-way halves the batch in every picture: its weights are not put in order anew each time."""
    plain, small, large = (tiny_unet() for _ in range(3))
    prepare_for_drawing(small)
    whole = sum(weight.nbytes for weight in plain.parameters())
    monkeypatch.setattr(cpu_layers, "SMALL_UNET_BYTES", whole - 1)
    prepare_for_drawing(large)
    draw(large)
    prepare_for_drawing(large)  # what is packed by now counts, too
    packed: list[nn.Module] = []
    for kind in (PackedLinear, GatedLinear, PackedConv2d):
        pack = kind._pack
        monkeypatch.setattr(kind, "_pack", lambda layer, weight, x, pack=pack: packed.append(layer) or pack(layer, weight, x))
    counts = {}
    for name, unet in (("small", small), ("large", large)):
        counts[name] = []
        for batch in (3, 1, 3, 1, 4, 1):
            packed.clear()
            assert_close(draw(unet, batch=batch), draw(plain, batch=batch), torch.float32)
            counts[name].append(len(packed))
    assert all(counts["large"])
    layers = counts["small"][0]
    assert counts["small"] == [layers, counts["small"][1], 0, 0, counts["small"][1], 0]
    assert 0 < counts["small"][1] <= layers
    small.to(torch.bfloat16).to(torch.float32)  # what was packed is forgotten with the weights that it was
    assert_close(draw(small, batch=1), draw(plain.to(torch.bfloat16).to(torch.float32), batch=1), torch.float32)


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
    assert_close(draw(unet), draw(expected), torch.bfloat16)
    assert torch.equal(draw(unet), draw(expected)) or not packs_in(torch.bfloat16)


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


def a_vae(dtype: torch.dtype) -> AutoencoderKL:
    """Wide enough for the group norm in C++."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    return vae.to(dtype).eval()


@needs_packing
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("mode", ["whole", "tiled", "sliced"])
def test_a_vae_encodes_and_decodes_the_same_and_leaves_its_inputs_alone(mode: str, dtype: torch.dtype) -> None:
    plain, prepared = a_vae(dtype), a_vae(dtype)
    prepare_decoding(prepared)
    assert any(isinstance(module, FusedResnetBlock2D) for module in prepared.decoder.up_blocks.modules()) == packs_in(dtype)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    for vae in (plain, prepared):
        if mode == "tiled":
            set_vae_tiling(vae, True)
            vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
        elif mode == "sliced":
            vae.enable_slicing()
    kept = pixels.clone(), latents.clone()
    with torch.no_grad():
        assert_close(prepared.decode(latents).sample.float(), plain.decode(latents).sample.float(), dtype)
        assert_close(prepared.encode(pixels).latent_dist.mean.float(), plain.encode(pixels).latent_dist.mean.float(), dtype)
    assert torch.equal(pixels, kept[0])
    assert torch.equal(latents, kept[1])


@needs_packing
@pytest.mark.parametrize("kind", ["default", "scale_shift"])
def test_gradients_go_through_a_prepared_block_whoever_needs_them(kind: str) -> None:
    """Also where only the time needs one: SDXL's pooled text comes in there."""
    options = {"in_channels": 16, "out_channels": 32, "temb_channels": 24, "groups": 4, "time_embedding_norm": kind}
    block, plain = (ResnetBlock2D(**options).eval() for _ in range(2))
    plain.load_state_dict(block.state_dict())
    holder = nn.Module()
    holder.block, holder.dtype = block.requires_grad_(False), torch.float32
    cpu_layers._exchange_blocks(holder)
    assert isinstance(block, FusedResnetBlock2D)
    x, time = noise(2, 16, 8, 8), noise(2, 24)
    with torch.no_grad():
        assert torch.allclose(block(x, time), plain(x, time), atol=1e-5)
    for of_x, of_time in ((False, True), (True, False), (True, True)):
        grads = []
        for one in (block, plain.requires_grad_(False)):
            inputs = x.clone().requires_grad_(of_x), time.clone().requires_grad_(of_time)
            one(*inputs).square().sum().backward()
            grads.append([part.grad for part in inputs if part.requires_grad])
        assert all(torch.allclose(mine, torchs, rtol=1e-3, atol=1e-3) for mine, torchs in zip(*grads))


@needs_packing
def test_hooks_in_a_fused_block_are_called() -> None:
    block = ResnetBlock2D(in_channels=16, out_channels=16, temb_channels=None, groups=4).eval()
    cpu_layers._exchange_blocks(nn.ModuleList([block]))
    called = []
    for name in ("norm1", "conv1", "norm2", "conv2"):
        module = getattr(block, name)
        module.register_forward_hook(lambda *_, name=name: called.append(f"{name} after"))
        module.register_forward_pre_hook(lambda *_, name=name: called.append(f"{name} before"))
    with torch.no_grad():
        block(noise(1, 16, 4, 4), None)
    assert sorted(called) == sorted(
        f"{name} {when}" for name in ("norm1", "conv1", "norm2", "conv2") for when in ("before", "after")
    )


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

"""Adapters exchanged in a running generator: two hundred times, with nothing growing and, compiled, nothing compiled again."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from src.config import AppConfig
from src.generator import TextToImageGenerator
from src.lora.reading import Adapter, read_adapter
from src.lora.stack import AdapterStack
from src.request import LoraChoice
from tests.tiny import adapters, pipelines
from tests.tiny.adapters import assert_identical, components, fresh, random_layers, source

SWAPS = 200


def adapter_file(folder: Path, seed: int, rank: int = 4, **more: object) -> Path:
    layers = random_layers(source("SD1"), seed=seed, rank=rank, **more)
    return adapters.write_kohya(folder / f"{seed}.safetensors", layers)


def test_an_adapter_that_learnt_down_to_pure_noise_is_drawn_from_there(tmp_path) -> None:
    config = AppConfig()
    config.model.model_id, config.model.precision, config.model.device = str(tmp_path / "model"), "fp32", "cpu"
    config.paths.cache = str(tmp_path / "cache")
    pipeline = pipelines.sd1()
    pipeline.scheduler = pipelines.scheduler("v_prediction")
    pipelines.save(pipeline, tmp_path / "model")
    generator = TextToImageGenerator(config)
    layers = random_layers(source("SD1"), seed=1)
    last = {}
    for name, metadata in (("plain", None), ("zero", {"ss_zero_terminal_snr": "True"}), ("none", None)):
        file = adapters.write_kohya(tmp_path / f"{name}.safetensors", layers, metadata=metadata)
        generator.set_loras([LoraChoice(file, 1.0)] if name != "none" else [])
        list(generator.generate("a star", seed=1, num_inference_steps=1))
        last[name] = float(generator.model.pipeline.scheduler.alphas_cumprod[-1])
    expected = float(pipelines.scheduler().alphas_cumprod[-1])  # 0.0047
    assert last == {"plain": expected, "zero": pytest.approx(0, abs=1e-6), "none": expected}


# -- growth


PLAIN = (torch.Tensor, torch.nn.Parameter)  # what other tests have traced has no memory of its own


def living_tensors() -> tuple[int, int]:
    """How many tensors there are, and the bytes that they hold."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]  # isinstance would wake lazy modules
    packed = [tensor for tensor in tensors if tensor.is_mkldnn]  # has no storage that can be asked
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for tensor in tensors
        if not tensor.is_mkldnn and type(tensor) in PLAIN
    }
    return len(tensors), sum(item.nbytes() for item in storages.values()) + sum(item.numel() for item in packed)


def entries(models: dict[str, nn.Module]) -> int:
    """Everything that hangs on the modules: hooks, buffers, attributes."""
    modules = [module for model in models.values() for module in model.modules()]
    inside = (value for module in modules for value in vars(module).values())
    return sum(len(vars(module)) for module in modules) + sum(len(value) for value in inside if isinstance(value, dict))


def test_200_swaps_in_a_generator_leave_nothing_behind(tmp_path) -> None:
    config = AppConfig()
    config.model.model_id, config.model.precision, config.model.device = str(tmp_path / "model"), "fp32", "cpu"
    config.paths.cache = str(tmp_path / "cache")
    pipelines.save(pipelines.sd1(), tmp_path / "model")
    generator = TextToImageGenerator(config)
    choices = [LoraChoice(adapter_file(tmp_path, 1), 0.8), LoraChoice(adapter_file(tmp_path, 2, rank=8), 1.0)]
    settings = {"seed": 1, "num_inference_steps": 1}

    def swap_and_draw(times: int) -> list[int]:
        pictures = []
        for turn in range(times):
            generator.set_loras([choices[turn % 2]])
            if turn % 40 < 2:  # both are drawn with now and then
                pictures += generator.generate("a star", **settings)
        return [hash(picture.tobytes()) for picture in pictures]

    (base,) = generator.generate("a star", **settings)
    models = components(generator.model.pipeline)
    weights = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}
    first = swap_and_draw(2)
    tracemalloc.start()
    swap_and_draw(2)
    before, known = living_tensors(), entries(models)
    python_bytes = tracemalloc.get_traced_memory()[0]
    again = swap_and_draw(SWAPS)
    swap_and_draw(2)  # as before: the last one has been drawn with
    after = living_tensors()
    grown = tracemalloc.get_traced_memory()[0] - python_bytes
    tracemalloc.stop()
    assert after == before
    assert entries(models) == known
    assert grown < SWAPS * 500, "bytes: a kilobyte a swap would be a leak"
    assert again == first * (SWAPS // 40)
    assert len(set(first)) == 2

    generator.unload_lora_weights()
    for name, model in models.items():
        assert_identical(model.state_dict(), weights[name])
    (picture,) = generator.generate("a star", **settings)
    assert picture.tobytes() == base.tobytes()


# -- compiled


@pytest.fixture
def compiled():
    """A pipeline of whose U-Net one block is compiled, as `optimizations.apply` does with all, by the quick backend."""
    torch.compiler.reset()
    counters.clear()
    pipe = fresh()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager")
    yield pipe, AdapterStack(pipe, "SD1")
    torch.compiler.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def output(pipe: object) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=dice)
    context = torch.randn(1, 7, pipe.unet.config.cross_attention_dim, generator=dice)
    return pipe.unet(latents, 1, encoder_hidden_states=context).sample


def expected(weighted: list[tuple[Adapter, float]]) -> Tensor:
    """The same without a compiler."""
    pipe = fresh()
    AdapterStack(pipe, "SD1").set(weighted)
    return output(pipe)


def test_200_swaps_in_a_compiled_unet_compile_nothing_again(tmp_path, compiled) -> None:
    """Smaller ranks, other weights, fewer layers, none at all: once the larger one is compiled, all others fit."""
    pipe, stack = compiled
    large, small = (read_adapter(adapter_file(tmp_path, seed, rank)) for seed, rank in ((1, 4), (2, 2)))
    part = read_adapter(adapter_file(tmp_path, 3, targets="mid_block.*to_q"))
    states = [[(large, 0.8)], [(small, 1.0)], [], [(part, 0.5)], [(large, -0.3)]]
    wanted = [expected(state) for state in states]
    output(pipe)
    stack.set(states[0])
    output(pipe)
    before, resets = compilations(), []
    real, torch.compiler.reset = torch.compiler.reset, lambda: resets.append(1)
    try:
        for turn in range(SWAPS):
            stack.set(states[turn % len(states)])
            if turn < len(states) or turn % 39 == 0:
                torch.testing.assert_close(output(pipe), wanted[turn % len(states)], atol=2e-6, rtol=2e-6)
    finally:
        torch.compiler.reset = real
    assert compilations() == before
    assert resets == []


def test_a_compiled_unet_is_compiled_anew_for_new_layers_and_once_for_a_larger_rank(tmp_path, compiled) -> None:
    pipe, stack = compiled
    output(pipe)
    attention = read_adapter(adapter_file(tmp_path, 1, targets=r"to_q$|to_k$"))
    more = read_adapter(adapter_file(tmp_path, 2, targets=r"to_q$|to_v$"))
    larger = read_adapter(adapter_file(tmp_path, 3, rank=6, targets=r"to_q$|to_k$|to_v$"))
    made = []
    for adapter in (attention, more, larger, attention, more, larger, attention):
        before = compilations()
        stack.set([(adapter, 1.0)])
        torch.testing.assert_close(output(pipe), expected([(adapter, 1.0)]), atol=2e-6, rtol=2e-6)
        made.append(compilations() - before)
    assert made == [1, 1, 1, 0, 0, 0, 0]

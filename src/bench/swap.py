"""How long it takes to change adapters in a running model, on a U-Net of SD v1.5's real shape with random weights."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from safetensors.torch import save

from src import files
from src.bench.report import Row
from src.lora.reading import Adapter, read_adapter
from src.lora.stack import AdapterStack
from src.model_files import ARCHITECTURES

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # what diffusers' and most trainers' adapters touch: 128 layers in SD v1.5
RANK = 4
SWAPS = 200


def run(folder: Path) -> Iterator[str | Row]:
    """Write two rank-4 adapters into ``folder``, swap them 200 times, and give the lines of the report."""
    unet = _random_unet()
    paths = [_write_adapter(unet, folder / f"adapter_{seed}.safetensors", seed) for seed in (1, 2)]
    adapters = [read_adapter(path) for path in paths]
    stack = AdapterStack(SimpleNamespace(unet=unet), "SD1")
    rows = {"read a file and check it": [_time_ms(read_adapter, path) for path in paths * 5]}
    _swap(stack, adapters, 2, unet)
    before = _living()
    rows[f"swap, {SWAPS} times"] = _swap(stack, adapters, SWAPS, unet)
    after = _living()
    rows["take off"] = [_time_ms(stack.clear)]
    hooks = sum(len(module._forward_hooks) for module in unet.modules())
    unet.compile_repeated_blocks()
    _swap(stack, adapters, 1)  # new hooks: compiled code is forgotten once
    rows["swap under torch.compile, without the next step"] = _swap(stack, adapters, SWAPS)
    size = f"{paths[0].stat().st_size / 1e6:.1f} MB"
    yield f"SD v1.5's U-Net; adapters of {len(adapters[0].layers)} layers, rank {RANK}, {size}"
    for name, times in rows.items():
        yield {"": name, "ms": statistics.median(times), "at most": max(times)}
    grown = f"grown by {SWAPS} swaps: {after[0] - before[0]} tensors, {(after[1] - before[1]) / 1e6:.1f} MB"
    yield f"{grown}; hooks left behind: {hooks}"


def _swap(stack: AdapterStack, adapters: Sequence[Adapter], times: int, unet: torch.nn.Module | None = None) -> list[float]:
    """Milliseconds of each; with the ``unet``, all that the next step would have to do before it multiplies is in them."""

    def swap(adapter: Adapter) -> None:
        stack.set([(adapter, 0.8)])
        for module in unet.modules() if unet is not None else ():
            for hook in module._forward_hooks.values():
                hook.make_ready(torch.device("cpu"), torch.bfloat16)

    return [_time_ms(swap, adapters[index % 2]) for index in range(times)]


def _living() -> tuple[int, int]:
    """The tensors that there are, and the bytes of their storages."""
    gc.collect()
    storages = [item.untyped_storage() for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return len(storages), sum({item.data_ptr(): item.nbytes() for item in storages}.values())


def _random_unet() -> torch.nn.Module:
    config = diffusers.UNet2DConditionModel.load_config(ARCHITECTURES / "sd15" / "unet")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config).to(torch.bfloat16)
    return unet.to_empty(device="cpu").eval()


def _write_adapter(unet: torch.nn.Module, path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(TARGETS):
            tensors[f"unet.{name}.lora.down.weight"] = torch.randn(RANK, module.in_features, generator=generator) / RANK
            tensors[f"unet.{name}.lora.up.weight"] = torch.randn(module.out_features, RANK, generator=generator) / RANK
    return files.publish_bytes(path, save(tensors))


def _time_ms(action: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    action(*arguments)
    return (time.perf_counter() - started) * 1e3

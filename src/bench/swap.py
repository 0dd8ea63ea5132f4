"""How long it takes to change adapters in a running model, on a U-Net of SD v1.5's real shape with random weights."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch

from src import files
from src.base_models import ARCHITECTURES
from src.lora import AdapterStack, read_adapter
from src.lora_files import Adapter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # what diffusers' and most trainers' adapters touch: 128 layers in SD v1.5
RANK = 4
SWAPS = 200


def run(folder: Path) -> list[str]:
    """Write two rank-4 adapters into ``folder``, swap them 200 times, and return the lines of the report."""
    unet = _random_unet()
    paths = [_write_adapter(unet, folder / f"adapter_{seed}.safetensors", seed) for seed in (1, 2)]
    read_ms, adapters = zip(*(_timed(lambda path=path: read_adapter(path)) for path in paths))
    stack = AdapterStack(SimpleNamespace(unet=unet), "SD1")
    swap_ms = [_timed(lambda index=index: stack.set([(adapters[index % 2], 0.8)]))[0] for index in range(SWAPS)]
    clear_ms, _ = _timed(stack.clear)
    hooks = sum(len(module._forward_hooks) for module in unet.modules())
    size_mb = paths[0].stat().st_size / 1e6
    return [
        f"adapter: {len(adapters[0].layers)} layers, rank {RANK}, {size_mb:.1f} MB",
        f"read from disk, checked and hashed by tensor   {statistics.median(read_ms):7.1f} ms",
        f"swap, median of {SWAPS}                            {statistics.median(swap_ms):7.1f} ms (90th percentile {_percentile(swap_ms, 0.9):.1f})",
        f"take off                                       {clear_ms:7.1f} ms; hooks left: {hooks}",
    ]


def _random_unet() -> torch.nn.Module:
    config = diffusers.UNet2DConditionModel.load_config(ARCHITECTURES / "sd15" / "unet")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config).to(torch.bfloat16)
    return unet.to_empty(device="cpu").eval()


def _write_adapter(unet: torch.nn.Module, path: Path, seed: int) -> Path:
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(TARGETS):
            tensors[f"unet.{name}.lora.down.weight"] = torch.randn(RANK, module.in_features, generator=generator) / RANK
            tensors[f"unet.{name}.lora.up.weight"] = torch.randn(module.out_features, RANK, generator=generator) / RANK
    return files.publish_bytes(path, save(tensors))


def _timed(call) -> tuple[float, Adapter | list | None]:
    started = time.perf_counter()
    result = call()
    return (time.perf_counter() - started) * 1e3, result


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]

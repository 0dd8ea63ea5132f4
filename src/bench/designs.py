"""How many samples a second each design of a small U-Net learns on this machine: what the hours of a recipe buy.

A sample is one forward and one backward pass with its share of the optimizer's step. Wide and few layers keep the matrix units
at work, narrow and many do not; which of two learns more from a sample is another question, which a training has to answer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from src.bench.report import Row
from src.diffusion import NoiseSchedule
from src.scratch import unet
from src.scratch.learning import device_of, precision_of
from src.scratch.muon import Muon, parameter_groups
from src.scratch.settings import MachineSettings, UnetSettings
from src.training.speed import keep_freed_memory

TEXT_WIDTH, LENGTH, CAPTIONS = 192, 32, 100
WARM_UP, STEPS = 2, 5
DESIGNS = {  # latents (channels, side), and what differs from the recipe
    "the recipe's": ((12, 16), {}),
    "the recipe's, batches of 8": ((12, 16), {"batch_size": 8}),
    "the model that ships: three transformer layers": ((12, 16), {"transformer_layers": 3}),
    "narrower": ((12, 16), {"channels": (48, 96), "head_width": 16}),
    "the first model's": ((4, 16), {"channels": (64, 128, 192), "head_width": 16, "attention_levels": 3}),
    "two levels, both attend": ((4, 16), {"attention_levels": 2}),
    "two levels, the inner one attends": ((4, 16), {}),
    "the same, batches of 128": ((4, 16), {"batch_size": 128}),
    "wider": ((4, 16), {"channels": (128, 256)}),
    "three levels": ((4, 16), {"channels": (96, 192, 256), "attention_levels": 2}),
    "fewer latents, one level": ((16, 8), {"channels": (256,)}),
    "fewer latents, two levels": ((16, 8), {"channels": (192, 256)}),
}


def run(folder: Path, *, compiled: bool = False) -> Iterator[str | Row]:
    """Time the steps of each design, in turn, and give the lines of the report. ``compiled``: with torch.compile as well."""
    machine = MachineSettings()
    device = device_of(machine)
    if device.type == "cpu":
        keep_freed_memory()
    yield f"a step of training, random latents, {LENGTH} tokens of text, Muon, bf16 where it is faster; median of {STEPS}"
    for name, (latents, changes) in DESIGNS.items():
        for is_compiled in (False, True) if compiled else (False,):
            shown = f"{name}, compiled" if is_compiled else name
            yield {"": shown} | _measure(UnetSettings(**changes), latents, device, is_compiled)


def _measure(settings: UnetSettings, latents: tuple[int, int], device: torch.device, is_compiled: bool) -> Row:
    torch.manual_seed(0)
    channels, side = latents
    network = unet.prepared(unet.build(settings, TEXT_WIDTH, latents), device)
    count = 4 * settings.batch_size
    material = unet.Material(
        torch.randn(count, channels, side, side), torch.randn(CAPTIONS, LENGTH, TEXT_WIDTH).bfloat16(),
        torch.randint(CAPTIONS, (count,)), torch.zeros(count, side, side, dtype=torch.uint8), torch.ones(count),
    )  # fmt: skip
    schedule = NoiseSchedule.from_config(unet.SCHEDULER).to(device)
    optimizer = Muon(parameter_groups(network, settings.weight_decay), settings.learning_rate)
    stepping = torch.compile(network) if is_compiled else network
    random, never = torch.Generator().manual_seed(0), torch.ones(settings.batch_size)

    def step() -> float:
        started = time.perf_counter()
        which = torch.randint(count, (settings.batch_size,), generator=random)
        with precision_of(MachineSettings(), device):
            loss = unet.loss_of(stepping, material, which, never, random, schedule, settings, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # a card answers when it is done
        return time.perf_counter() - started

    with FlopCounterMode(display=False) as counter, torch.no_grad(), precision_of(MachineSettings(), device):
        unet.loss_of(network, material, torch.arange(1), never[:1], random, schedule, settings, device)
    seconds = statistics.median([step() for _ in range(WARM_UP + STEPS)][WARM_UP:])
    forward = counter.get_total_flops() / 1e9
    return {
        "M parameters": sum(item.numel() for item in network.parameters()) / 1e6, "GFLOP forward": forward,
        "ms a sample": seconds / settings.batch_size * 1e3, "samples an hour": round(3600 * settings.batch_size / seconds),
        "TFLOP/s": 3 * forward * settings.batch_size / seconds / 1e3,
    }  # fmt: skip

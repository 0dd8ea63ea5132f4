"""What an Apple GPU does otherwise, played with calls that say what they were asked: no float64, memory of its own counting."""

from __future__ import annotations

import pytest
import torch

from src import base_models, devices, generator, memory_plan, optimizations, orders
from src.arguments import build_config, parse_arguments
from src.config import AppConfig, OptimizationConfig
from src.diffusion import NoiseSchedule
from src.errors import ExitCode, UserError, is_out_of_memory
from src.memory_prediction import GIB
from src.schedulers import build_scheduler, find_sampler
from src.scratch import unet
from src.train_config import TrainRun
from src.training import engine

MAC = torch.device("mps")
IMPOSSIBLE = [("enable_attention_slicing", True, "black pictures on a Mac"), ("quantize", "nf4", "needs an NVIDIA card")]


def test_memory_is_held_to_what_the_system_recommends_or_to_less(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[float] = []
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 6 * GIB)
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", held.append)
    assert optimizations.memory_budget(MAC, OptimizationConfig()) == 6 * GIB
    assert optimizations.memory_budget(MAC, OptimizationConfig(max_vram_gb=3)) == 3 * GIB
    assert held == [1.0, 0.5]


@pytest.mark.parametrize("text", ["Invalid buffer size: 16.00 GiB", "MPS backend out of memory (MPS allocated: 9 GB)"])
def test_its_words_for_out_of_memory_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("schedule", ["", "_karras", "_exponential", "_beta"])
def test_dpm2_brings_no_float64_to_it(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, moved = torch.Tensor.to, []

    def to(tensor: torch.Tensor, *args, **named):
        if "mps" in map(str, (*args, *named.values())):
            moved.append(tensor.dtype)
            return tensor
        return real(tensor, *args, **named)

    facts = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    expected = build_scheduler(find_sampler(f"dpm2{schedule}"), facts)
    expected.set_timesteps(10, device="cpu")
    monkeypatch.setattr(torch.Tensor, "to", to)
    scheduler = build_scheduler(find_sampler(f"dpm2{schedule}"), facts)
    scheduler.set_timesteps(10, device="mps")
    assert moved
    assert torch.float64 not in moved
    assert torch.allclose(scheduler.timesteps, expected.timesteps.float())


def test_timesteps_are_drawn_without_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnMac(torch.Tensor):
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    weights = NoiseSchedule.from_config(unet.SCHEDULER).snr
    drawn = [unet.timesteps_by(kind, 8, torch.Generator().manual_seed(0)) for kind in (weights.as_subclass(OnMac), weights)]
    assert drawn[0].tolist() == drawn[1].tolist()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "adamw8bit"}, "no code for a Mac"), ({"quantize": "nf4"}, "needs an NVIDIA card"),
        ({"dropout": 0.1}, "learns wrong on a Mac"),
    ],
)  # fmt: skip
def test_trainings_that_it_cannot_do_are_refused_before_anything_is_loaded(
    settings: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_models, "pick_device", lambda name: MAC)
    run = TrainRun()
    for name, value in settings.items():
        setattr(run.train, name, value)
    with pytest.raises(UserError, match=said):
        engine.build_accelerator(run)


@pytest.mark.parametrize(("name", "value", "said"), IMPOSSIBLE)
def test_switches_that_it_cannot_follow_are_refused_before_a_model_is_fetched(
    name: str, value: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AppConfig()
    setattr(config.optimization, name, value)
    monkeypatch.setattr(base_models, "pick_device", lambda name: MAC)
    monkeypatch.setattr(base_models, "load", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 8 * GIB)
    with pytest.raises(UserError, match=said) as caught:
        generator.TextToImageGenerator(config).load_model()
    assert caught.value.exit_code is ExitCode.USAGE
    monkeypatch.setattr(devices, "has_apple_gpu", lambda: True)
    for device, is_refused in {"auto": True, "mps": True, "cuda": False}.items():
        if is_refused:
            with pytest.raises(UserError, match=said):
                memory_plan.check_device(config.optimization, device)
        else:
            memory_plan.check_device(config.optimization, device)


def test_the_command_line_asks_before_it_imports_torch(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(devices, "has_apple_gpu", lambda: True)
    typed = parse_arguments(["x", "--attention-slicing", "--model", "embedded", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="black pictures on a Mac"):
        orders.check_surroundings(typed, build_config(typed))

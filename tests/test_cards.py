"""Cards that the installed torch cannot use: said in a line before a model is loaded."""

from __future__ import annotations

import pytest
import torch

from src import base_models, devices, optimizations
from src.base_models import pick_device
from src.config import AppConfig
from src.errors import ExitCode
from src.generator import TextToImageGenerator
from tests.tiny.model_folders import refusal


@pytest.mark.parametrize(
    ("capability", "cuda", "problem"),
    [
        ((6, 1), "13.0", "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"), ((6, 1), "12.6", None),
        ((7, 0), "13.0", "compute capability 7.0"), ((7, 5), "13.0", None), ((8, 9), "13.0", None), ((8, 9), "12.6", None),
        ((9, 0), "13.0", None), ((12, 0), "12.6", "install a newer torch"), ((12, 1), "13.0", None), ((11, 0), "13.0", "11.0"),
    ],
)  # fmt: skip
def test_a_card_that_torch_has_no_code_for_is_said_before_a_model_is_loaded(monkeypatch, capability, cuda, problem):
    """As torch's own table of its builds has it, which only warns."""
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    built = sorted(torch.cuda.PYTORCH_RELEASES_CODE_CC[cuda]["x86_64"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [f"sm_{code}" for code in built])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    runs = any(10 * capability[0] + capability[1] in torch.cuda.DEVICE_REQUIREMENT[code] for code in built)
    assert runs == (problem is None)
    if runs:
        assert pick_device("cuda") == torch.device("cuda:0")
    else:
        assert problem in refusal(ExitCode.USAGE, pick_device, "auto")


def test_a_card_that_a_torch_for_the_cpu_leaves_idle_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices, "detect_card", lambda: devices.Card("GeForce", 8 << 30, 7 << 30, 0))
    cpu = torch.device("cpu")
    assert "GeForce does nothing: this torch is built for the CPU alone; pip install" in base_models.idle_card("auto", cpu)
    assert base_models.idle_card("cpu", cpu) is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert base_models.idle_card("auto", cpu) is None
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices, "detect_card", lambda: None)
    assert base_models.idle_card("auto", cpu) is None


def test_a_card_without_products_of_int8_is_said_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(base_models, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(base_models, "load", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 8 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    config = AppConfig()
    config.optimization.quantize = "int8"
    assert "this is a GTX 1080; use --quantize nf4" in refusal(ExitCode.USAGE, TextToImageGenerator(config).load_model)

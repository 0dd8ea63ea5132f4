"""What accelerate is asked for: the precision, the card, patience; and what it may not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from src import base_models
from src.errors import UserError
from src.train_config import TrainRun
from src.training import engine

CARD = torch.device("cuda:1")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `build_accelerator` asks for on a machine whose second card is meant, and which computes in bf16."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(base_models, "pick_device", lambda name: CARD)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(card=device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2060")
    monkeypatch.setattr(engine, "Accelerator", lambda **options: asked.update(options))
    return asked


def run_of(frozen: str = "auto", mixed: str = "auto") -> TrainRun:
    run = TrainRun()
    run.model.precision, run.train.mixed_precision = frozen, mixed
    return run


def test_the_card_that_was_named_is_used_and_the_others_may_wait_long(built: dict[str, Any]) -> None:
    engine.build_accelerator(run_of())
    assert built["card"] == CARD
    handler, _ = built["kwargs_handlers"]
    assert handler.timeout.total_seconds() > 24 * 3600


@pytest.mark.parametrize(
    ("frozen", "mixed", "expected"),
    [
        ("auto", "auto", "bf16"), ("auto", "fp16", "fp16"), ("auto", "no", "no"), ("fp16", "auto", "fp16"),
        ("fp32", "auto", "no"), ("fp32", "bf16", "bf16"), ("bf16", "no", "no"),
    ],
)  # fmt: skip
def test_precision_is_as_asked_for_or_as_the_weights(built: dict[str, Any], frozen: str, mixed: str, expected: str) -> None:
    engine.build_accelerator(run_of(frozen, mixed))
    assert built["mixed_precision"] == expected


def test_a_card_without_bf16_trains_in_fp16_with_its_scaler(built: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    engine.build_accelerator(run_of())
    assert built["mixed_precision"] == "fp16"
    for frozen, mixed in (("auto", "bf16"), ("bf16", "auto")):
        with pytest.raises(UserError, match=r"RTX 2060 only imitates bf16.*--mixed_precision fp16"):
            engine.build_accelerator(run_of(frozen, mixed))


def test_the_card_that_trains_is_asked_and_of_several_processes_all(built: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if torch.device(device).index == 0 else (8, 6)
    )
    engine.build_accelerator(run_of())
    assert built["mixed_precision"] == "bf16"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: (7, 5) if card == 0 else (8, 6))
    engine.build_accelerator(run_of())
    assert built["mixed_precision"] == "fp16"


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_half_precision_without_its_scaler_is_refused(built: dict[str, Any], mixed: str) -> None:
    with pytest.raises(UserError, match="small gradients would vanish"):
        engine.build_accelerator(run_of("fp16", mixed))


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP"])
def test_splitting_the_model_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UserError, match=f"asks for {name}.*--multi_gpu"):
        engine.build_accelerator(run_of())

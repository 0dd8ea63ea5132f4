"""A card that was left because another program filled it is taken again when that program is gone."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from diffusers import UNet2DConditionModel

from src import devices, optimizations
from tests.test_memory_ladder import GIB, Run, _card, folder, overflow  # noqa: F401 - fixtures

SIZE = {"width": 64, "height": 64}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the card has for this process; of 100 GiB at the start."""
    there = {"bytes": 100 * GIB}
    monkeypatch.setattr(optimizations, "room_bytes", lambda device: there["bytes"])
    monkeypatch.setattr(devices, "available_memory_bytes", lambda: 100 * GIB)
    return there


def left_card(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: F811
    """A run whose every plan of the card failed."""
    overflow(monkeypatch, UNet2DConditionModel, "forward", range(4))
    run = Run(folder, tmp_path, precision="bf16")
    run.draw(**SIZE)
    assert run.recipe["memory_plan"] == "cpu"
    return run


def test_what_another_program_held_is_taken_again(folder, tmp_path, monkeypatch, room) -> None:  # noqa: F811
    room["bytes"] = 2 * GIB
    run = left_card(folder, tmp_path, monkeypatch)
    run.draw(**SIZE)
    assert run.recipe["memory_plan"] == "cpu", "it is still there"
    room["bytes"] = 100 * GIB - (150 << 20)  # kernels that this process has loaded
    (back,) = run.draw(**SIZE)
    assert (run.recipe["memory_plan"], run.recipe["precision"]) == ("gpu", "bf16")
    assert "memory  the memory that another program held is free again; loading the model onto the card again" in run.lines
    assert numpy.array_equal(Run(folder, tmp_path, precision="bf16").draw(**SIZE)[0], back)


def test_a_card_that_was_too_small_by_itself_is_not_tried_again(folder, tmp_path, monkeypatch, room) -> None:  # noqa: F811
    run = left_card(folder, tmp_path, monkeypatch)
    run.draw(**SIZE)
    assert run.recipe["memory_plan"] == "cpu"

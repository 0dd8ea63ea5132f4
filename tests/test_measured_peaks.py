"""Remembered peaks: there and back, one file for all processes, and nothing lost but a prediction when it is damaged."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from src import measured_peaks
from src.config import AppConfig
from src.measured_peaks import FILE_NAME, MeasuredPeaks, peak_key
from src.memory_prediction import GIB, Request
from src.model_shapes import bundled_shapes

SHAPES, NEED = bundled_shapes("sd15"), Request(512, 512)


def key(need: Request = NEED, device: str = "NVIDIA One", mode: str = "txt2img", **switches: bool) -> str:
    config = AppConfig()
    for name, value in switches.items():
        setattr(config.optimization, name, value)
    return peak_key(device, "sd15", SHAPES, need, mode, config)


def test_what_is_remembered_is_found_by_others(tmp_path) -> None:
    mine, other = (MeasuredPeaks(tmp_path / "cache") for _ in range(2))
    mine.remember(key(), "gpu", 3 * GIB)
    other.remember(key(), "model-offload", 2 * GIB)
    assert mine.of(key()) == {"gpu": 3 * GIB, "model-offload": 2 * GIB}
    assert other.of(key(device="NVIDIA Two")) == {}


def test_a_peak_is_for_one_request_alone() -> None:
    changes = {
        "width_px": 768, "height_px": 768, "batch_size": 2, "guidance": False, "precision": "bf16", "lora_bytes": 1,
        "safety_checker": False, "quantize": "int8", "deep_cache": 2, "token_merging": 0.5, "attention_slicing": True,
    }  # fmt: skip
    assert changes.keys() == {item.name for item in fields(Request)}
    keys = [key(), key(mode="img2img"), key(device="x"), key(enable_xformers=True)]
    keys += [key(replace(NEED, **{name: value})) for name, value in changes.items()]
    assert len(set(keys)) == len(keys)


def test_whether_a_checker_is_counted_matters_only_where_the_model_ships_one() -> None:
    sdxl = bundled_shapes("sdxl")
    assert (
        len({peak_key("x", "m", sdxl, replace(NEED, safety_checker=on), "txt2img", AppConfig()) for on in (True, False)}) == 1
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": 3}', b'{"a": {"gpu": "3"}}', b'{"a": {"gpu": true}}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_file_is_one_line_and_written_anew(tmp_path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    lines: list[str] = []
    peaks = MeasuredPeaks(tmp_path, lines.append)
    assert peaks.of(key()) == peaks.of(key()) == {}
    assert len(lines) == 1
    assert "damaged" in lines[0]
    peaks.remember(key(), "gpu", 5)
    assert json.loads((tmp_path / FILE_NAME).read_bytes()) == {key(): {"gpu": 5}}


def test_the_file_does_not_grow_without_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(measured_peaks, "MAX_ENTRIES", 3)
    peaks = MeasuredPeaks(tmp_path)
    for index in (0, 1, 2, 0, 3):
        peaks.remember(str(index), "gpu", index + 1)
    assert list(json.loads((tmp_path / FILE_NAME).read_bytes())) == ["2", "0", "3"]


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path) -> None:
    (tmp_path / "cache").write_text("a file")
    MeasuredPeaks(tmp_path / "cache").remember(key(), "gpu", 5)

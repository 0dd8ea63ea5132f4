"""What earlier runs took of a card: remembered by device, model and request, so that the next plan need not predict it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from src import files
from src.config import AppConfig
from src.errors import UserError
from src.memory_prediction import Request
from src.model_shapes import ModelShapes

FILE_NAME = "measured_peaks.json"  # in the cache folder: {what was drawn: {placement: bytes}}
MAX_ENTRIES = 1000


def peak_key(device: str, model: str, shapes: ModelShapes, request: Request, mode: str, config: AppConfig) -> str:
    """Everything that a peak depends on beside the placement. ``device`` is the card's name, ``mode`` that of the picture."""
    request = replace(request, safety_checker=request.safety_checker and "safety_checker" in shapes.parameters)
    switches = [name for name in _SWITCHES if getattr(config.optimization, name)]
    parts = (device, model, config.model.vae, sum(shapes.parameters.values()), mode, *astuple(request), *switches)
    return " | ".join(map(str, parts))


_SWITCHES = (
    "enable_attention_slicing", "enable_xformers", "enable_torch_compile", "enable_channels_last",
)  # fmt: skip


class MeasuredPeaks:
    """The peaks in one file. It is a cache: a damaged one is said once, ignored, and written anew."""

    def __init__(self, cache_folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._say = cache_folder / FILE_NAME, say

    def of(self, key: str) -> Mapping[str, int]:
        """Peaks in bytes by placement; empty for what was never drawn."""
        return self._read().get(key, {})

    def remember(self, key: str, placement: str, peak_bytes: int) -> None:
        """Put a peak beside the others, other processes' included."""
        entries = self._read()
        self._write(entries | {key: entries.pop(key, {}) | {placement: peak_bytes}})  # the newest last

    def _write(self, entries: dict[str, dict[str, int]]) -> None:
        newest = dict(list(entries.items())[-MAX_ENTRIES:])
        with contextlib.suppress(UserError, OSError):  # a cache that cannot be written costs a prediction, not the picture
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.publish_bytes(self._path, json.dumps(newest, indent=1).encode())

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            entries = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            entries = None
        if isinstance(entries, dict) and all(map(_is_entry, entries.values())):
            return entries
        self._say(f"memory  {self._path} is damaged and not used; it will be written anew")
        self._say = lambda line: None
        return {}


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and all(type(peak) is int and peak > 0 for peak in value.values())

"""The adapters of a running model by their paths: read once, read again when a file has changed, attached as asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.lora.reading import Adapter, read_adapter
from src.lora.stack import AdapterStack, LoraReport
from src.request import LoraChoice

KEPT_ADAPTERS, KEPT_BYTES = 4, 512 << 20  # stay in memory after use, so that swapping back is instant


@dataclass(frozen=True, slots=True)
class Attached:
    """An adapter in use: what was asked for, what was read, and what of it fits the model."""

    choice: LoraChoice
    adapter: Adapter
    report: LoraReport


class LoraShelf:
    """Reads adapters for one ``AdapterStack`` and says what is attached."""

    def __init__(self, stack: AdapterStack, say: Callable[[str], None]) -> None:
        self.attached: tuple[Attached, ...] = ()
        self._stack = stack
        self._say = say
        self._read: dict[tuple[Any, ...], Adapter] = {}

    def files(self) -> list[Path]:
        """The files of what is attached."""
        return [file for item in self.attached for file in item.adapter.files]

    def use(self, choices: Sequence[LoraChoice], allow_partial: bool) -> None:
        """Attach exactly these adapters, as their files are now; what was not in use like that before is reported.

        Raises UserError with nothing changed.
        """
        adapters = [self._read_once(choice.path) for choice in choices]
        weighted = [(adapter, choice.weight) for adapter, choice in zip(adapters, choices)]
        reports = self._stack.set(weighted, allow_partial=allow_partial)
        before = [(item.adapter, item.choice.weight) for item in self.attached]
        self.attached = tuple(Attached(*item) for item in zip(choices, adapters, reports))
        self._forget_old(len(choices))
        for item in self.attached:
            if (item.adapter, item.choice.weight) not in before:
                self._say(f"lora    {item.report.line()}, weight {item.choice.weight:g}")
                if item.report.unmatched:
                    self._say(f"lora    left out: {', '.join(item.report.unmatched)}")

    def _forget_old(self, in_use: int) -> None:
        """Keep a few of those that were in use before, the newest, as long as they are small."""
        kept_bytes = 0
        for age, old in enumerate(list(self._read)[: len(self._read) - in_use][::-1]):
            kept_bytes += sum(size for _, _, size in old[1:])
            if age >= KEPT_ADAPTERS or kept_bytes > KEPT_BYTES:
                del self._read[old]

    def _read_once(self, path: Path) -> Adapter:
        found = [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]
        key = (path, *((file, file.stat().st_mtime_ns, file.stat().st_size) for file in found if file.exists()))
        adapter = self._read.pop(key, None)
        if adapter is None:
            adapter = read_adapter(path)
            _ = adapter.sha256, adapter.tensors_sha256  # hashed now: when a picture is finished the file may be another
        self._read[key] = adapter  # the newest last
        return adapter


def last_of_each(choices: Sequence[LoraChoice]) -> tuple[LoraChoice, ...]:
    """The adapters without repetition: one that is named twice, however spelled, has the weight given last."""
    return tuple({choice.path.resolve(): choice for choice in choices}.values())

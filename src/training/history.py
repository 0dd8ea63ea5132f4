"""The log of a training, ``log.jsonl``: a record a line, read again at a resume and by the report.

Records are kept in memory and published as a whole now and then, so a kill loses the newest few and never tears a line;
what a resume repeats is dropped first, so no step stands there twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from src.errors import UserError
from src.files import publish_bytes

# train: loss, lr, grad_norm. validation: loss. samples: prompts. score: clip_i, clip_t. checkpoint. event: text.
Kind = Literal["train", "validation", "samples", "score", "checkpoint", "event"]
KINDS = get_args(Kind)
FLUSH_EVERY_S = 20.0


@dataclass(frozen=True, slots=True)
class Record:
    """What was noted after an optimizer step (0: before the first)."""

    kind: Kind
    step: int
    values: dict[str, Any] = field(default_factory=dict)  # numbers, texts and lists of them; None: was no finite number


class History:
    """The records of one training, in the order they were made."""

    def __init__(self, path: Path | None) -> None:
        """Go on with what ``path`` holds, if it is there. ``None`` keeps everything in memory (all processes but the first)."""
        self.path = path
        self._records = list(_parse(path)) if path is not None and path.is_file() else []
        self._is_saved = True
        self._saved_at = time.monotonic()

    def add(self, kind: Kind, step: int, **values: Any) -> None:
        """Note something; it is on the disk by the next ``flush``, or after ``FLUSH_EVERY_S``.

        That a disk is full is not a reason to end a training here: the next checkpoint will say so, with all it knows.
        """
        if kind not in KINDS:
            raise ValueError(f"'{kind}' is no kind of record; there are: {', '.join(KINDS)}")
        self._records.append(Record(kind, step, {name: finite(value) for name, value in values.items()}))
        self._is_saved = False
        if time.monotonic() - self._saved_at > FLUSH_EVERY_S:
            try:
                self.flush()
            except UserError:
                self._saved_at = time.monotonic()

    def flush(self) -> None:
        """Bring everything to the disk: at checkpoints and at the end. Raises UserError when the disk says no."""
        if self.path is not None and not self._is_saved:
            publish_bytes(self.path, "".join(map(_line, self._records)).encode())
        self._is_saved, self._saved_at = True, time.monotonic()

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``: a resume does it again. -1 forgets everything."""
        kept = [record for record in self._records if record.step <= step]
        self._is_saved = self._is_saved and len(kept) == len(self._records)
        self._records = kept

    def read(self, kind: Kind | None = None) -> list[Record]:
        """The records, or those of one kind."""
        return [record for record in self._records if kind in (None, record.kind)]

    def curve(self, kind: Kind, name: str) -> list[tuple[int, float]]:
        """One number over the steps; the newest of a step counts, and what is missing or no number is left out."""
        values = {record.step: record.values.get(name) for record in self._records if record.kind == kind}
        return sorted((step, float(value)) for step, value in values.items() if isinstance(value, (int, float)))


def _parse(path: Path) -> Iterator[Record]:
    """The records of a file; a line that is no record (cut off, or edited) is passed over."""
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            kind, step = values.pop("kind"), values.pop("step")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            continue
        if kind in KINDS and isinstance(step, int):
            yield Record(kind, step, values)


def _line(record: Record) -> str:
    return json.dumps({"kind": record.kind, "step": record.step} | record.values, ensure_ascii=False, default=str) + "\n"


def finite(value: Any) -> Any:
    """JSON has no NaN, and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

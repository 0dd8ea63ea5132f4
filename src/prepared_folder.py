"""What prepare_dataset says in ``dataset.json`` of the pictures that it made: trigger, repeats, and what each was cut from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.errors import not_found, refused

MANIFEST = "dataset.json"
_AGAIN = "run the same `python -m src.prepare_dataset` command again"


@dataclass(frozen=True, slots=True)
class Origin:
    """One prepared picture and its source. Sizes are (width, height) in pixels."""

    size_px: tuple[int, int]
    source_px: tuple[int, int]
    crop_left_top: tuple[float, float]  # of the part that was kept, in pixels of the source
    scale: float  # from the source to the prepared picture
    repeats: int


@dataclass(frozen=True, slots=True)
class PreparedFolder:
    """Nothing in it for a folder that prepare_dataset did not make."""

    trigger: str | None = None
    origins: dict[str, Origin] = field(default_factory=dict)  # by file name


def read_prepared(folder: Path) -> PreparedFolder:
    """Read ``dataset.json``, as far as it is one.

    Raises UserError: refused for a preparation that was interrupted, not found for a picture that vanished since.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return PreparedFolder()
    if not isinstance(manifest, dict) or not isinstance(records := manifest.get("pictures"), list):
        return PreparedFolder()
    if manifest.get("complete") is False:
        raise refused(f"{folder}: its preparation was interrupted; {_AGAIN}")
    by_name = {item["file_name"]: item for item in records if isinstance(item, dict) and isinstance(item.get("file_name"), str)}
    gone = [name for name in by_name if not (folder / name).is_file()]
    if gone:
        more = f" and {len(gone) - 1} more pictures" if len(gone) > 1 else ""
        raise not_found(f"{folder / gone[0]}{more}: not there any more; {_AGAIN}, without the pictures that you do not want")
    trigger = manifest.get("trigger")
    origins = {name: origin for name, item in by_name.items() if (origin := _origin(item)) is not None}
    return PreparedFolder(trigger if isinstance(trigger, str) and trigger else None, origins)


def _origin(record: dict[str, Any]) -> Origin | None:
    """A picture's record, if it holds what it should."""
    try:
        width, height = (int(side) for side in record["size_px"])
        source_width, source_height = (int(side) for side in record["source_px"])
        left, top, right, _ = (float(edge) for edge in record["crop_px"])
        repeats = int(record["repeats"])
        scale = width / (right - left)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if min(width, height, source_width, source_height, repeats) < 1 or not all(map(math.isfinite, (left, top, scale))):
        return None
    return Origin((width, height), (source_width, source_height), (left, top), scale, repeats) if scale > 0 else None

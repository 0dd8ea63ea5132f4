"""What a verb leaves behind: result.json for programs, report.html for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from src.files import check_writable_folder, publish_bytes
from src.version import VERSION

RESULT, REPORT = "result.json", "report.html"
_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "Pillow", "torch-fidelity")


def publish(folder: Path, verb: str, result: Mapping[str, Any], page: bytes) -> Path:
    """Write both into ``folder``, which is made; returns the report's path.

    ``result`` gets the verb and the versions added. Raises ValueError for a number that is not finite, UserError when the
    disk says no.
    """
    document = {"verb": verb, "version": VERSION, "versions": versions(), **result}
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    check_writable_folder(folder)
    publish_bytes(folder / RESULT, (text + "\n").encode("utf-8", errors="replace"))
    return publish_bytes(folder / REPORT, page)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide figures, where they are installed."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

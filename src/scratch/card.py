"""What an assembled model says of itself: recipe and figures of every phase, for programs and for people."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.errors import not_found, refused
from src.scenes import grammar
from src.scratch.phases import Work, settings_of
from src.scratch.settings import ScratchSettings

CARD, PAGE, SAMPLES = "card.json", "README.md", "samples.png"


def read_card(model: Path) -> dict[str, Any]:
    """What `assemble` said of a model, whose files are all there. Raises UserError: not found, or refused."""
    try:
        card = json.loads((model / CARD).read_bytes())
        card["phases"]["unet"]["figures"]["samples"], card["files"]
    except FileNotFoundError:
        raise not_found(f"{model / CARD}: is not there; a model that python -m src.scratch assembled has one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refused(f"{model / CARD}: is no card of python -m src.scratch ({error})") from None
    if missing := [name for name in card["files"] if not (model / name).is_file()]:
        raise not_found(f"{model / missing[0]}: is not there, but its card names it; assemble the model again")
    return card


def make_card(work: Work, inputs: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Recipe and figures of every phase, versions, and the names of all files."""
    results = {phase: work.result(phase) for phase in inputs}
    usual = ScratchSettings()
    changed = [
        f"--set {phase}.{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for phase, one in results.items()
        for name, value in one.facts["settings"].items()
        if value != settings_of(usual, phase)[name]
    ]
    return {
        "name": "a small Stable Diffusion, from nothing", "license": "MIT",
        "command": " ".join(["python -m src.scratch all", *changed]), "files": sorted(names),
        "phases": {phase: {part: one.facts[part] for part in ("settings", "figures")} for phase, one in results.items()},
        "made_with": {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"machine": platform.machine()},
    }  # fmt: skip


def page_of(card: dict[str, Any]) -> str:
    """The card for people, in the form of the hub's model cards."""
    lines = [
        "---", "license: mit", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "", f"# {card['name']}", "",
        "Trained from random weights, on pictures that the project draws itself (128 x 128 px). An ordinary Stable Diffusion",
        "folder, with its CLIP. What it understands, with 8 shapes and 12 colours:", "",
        "```text", *(line.strip() for line in (grammar.__doc__ or "").splitlines() if line.startswith("    ")), "```", "",
        f"![pictures and their prompts]({SAMPLES})", "", f"Made by `{card['command']}`; `card.json` has every setting.", "",
        "| phase | figures |", "| --- | --- |",
    ]  # fmt: skip
    for phase, one in card["phases"].items():
        told = ", ".join(f"{name} {value:.4g}" for name, value in one["figures"].items() if isinstance(value, (int, float)))
        lines.append(f"| {phase} | {told} |")
    return "\n".join(lines) + "\n"

"""The last phase: the parts become one folder that any program for Stable Diffusion loads, with a card of how it was made."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src import folders
from src.errors import refused
from src.scenes import grammar
from src.scratch.phases import Work, settings_of
from src.scratch.settings import ScratchSettings
from src.terminal import Terminal

MAX_BYTES = 40 << 20
CARD, PAGE, SAMPLES = "card.json", "README.md", "samples.png"
PARTS = {"unet": "unet", "vae": "vae", "tokenizer": "tokenizer", "clip": "clip"}  # folder: phase
INDEX = {
    "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None], "image_encoder": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def assemble(work: Work, settings: ScratchSettings, out: Path, terminal: Terminal) -> dict[str, Any]:
    """Write ``out``, in place of a model that was assembled before; anything else of that name is moved aside.

    Raises UserError: not found for a missing phase, usage for phases that do not fit together, refused above 40 MB.
    """
    inputs = work.inputs("assemble")
    contents: dict[str, bytes] = {}
    for folder, phase in PARTS.items():
        result = work.result(phase)
        for name in result.files:
            is_top = name.startswith("scheduler/") or name == SAMPLES
            target = f"text_encoder/{name.removeprefix('text/')}" if name.startswith("text/") else f"{folder}/{name}"
            contents[name if is_top else target] = result.read(name)
            if phase == "tokenizer":  # the CLIP, which judges pictures, is a whole one
                contents[f"clip/{name}"] = contents[target]
    contents["model_index.json"] = json.dumps(
        INDEX | {"_diffusers_version": version("diffusers")}, indent=2, sort_keys=True
    ).encode()
    card = make_card(work, inputs, [*contents, CARD, PAGE])
    contents[CARD] = json.dumps(card, indent=2).encode() + b"\n"
    contents[PAGE] = page_of(card).encode()
    size_bytes = sum(map(len, contents.values()))
    if size_bytes > MAX_BYTES:
        raise refused(f"the model would be {size_bytes / 2**20:.1f} MB, the limit is {MAX_BYTES >> 20}; choose fewer channels")
    folders.make_folder(out.parent)
    if out.exists() and (reason := _not_ours(out)):
        terminal.say(f"{out}: {reason}; it is now {folders.set_aside(out).name}")
    folders.publish_folder(out, contents)
    terminal.say(f'{out}: {size_bytes / 2**20:.1f} MB; python main.py "a red star on a white background" --model {out}')
    return card


def _not_ours(out: Path) -> str | None:
    """Why what lies there may not be replaced: it was not made here, or something was added. None if it may."""
    try:
        known = set(json.loads((out / CARD).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "was not made by this command"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    return f"holds {min(found - known)!a}, which this command did not write" if found - known else None


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

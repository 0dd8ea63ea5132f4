"""The last phase: the parts become one folder that any program for Stable Diffusion loads, with a card of how it was made.

`unpack` is its inverse: the parts of such a folder become phases again, to go on from.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src import folders
from src.checkpoints import CheckpointFolder
from src.errors import refused, usage_error
from src.scratch.card import CARD, PAGE, SAMPLES, make_card, page_of, read_card
from src.scratch.phases import Work
from src.scratch.settings import ScratchSettings
from src.scratch.tokenizer import TOKENIZER_FILES
from src.terminal import Terminal

MAX_BYTES = 40 << 20
PARTS = {"unet": "unet", "vae": "vae", "tokenizer": "tokenizer", "clip": "clip"}  # folder: phase
UNPACKED = ("tokenizer", "vae", "clip", "unet")  # in the order in which they build on each other
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


def unpack(model: Path, work: Work) -> None:
    """Publish the parts of a model that was assembled as phases in ``work``, whose scenes are those that it learnt from.

    Raises UserError: not found or refused for a folder that was not assembled, usage for other scenes or where a phase is.
    """
    card = read_card(model)
    drawn, learnt = work.result("scenes").facts["settings"], card["phases"]["scenes"]["settings"]
    if drawn != learnt:
        asked = " ".join(f"--set {name}={value}" for name, value in learnt.items())
        raise usage_error(
            f"{work.of('scenes')}: are other scenes; run python -m src.scratch scenes {asked} --work {work.folder}"
        )
    if there := [phase for phase in UNPACKED if work.of(phase).exists()]:
        raise usage_error(f"{work.of(there[0])}: is there already; choose a --work folder that has no more than scenes")
    for phase in UNPACKED:
        contents = {}
        for name in card["files"]:
            if (own := _name_in(phase, name)) is not None:
                contents[own] = (model / name).read_bytes()
        part = card["phases"][phase]
        inputs = work.inputs(phase)
        facts = {"settings": part["settings"], "inputs": inputs, "figures": part["figures"]}
        CheckpointFolder(work.of(phase), work.say).publish("final", contents, facts)


def _name_in(phase: str, name: str) -> str | None:
    """What a file of an assembled model is called in its phase; None for a file of another."""
    if name in (CARD, PAGE, "model_index.json"):
        return None
    folder, _, rest = name.partition("/")
    if name == SAMPLES or folder == "scheduler":
        return name if phase == "unet" else None
    if folder == "text_encoder":
        return f"text/{rest}" if phase == "clip" else None
    is_own = PARTS.get(folder) == phase and (phase == "tokenizer" or rest not in TOKENIZER_FILES)
    return rest if is_own else None


def _not_ours(out: Path) -> str | None:
    """Why what lies there may not be replaced: it was not made here, or something was added. None if it may."""
    try:
        known = set(json.loads((out / CARD).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "was not made by this command"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    return f"holds {min(found - known)!a}, which this command did not write" if found - known else None

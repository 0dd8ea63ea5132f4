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
from src.model_files import EMBEDDED
from src.scratch.card import CARD, PAGE, PARTS, SAMPLES, SCENES_BEFORE, files_of, make_card, page_of, read_card
from src.scratch.phases import Work, as_learnt, settings_of
from src.scratch.settings import ScratchSettings
from src.terminal import Terminal

MAX_SHIPPED_BYTES = 40_000_000  # of the model that everybody gets with the project
UNPACKED = ("tokenizer", "vae", "clip", "unet")  # in the order in which they build on each other
INDEX = {
    "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None], "image_encoder": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def assemble(work: Work, out: Path, terminal: Terminal) -> dict[str, Any]:
    """Write ``out``, in place of a model that was assembled before; anything else of that name is moved aside.

    Raises UserError: not found for a missing phase, usage for phases that do not fit together, refused for a model that is
    too large to ship where the one that ships lies.
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
    if size_bytes > MAX_SHIPPED_BYTES and out.resolve() == EMBEDDED.resolve():
        larger = f"the model would be {size_bytes / 2**20:.1f} MB, what ships is at most {MAX_SHIPPED_BYTES >> 20}"
        raise refused(f"{out}: {larger}; nothing is lost: assemble it with another --out")
    folders.make_folder(out.parent)
    if out.exists() and (reason := _not_ours(out)):
        terminal.say(f"{out}: {reason}; it is now {folders.set_aside(out).name}")
    folders.publish_folder(out, contents)
    terminal.say(f'{out}: {size_bytes / 2**20:.1f} MB; python main.py "a red star on a white background" --model {out}')
    return card


def unpack(model: Path, work: Work, other_scenes: bool = False) -> None:
    """Publish the parts of a model that was assembled as phases in ``work``, whose scenes are those that it learnt from.

    With ``other_scenes`` they may be others, which the parts' facts then say. What is there already stays, so the same call
    goes on after a kill. Raises UserError: not found or refused for a folder that was not assembled, usage where another
    phase is, or other scenes are.
    """
    card = read_card(model)
    parts = {phase: files_of(model, card, phase) for phase in UNPACKED}
    waiting = [phase for phase in UNPACKED if not _is_there(work, phase, parts[phase])]
    drawn, scenes = work.result("scenes").facts, card["phases"]["scenes"]
    known = as_learnt(scenes["settings"])
    asked = {name: known[name] for name in settings_of(ScratchSettings(), "scenes")}
    are_same = as_learnt(drawn["settings"]) == known and drawn["figures"] == scenes["figures"]
    if not are_same and not other_scenes:
        typed = " ".join(f"--set {name}={value}" for name, value in asked.items())
        raise usage_error(
            f"{work.of('scenes')}: are other scenes; run python -m src.scratch scenes {typed} --work {work.folder}, or let the "
            "model go on with these: --other-scenes"
        )
    for phase in waiting:
        learnt = card["phases"][phase]
        facts = {"settings": learnt["settings"], "inputs": work.inputs(phase), "figures": learnt["figures"]}
        before = learnt.get(SCENES_BEFORE, None if are_same else asked)  # a part that never learnt from the model's scenes
        facts |= {SCENES_BEFORE: before} if before else {}
        CheckpointFolder(work.of(phase), work.say).publish("final", parts[phase], facts)


def _is_there(work: Work, phase: str, contents: dict[str, bytes]) -> bool:
    """Whether it was unpacked before. Raises UserError (usage) where something else was learnt."""
    if not work.of(phase).exists():
        return False
    if (work.of(phase) / "final").exists():
        there = work.result(phase)
        if {name: there.read(name) for name in there.files} == contents:
            return True
    raise usage_error(
        f"{work.of(phase)}: is there already, of another model; choose a --work folder that has no more than scenes"
    )


def _not_ours(out: Path) -> str | None:
    """Why what lies there may not be replaced: it was not made here, or something was added. None if it may."""
    try:
        known = set(json.loads((out / CARD).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "was not made by this command"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    return f"holds {min(found - known)!a}, which this command did not write" if found - known else None

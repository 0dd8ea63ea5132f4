"""What an assembled model holds and says of itself: recipe and figures of every phase, for programs and for people."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.errors import not_found, refused, usage_error
from src.scenes import grammar
from src.scratch.phases import Work, settings_of
from src.scratch.settings import ADDED, ScratchSettings, UnetSettings
from src.scratch.tokenizer import TOKENIZER_FILES

CARD, PAGE, SAMPLES = "card.json", "README.md", "samples.png"
SKILL = "adherence, "  # how the figures of the last examination are called
BEGAN_FROM = "began_from.json"  # beside a U-Net that went on learning: what the model before says of its own
SCENES_BEFORE = "scenes_before"  # settings of the scenes that a phase learnt from, where the model's are others now
PARTS = {"unet": "unet", "vae": "vae", "tokenizer": "tokenizer", "clip": "clip"}  # folder: phase
LAYERS = "transformer_layers"  # may be more than the model's: `src.scratch.unet.deepened`
BUILD = ("channels", "layers", "attention_levels", "head_width")  # settings that a U-Net's weights depend on


def read_card(model: Path) -> dict[str, Any]:
    """What `assemble` said of a model, whose files are all there. Raises UserError: not found, or refused."""
    try:
        card = json.loads((model / CARD).read_bytes())
        for phase in ("scenes", *PARTS.values()):
            card["phases"][phase]["settings"].items(), card["phases"][phase]["figures"].items()
        int(card["phases"]["unet"]["figures"]["samples"]), card["command"]
        [(model / name) for name in card["files"]]
    except FileNotFoundError:
        raise not_found(f"{model / CARD}: is not there; a model that python -m src.scratch assembled has one") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(f"{model / CARD}: does not say all that is needed ({error}); assemble the model again") from None
    if missing := [name for name in card["files"] if not (model / name).is_file()]:
        raise not_found(f"{model / missing[0]}: is not there, but its card names it; assemble the model again")
    return card


def files_of(model: Path, card: dict[str, Any], phase: str) -> dict[str, bytes]:
    """What a phase had published, from the folder that it was assembled into."""
    names = {name: _name_in(phase, name) for name in card["files"]}
    return {own: (model / name).read_bytes() for name, own in names.items() if own is not None}


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


def check_begin(model: Path, settings: UnetSettings, work: Work) -> dict[str, Any]:
    """The card of a model whose U-Net shall go on learning with these settings and what ``work`` holds.

    Raises UserError: not found or refused as `read_card`, usage for a U-Net of another build, or learnt with other parts.
    """
    card = read_card(model)
    learnt, asked = card["phases"]["unet"]["settings"], settings_of(ScratchSettings(unet=settings), "unet")
    differing = [f"{name}={_typed(learnt.get(name))}" for name in BUILD if learnt.get(name) != asked[name]]
    differing += [f"{LAYERS}={layers}"] if (layers := learnt.get(LAYERS, 1)) > asked[LAYERS] else []
    if differing:
        typed = " ".join(f"--set unet.{setting}" for setting in differing)
        raise usage_error(f"{model}: its U-Net is of another build; go on with {typed}")
    for phase in ("tokenizer", "vae", "clip"):
        if not (work.of(phase) / "final").exists():
            raise usage_error(
                f"{work.folder}: has no {phase}, and the U-Net of {model} goes on with that model's; "
                f"run python -m src.scratch unpack --model {model} --work {work.folder}"
            )
        learnt_with, here = files_of(model, card, phase), work.result(phase)
        if any(name not in here.files or here.read(name) != data for name, data in learnt_with.items()):
            raise usage_error(
                f"{model}: its U-Net was learnt with another {phase} than {work.of(phase)}; unpack it into a new --work folder"
            )
    return card


def _typed(value: Any) -> str:
    """A setting as it is typed after ``--set``."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def make_card(work: Work, inputs: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Recipe and figures of every phase, versions, and the names of all files."""
    results = {phase: work.result(phase) for phase in inputs}
    usual = {phase: settings_of(ScratchSettings(), phase) for phase in results}
    changed = [  # whose folder a model lay in is nobody's business
        f"--set {phase}.{name}={f'models/{Path(value).name}' if name == 'begin_from' else _typed(value)}"
        for phase, one in results.items()
        for name, value in _with_added(one.facts["settings"], usual[phase]).items()
        if value != usual[phase][name]
    ]
    told = ("settings", "figures", SCENES_BEFORE)
    phases = {phase: {part: dict(one.facts[part]) for part in told if part in one.facts} for phase, one in results.items()}
    if begun := phases["unet"]["settings"].get("begin_from"):
        phases["unet"]["settings"]["begin_from"] = Path(begun).name
    unet = results["unet"]
    before = {"began_from": json.loads(unet.read(BEGAN_FROM))} if BEGAN_FROM in unet.files else {}
    return {
        "name": "a small Stable Diffusion, from nothing", "license": "MIT",
        "command": " ".join([f"python -m src.scratch {'unet' if begun else 'all'}", *changed]), "files": sorted(names),
        "phases": phases, **before,
        "made_with": {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"machine": platform.machine()},
    }  # fmt: skip


def _with_added(settings: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """A phase's settings, with what they meant before a setting was there."""
    return settings | {name: value for name, value in ADDED.items() if name in usual and name not in settings}


def page_of(card: dict[str, Any]) -> str:
    """The card for people, in the form of the hub's model cards."""
    part = card["phases"]["scenes"]["settings"].get("grammar", "full")
    lines = [
        "---", "license: mit", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "", f"# {card['name']}", "",
        "Trained from random weights, on pictures that the project draws itself (128 x 128 px). An ordinary Stable Diffusion",
        "folder, with its CLIP. What it understands, with 8 shapes and 12 colours:", "",
        "```text", *(line.strip() for line in (grammar.__doc__ or "").splitlines() if line.startswith("    ")), "```", "",
        *_words(), "",
        *([f"It was taught a part of this, the {part} grammar: {grammar.PARTS_SAY[part]}.", ""] if part != "full" else []),
        f"![pictures and their prompts]({SAMPLES})", "", *_made_by(card), "`card.json` has every setting.", "",
        "| phase | figures |", "| --- | --- |",
    ]  # fmt: skip
    for phase, one in card["phases"].items():
        numbers = {name: value for name, value in one["figures"].items() if isinstance(value, (int, float))}
        told = [f"{name} {_shown(value)}" for name, value in numbers.items() if not name.startswith(SKILL)]
        lines.append(f"| {phase} | {', '.join(told)} |")
    lines += ["", f"The share of {card['phases']['unet']['settings'].get('examined')} pictures that follow their prompts:", ""]
    lines += ["| skill | right |", "| --- | ---: |"]
    skills = card["phases"]["unet"]["figures"].items()
    lines += [f"| {name.removeprefix(SKILL)} | {value:.2f} |" for name, value in skills if name.startswith(SKILL)]
    return "\n".join(lines) + "\n"


def _words() -> list[str]:
    """What stands for the words in capitals."""
    pairs = [", ".join(f"{one} and {other}" for one, other in pairs) for pairs in (grammar.GRADIENTS, grammar.STRIPES)]
    return [
        f"* SHAPE: {', '.join(grammar.SHAPES)}",
        f"* COLOUR: {', '.join(grammar.COLOURS)}; of a house {', '.join(grammar.HOUSES)}; of hills {', '.join(grammar.HILLS)}",
        f"* BACKGROUND: `white background`; also {', '.join(grammar.PLAIN[1:])}",
        f"* BACKGROUND: `blue to white gradient background`; either way of {pairs[0]}",
        f"* BACKGROUND: `red and white striped background`, or `dotted`; either way of {pairs[1]}",
    ]


def _shown(value: float) -> str:
    """Counts in full, shares and measures to four digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4g}"


def _made_by(card: dict[str, Any]) -> list[str]:
    """The commands, the first one first. A note says where a command was not followed to the letter; a person writes it."""
    cards = [card]
    while "began_from" in cards[0]:
        cards.insert(0, cards[0]["began_from"])
    begins = ["Made", *["its U-Net went on"] * (len(cards) - 1)]
    notes = [f" ({one['note'].rstrip('.')})" if "note" in one else "" for one in cards]
    made = [f"{begin} by `{one['command']}`{note};" for begin, one, note in zip(begins, cards, notes)]
    parts: dict[str, list[str]] = {}
    for phase, one in card["phases"].items():
        if SCENES_BEFORE in one:
            parts.setdefault(", ".join(f"{name} {value}" for name, value in one[SCENES_BEFORE].items()), []).append(phase)
    return made + [f"{', '.join(phases)} learnt from other scenes ({drawn});" for drawn, phases in parts.items()]

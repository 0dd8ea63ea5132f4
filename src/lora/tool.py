"""Files of adapters made out of files of adapters: converted, merged, resized. The arithmetic stands in arithmetic.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from src import files
from src.errors import UserError, refused, usage_error
from src.lora.arithmetic import added, norm, resized, total_kept
from src.lora.formats import LoraLayer, Where
from src.lora.headers import ZERO_TERMINAL_SNR, AdapterFacts, facts_in
from src.lora.names import canonical
from src.lora.reading import Adapter, known_files, parse_adapter, read_adapter
from src.lora.writing import DIFFUSERS_FILE, adapter_files
from src.request import LoraChoice

FAMILIES = ("SD1", "SD2", "SDXL")
_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a new adapter is to be saved. ``None``: as the first of those that it is made of."""

    output: Path
    form: str | None = None  # diffusers | peft | kohya
    precision: str | None = None  # fp32 | fp16 | bf16
    family: str | None = None  # where the file does not tell
    name: str | None = None
    force: bool = False  # replace what is there


def convert(path: Path, wanted: Wanted) -> list[str]:
    """Save the adapter in another form; returns what to tell. Raises UserError, with nothing written."""
    adapter = read_adapter(path)
    return _save(adapter.layers, _facts(adapter, wanted), adapter, wanted)


def merge(choices: Sequence[LoraChoice], rank: int | None, wanted: Wanted) -> list[str]:
    """Save the weighted sum of adapters as one; exact, or the best one of ``rank``. Raises UserError, with nothing written."""
    adapters = [read_adapter(choice.path) for choice in choices]
    facts = [_facts(adapter, wanted) for adapter in adapters]
    families = {item.family for item in facts}
    if len(families) > 1:
        listed = ", ".join(f"{adapter.name} {item.family}" for adapter, item in zip(adapters, facts))
        raise refused(f"adapters of different families cannot be merged ({listed}); take those of one family")
    layers = added([(adapter.name, adapter.layers, choice.weight) for adapter, choice in zip(adapters, choices)])
    lines = []
    if rank is not None:
        layers, kept = resized("the sum", layers, rank)
        lines = _energy_lines(layers, kept, rank)
    triggers = dict.fromkeys(item.trigger for item in facts if item.trigger)
    extra = {"modelspec.merged_from": ", ".join(f"{item.name}:{choice.weight:g}" for item, choice in zip(facts, choices))}
    if any(adapter.has_zero_terminal_snr for adapter in adapters):
        extra[ZERO_TERMINAL_SNR] = "True"
    merged = replace(
        facts[0], name=wanted.name or "+".join(item.name for item in facts), trigger=", ".join(triggers) or None, steps=None,
        extra=extra,
    )  # fmt: skip
    return lines + _save(layers, merged, adapters[0], wanted)


def resize(path: Path, rank: int, wanted: Wanted) -> list[str]:
    """Save the best adapter of at most ``rank``; returns how much was kept. Raises UserError, with nothing written."""
    adapter = read_adapter(path)
    layers, kept = resized(adapter.name, adapter.layers, rank)
    return _energy_lines(adapter.layers, kept, rank) + _save(layers, _facts(adapter, wanted), adapter, wanted)


def block_norms(path: Path) -> dict[str, tuple[int, float]]:
    """The layers of each block and the Frobenius norm of all that they add: ``{"unet down_blocks.0": (8, 0.53)}``."""
    squares: dict[str, list[float]] = {}
    for (component, module), layer in read_adapter(path).layers.items():
        block = ".".join(canonical(component, module).removeprefix("text_model.").split(".")[: 3 if component != "unet" else 2])
        squares.setdefault(f"{component} {block}", []).append(norm(layer) ** 2)
    return {block: (len(values), sum(values) ** 0.5) for block, values in sorted(squares.items())}


def _facts(adapter: Adapter, wanted: Wanted) -> AdapterFacts:
    family = adapter.family or wanted.family
    if family is None:
        raise usage_error(f"{adapter.path}: does not tell which family it is for; say --family SD1, SD2 or SDXL")
    if family not in FAMILIES or wanted.family not in (None, family):
        raise refused(f"{adapter.path}: is for {family}, not {wanted.family or 'SD1, SD2 or SDXL'}; nothing is written")
    facts = facts_in(adapter.metadata, family, adapter.name)
    return replace(facts, name=wanted.name) if wanted.name else facts


def _energy_lines(layers: Mapping[Where, LoraLayer], kept: Mapping[Where, float], rank: int) -> list[str]:
    (component, module), worst = min(kept.items(), key=lambda item: item[1])
    cut = sum(share < 1 for share in kept.values())
    if not cut:
        return [f"rank {rank} cuts nothing: no layer has more"]
    return [
        f"rank {rank} keeps {total_kept(layers, kept):.2%} of the energy in all; {cut} of {len(kept)} layers were cut, "
        f"most of all {component} {canonical(component, module)} ({worst:.2%} kept)"
    ]


def _save(layers: Mapping[Where, LoraLayer], facts: AdapterFacts, first: Adapter, wanted: Wanted) -> list[str]:
    """Write one form under ``wanted.output``, read back before and never over another file unless forced."""
    form = wanted.form or first.format
    dtype = _PRECISIONS[wanted.precision] if wanted.precision else next(iter(first.layers.values())).down.dtype
    contents = adapter_files(layers, facts, [form], dtype)
    read = parse_adapter(contents)[form]
    if {(component, canonical(component, module)) for component, module in read} != {(c, canonical(c, m)) for c, m in layers}:
        raise UserError(f"{wanted.output}: not written: reading it back gives other layers; please report this")
    targets = _targets(contents, form, wanted.output)
    others = [file for file in known_files(wanted.output) if file not in targets]  # the folder would mean them, too, or only
    taken = [*filter(Path.exists, targets), *others]
    if taken and not wanted.force:
        raise usage_error(f"{taken[0]}: is there already; --force replaces it, --output names another place")
    for target, data in targets.items():
        files.check_writable_folder(target.parent)
        files.publish_bytes(target, data)
    files.delete_files(others)
    ranks = sorted({layer.rank for layer in layers.values()})
    size = sum(map(len, targets.values()))
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    notes = []
    if form == "kohya" and any(layer.magnitude is not None and layer.magnitude.ndim == 1 for layer in layers.values()):
        notes = ["note: A1111 computes such a DoRA otherwise, and ComfyUI only nearly the same; a plain LoRA is safe in both"]
    return [*notes, f"{wanted.output}  {form}, {facts.family}, rank {span}, {len(layers)} layers, {size / 1e6:.1f} MB"]


def _targets(contents: Mapping[str, bytes], form: str, output: Path) -> dict[Path, bytes]:
    """``output`` is a .safetensors file or a folder; PEFT's form is always a folder."""
    if output.suffix != ".safetensors":
        return {output / name: data for name, data in contents.items()}
    if form == "peft":
        raise usage_error(f"--output {output}: PEFT's form is a folder for each component; name a folder")
    [data] = contents.values()
    if form == "kohya" and output.name == DIFFUSERS_FILE:
        raise usage_error(f"--output {output}: that name belongs to diffusers' form; choose another")
    return {output: data}

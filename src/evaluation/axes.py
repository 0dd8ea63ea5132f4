"""The axes of a sheet: ``steps=10,20,30`` as what is put over the flags that were typed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from src.config import GenerationConfig, full_name, setting_names
from src.errors import usage_error
from src.jobs import read_job_lines
from src.recipe import public_name
from src.request import RANDOM_SEED, LoraChoice

MAX_VALUES = 100  # of an axis
NO_LORA = "none"
_SPECIAL = {
    "negative": "generation.negative_prompt",
    "lora_scale": "lora",
    **{name: name for name in ("prompt", "model", "lora")},
}
_IDLE = {"num_images": "a cell holds one picture", "batch_size": "pictures are the same at any"}
_TEXTS = {"prompt", "generation.negative_prompt", "model", "lora", "generation.scheduler"}  # "1984-1999" is no range
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: what it is called, the flag or setting that it varies, and its values as they were typed."""

    name: str
    target: str  # "prompt", "model", "lora", or a setting such as "generation.guidance_scale"
    values: tuple[str, ...]

    @property
    def is_costly(self) -> int:
        """How dear a change is: 2 loads a model, 1 exchanges adapters, 0 is free."""
        return 2 if self.target.startswith("model") else 1 if self.target == "lora" else 0

    def over(self, typed: dict[str, Any], index: int) -> dict[str, Any]:
        """What was typed, with the value at ``index`` in its place. Raises UserError (usage)."""
        value = self.values[index]
        if self.name == "lora":
            return {**typed, "lora": [] if value == NO_LORA else [*typed.get("lora", []), value]}
        if self.name == "lora_scale":
            return {**typed, "lora": [_reweighed(text, value) for text in typed.get("lora", [])]}
        return {**typed, self.target: value}

    def label(self, index: int) -> str:
        """What stands beside the row, or above the column."""
        value = self.values[index]
        if self.target in ("prompt", "generation.scheduler", "generation.negative_prompt"):
            return value
        if self.name == "lora":
            return "no LoRA" if value == NO_LORA else lora_label(value)
        if self.target.startswith("model"):
            return public_name(value)
        return f"{self.name.replace('_', ' ')} {value}"


def parse_axis(flag: str, text: str) -> Axis:
    """Read ``NAME=VALUE,VALUE``: values that hold a comma, and prompts always, are separated by ``|``.

    ``seed=1-4`` is four whole numbers, ``prompt=@FILE`` a prompt a line. Raises UserError (usage, not found).
    """
    name, equals, rest = text.partition("=")
    name = name.strip().lower().replace("-", "_")
    if not equals or not rest.strip():
        raise usage_error(f"{flag} {text}: write it as NAME=VALUE,VALUE, e.g. {flag} steps=10,20,30")
    target = _target(flag, name)
    values = [part.strip() for part in _split(name, rest)]
    if "" in values:
        raise usage_error(f"{flag} {text[:60]}: a value is empty; separate values by a single {'|' if '|' in rest else ','}")
    if (match := _RANGE.fullmatch(rest.strip())) and target not in _TEXTS:
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < MAX_VALUES:
            raise usage_error(f"{flag} {text}: a range goes up, by at most {MAX_VALUES} numbers")
        values = [str(number) for number in range(first, last + 1)]
    if target == "generation.seed" and str(RANDOM_SEED) in values:
        raise usage_error(f"{flag} {name}: {RANDOM_SEED} would be another one in each cell; name them, e.g. {flag} seed=1-4")
    if len(values) > MAX_VALUES:
        raise usage_error(f"{flag}: {len(values)} values are more than a sheet shows; give at most {MAX_VALUES}")
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise usage_error(f"{flag} {name}: '{twice[:60]}' stands there twice; take one out")
    return Axis(name, target, tuple(values))


def check_axes(axes: list[Axis], typed: Mapping[str, Any]) -> None:
    """Refuse axes that vary the same thing, and flags or axes without effect. Raises UserError (usage)."""
    names = [axis.name for axis in axes]
    if len({axis.target for axis in axes}) < len(axes) and set(names) != {"lora", "lora_scale"}:
        raise usage_error(f"--x and --y both vary {names[0]}; give each something of its own")
    if "lora_scale" in names and "lora" not in names and not typed.get("lora"):
        raise usage_error("lora_scale has nothing to weigh; add --lora PATH, or make lora the other axis")
    for axis in axes:
        if axis.target in typed and axis.target != "lora":  # adapters of the flag stay beside those of the axis
            raise usage_error(f"{axis.name} is an axis and a flag; leave the flag out")


def lora_label(text: str, has_weight: bool = True) -> str:
    """ "dog 0.8" of ``models/lora/dog.safetensors:0.8``; the weight only where it is not 1."""
    choice = LoraChoice.parse(text)
    name = choice.path.stem if choice.path.suffix == ".safetensors" else choice.path.name
    return name if choice.weight == 1 or not has_weight else f"{name} {choice.weight:g}"


def _target(flag: str, name: str) -> str:
    if name in _SPECIAL:
        return _SPECIAL[name]
    key = name.removeprefix("generation.")
    if key in _IDLE:
        raise usage_error(f"{flag} {name}: is no axis: {_IDLE[key]}; vary the seed")
    known = setting_names()
    target = next((item for item in (full_name(f"generation.{key}"), f"model.{key}", name) if item in known), None)
    if target is not None and target.startswith(("generation.", "model.")):
        return target
    names = [*_SPECIAL, "steps", "guidance", *(item.name for item in fields(GenerationConfig) if item.name not in _IDLE)]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose {', '.join(names)}"
    raise usage_error(f"{flag} {name}: is no axis; {hint}")


def _split(name: str, text: str) -> list[str]:
    if name in ("prompt", "negative") and text.strip().startswith("@"):
        import sys

        return [line.text for line in read_job_lines(text.strip()[1:], sys.stdin)]
    if name in ("prompt", "negative") or "|" in text:
        return _outside_braces(text)
    return text.split(",")


def _outside_braces(text: str) -> list[str]:
    """Split at ``|``, but not within the ``{a|b}`` of a wildcard."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "{") - (sign == "}" and depth > 0)
        if sign == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _reweighed(text: str, weight: str) -> str:
    return f"{LoraChoice.parse(text).path}:{weight}"

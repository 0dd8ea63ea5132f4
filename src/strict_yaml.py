"""YAML without its traps: no tags, no anchors, no duplicate keys; ``1e-4`` is a number and ``no`` is a word.

PyYAML's SafeLoader runs no code, but it reads YAML 1.1: ``1e-4`` becomes text, ``0123`` octal, ``12:30`` sexagesimal,
``no`` False, and the later of two equal keys wins silently. Here the scalars are those of YAML 1.2's core schema.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from src.errors import not_found, usage_error

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses anchors, foreign tags, deep nesting and duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # none inherited: YAML 1.1's guesses are the trap
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read here", problem_mark=event.start_mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a name cannot be a list or a table; put a text that begins with a bracket or brace in quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_int(loader: Any, node: Any) -> int:
    try:
        return int(node.value)
    except ValueError:  # Python reads 4300 digits at most
        raise yaml.MarkedYAMLError(problem="thousands of digits are no number here", problem_mark=node.start_mark) from None


def _construct_float(loader: Any, node: Any) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
for _tag, _pattern in {
    "null": r"^(?:~|null|Null|NULL|)$",
    "bool": r"^(?:true|True|TRUE|false|False|FALSE)$",
    "int": r"^[-+]?[0-9]+$",
    "float": r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
}.items():
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of at most 1 MiB. Raises UserError naming file, line and column."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise not_found(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_FILE_BYTES:
        raise usage_error(f"{path}: {len(data):,} bytes is no configuration file (limit {MAX_FILE_BYTES:,})")
    try:
        return _parse(data.decode("utf-8-sig"), str(path)) or {}
    except UnicodeDecodeError as error:
        raise usage_error(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def parse_scalar(text: str) -> Any:
    """Read one value as typed after ``--set``: ``30``, ``1e-4``, ``true``, ``null`` or plain text."""
    return _parse(text, "--set") if text.strip() else ""


def _parse(text: str, source: str) -> Any:
    try:
        return _StrictLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise usage_error(f"{source}{place}: {problem}") from None

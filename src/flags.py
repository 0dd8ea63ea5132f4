"""Command lines as tables: one row a flag, the parser made of them, and errors that say what would work.

A flag has no default: the dataclass that it fills has it, and the help text reads it from there. ``--cfg-scale`` and
``--cfg_scale`` are the same flag.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from src.errors import usage_error

_LOOKS_LIKE_A_FLAG = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its spellings, the setting that it fills (or None), its type (None: a switch), and its help."""

    names: tuple[str, ...]
    help: str
    setting: str | None = None
    kind: type | None = str
    metavar: str | None = None
    value: Any = True  # what a switch sets
    repeat: bool = False
    in_jobs: bool = False  # may stand in a line of a job file
    choices: Sequence[str] | None = None

    @property
    def dest(self) -> str:
        return self.setting or self.names[0].lstrip("-").replace("-", "_")

    @property
    def takes_value(self) -> bool:
        return self.kind is not None


def switch(name: str, help: str, setting: str | None = None, value: bool = True, in_jobs: bool = False) -> Flag:
    """A flag without a value."""
    return Flag((name,), help, setting, None, value=value, in_jobs=in_jobs)


class CommandLine:
    """The flags of one door, in groups with titles."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[Flag]],
        *,
        prog: str,
        usage: str,
        description: str,
        epilog: str = "",
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        words: str | None = None,
        elsewhere: Mapping[str, Flag] | None = None,
        default_note: Callable[[Flag], str] = lambda flag: "",
    ) -> None:
        """``defaults`` are ``{section: {key: value}}`` for the help. ``words`` names what may stand before the flags.

        ``elsewhere`` are flags that are known, and not allowed here. ``default_note`` follows a default in the help.
        """
        self._flags = {name: flag for flags in groups.values() for flag in flags for name in flag.names}
        self._elsewhere = elsewhere or {}
        self._parser = _Parser(
            prog=prog, usage=usage, epilog=epilog, description=description, add_help=False, allow_abbrev=False,
            argument_default=argparse.SUPPRESS, formatter_class=_HelpFormatter,
        )  # fmt: skip
        self._parser.explain = self._explain
        if words is not None:
            self._parser.add_argument("words", nargs="?", metavar=words, default=None, help=argparse.SUPPRESS)
        for title, flags in groups.items():
            group = self._parser.add_argument_group(title)
            for flag in flags:
                add_flag(group, flag, defaults or {}, default_note)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """What was typed, and only that: ``{"generation.width": 768, "lora": [...], "words": ...}``. Raises UserError."""
        known = {**self._elsewhere, **self._flags}
        typed = vars(self._parser.parse_args(normalised(argv, {name: flag.takes_value for name, flag in known.items()})))
        if typed.get("words", "") is None:
            del typed["words"]
        return typed

    def help_text(self) -> str:
        """What ``--help`` prints."""
        return self._parser.format_help()

    def _explain(self, message: str) -> NoReturn:
        """Raise our one-line error in place of argparse's usage dump."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0]
            if flag.partition("=")[0] in self._elsewhere:
                raise usage_error(f"{flag} cannot differ from job to job; give it on the command line")
            close = difflib.get_close_matches(flag.partition("=")[0], self._flags, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            quotes = " (several words need quotes, and a flag takes one value)" if not flag.startswith("-") else ""
            raise usage_error(f"unknown argument '{flag}'{quotes}; {hint}")
        if found := re.match(r"argument ([^/:\s]+)[^:]*: (expected one|ignored explicit) argument", message):
            flag = self._flags[found[1]]
            if found[2].startswith("ignored"):
                raise usage_error(f"{flag.names[0]} takes no value; write {flag.names[0]} alone")
            raise usage_error(f"{flag.names[0]}: its value is missing; write {flag.names[0]} {flag.metavar}")
        raise usage_error(f"{message}; see --help")


def normalised(argv: Sequence[str], takes_value: Mapping[str, bool]) -> list[str]:
    """``--cfg_scale=7`` -> ``--cfg-scale=7``; a value that begins with "-" is tied to its flag: ``--negative=-blur``.

    ``takes_value`` has every known flag.
    """
    normal: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        is_flag = word == "--" or flag in takes_value or _LOOKS_LIKE_A_FLAG.fullmatch(word) is not None
        if normal and takes_value.get(normal[-1]) and word.startswith("-") and not is_flag:
            normal[-1] += f"={word}"
        else:
            normal.append(flag.replace("_", "-") + equals + value if is_flag else word)
    return normal


class _Parser(argparse.ArgumentParser):
    explain: Callable[[str], NoReturn]

    def error(self, message: str) -> NoReturn:
        self.explain(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def add_flag(
    group: argparse._ArgumentGroup,
    flag: Flag,
    defaults: Mapping[str, Mapping[str, Any]],
    note: Callable[[Flag], str] = lambda flag: "",
) -> None:
    """Add a flag to a group of a parser: parsed, it is of its type; not typed, it is not there. ``note`` follows a default."""
    text = flag.help.replace("%", "%%")
    if not flag.takes_value:
        options = {"action": "store_const", "const": flag.value}
        group.add_argument(*flag.names, dest=flag.dest, default=argparse.SUPPRESS, help=text, **options)
        return
    if flag.setting:
        section, _, key = flag.setting.partition(".")
        default = defaults[section][key]
        text += f" (default: {default}{note(flag)})" if default not in (None, "", ()) else ""
    action = "append" if flag.repeat else "store"
    options = {"metavar": flag.metavar, "action": action, "type": functools.partial(_convert, flag)}
    group.add_argument(*flag.names, dest=flag.dest, default=argparse.SUPPRESS, help=text, **options)


def _convert(flag: Flag, value: str) -> Any:
    """The text typed after a flag as the flag's type."""
    if flag.choices is not None and value not in flag.choices:
        *first, last = flag.choices
        known = " or ".join(filter(None, (", ".join(first), last)))
        raise usage_error(f"{flag.names[0]} {value}: choose {known}")
    if flag.kind not in (int, float):
        return value
    try:
        return flag.kind(value)
    except ValueError:
        wanted = "a whole number" if flag.kind is int else "a number"
        raise usage_error(f"{flag.names[0]} {value}: expected {wanted}") from None

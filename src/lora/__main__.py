"""The door of ``python -m src.lora``: adapters described, converted, merged and resized."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.doors import answer
from src.errors import ExitCode, usage_error
from src.flags import CommandLine, Flag, switch
from src.request import LoraChoice, user_path
from src.terminal import Terminal

USAGE = """python -m src.lora info ADAPTER [--norms] [--json]
       python -m src.lora convert ADAPTER --to FORM --output PATH
       python -m src.lora merge ADAPTER[:WEIGHT] ADAPTER[:WEIGHT] ... --output PATH [--rank N]
       python -m src.lora resize ADAPTER --rank N --output PATH"""

EPILOG = """ADAPTER is a .safetensors file of any form, or a folder of diffusers' or PEFT's.
forms: diffusers (plain diffusers, ComfyUI), peft (a folder for each component), kohya (A1111, Forge, ComfyUI)

examples:
  python -m src.lora info models/lora/final
  python -m src.lora convert models/lora/final --to kohya --output sks_dog.safetensors --precision fp16
  python -m src.lora merge dog.safetensors:0.8 style.safetensors:0.5 --output both.safetensors
  python -m src.lora resize big.safetensors --rank 8 --output small.safetensors"""

FORMS, PRECISIONS, FAMILIES = ("diffusers", "peft", "kohya"), ("fp32", "fp16", "bf16"), ("SD1", "SD2", "SDXL")
COMMANDS = ("info", "convert", "merge", "resize")

FLAGS: dict[str, tuple[Flag, ...]] = {
    "output": (
        Flag(("--output", "-o"), "file or folder to write", metavar="PATH"),
        Flag(("--to",), " | ".join(FORMS) + " (default, except for convert: as the first)", metavar="FORM", choices=FORMS),
        Flag(("--rank",), "resize, merge: cut each layer to this rank", kind=int, metavar="N"),
        Flag(("--precision",), " | ".join(PRECISIONS) + " (default: as the first)", metavar="NAME", choices=PRECISIONS),
        Flag(("--family",), " | ".join(FAMILIES) + ", where the file does not tell", metavar="NAME", choices=FAMILIES),
        Flag(("--name",), "of the adapter in its header", metavar="NAME"),
        switch("--force", "replace what is there"),
    ),
    "information": (
        switch("--norms", "info: how much each block changes"),
        switch("--json", "info: as JSON, the whole header included"),
        switch("--debug", "show the traceback of an error"),
        Flag(("--help", "-h"), "print this", kind=None),
    ),
}


def main(argv: Sequence[str]) -> int:
    """Do what was asked and return the exit code. Errors are one line; ``--debug`` adds the traceback."""
    return answer(argv, _run, "interrupted; nothing was written", as_json="--json" in argv)


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    line = CommandLine(
        FLAGS, prog="python -m src.lora", usage=USAGE, epilog=EPILOG,
        description="Describe, convert, merge and resize LoRA adapters of any common form.",
    )  # fmt: skip
    words, flags = _words_and_flags(argv)
    typed = line.parse(flags)
    if "help" in typed or not argv:
        print(line.help_text())
        return ExitCode.OK
    command, *names = words or [""]
    if command not in COMMANDS:
        raise usage_error(f"'{command}' is no command; the first word is {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}")
    if not names or (command != "merge" and len(names) > 1):
        raise usage_error(f"{command}: give {'adapters' if command == 'merge' else 'one adapter'}; see --help")
    if command == "info":
        _info(user_path(names[0]), typed, terminal)
    else:
        for text in _write(command, names, typed):
            print(text)
    return ExitCode.OK


def _words_and_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command and its adapters, which may be many, apart from the flags and their values."""
    take_values = {name for flags in FLAGS.values() for flag in flags if flag.takes_value for name in flag.names}
    words: list[str] = []
    flags: list[str] = []
    for before, word in zip(["", *argv], argv):
        (flags if word.startswith("-") or before in take_values else words).append(word)
    return words, flags


def _info(path: Path, typed: dict[str, Any], terminal: Terminal) -> None:
    from src.lora.listing import list_adapter

    listing = list_adapter(path)
    norms = {}
    if "norms" in typed:
        from src.lora.tool import block_norms  # the weights, so torch

        norms = block_norms(path)
    if terminal.as_json:
        more = {"norms": {block: value for block, (_, value) in norms.items()}} if norms else {}
        print(json.dumps(listing.as_json() | more))
        return
    for text in listing.lines():
        print(text)
    for block, (count, value) in norms.items():
        print(f"  {block:<34} {count:3} layers  {value:.4g}")


def _write(command: str, names: Sequence[str], typed: dict[str, Any]) -> list[str]:
    rank = typed.get("rank")
    if "output" not in typed:
        raise usage_error(f"{command}: --output is missing; say where the new adapter goes")
    if command == "convert" and "to" not in typed:
        raise usage_error(f"convert: --to is missing; choose {', '.join(FORMS)}")
    if rank is not None and (command == "convert" or not 1 <= rank <= 1024):
        raise usage_error(f"--rank {rank}: resize and merge take 1 to 1024, convert keeps the rank")
    if command == "resize" and rank is None:
        raise usage_error("resize: --rank is missing; say how many, e.g. --rank 8")

    from src import quiet

    quiet.silence_libraries()
    from src.lora import tool  # torch: seconds, paid only when all that was typed is right

    wanted = tool.Wanted(
        user_path(typed["output"]), typed.get("to"), typed.get("precision"), typed.get("family"), typed.get("name"),
        force="force" in typed,
    )  # fmt: skip
    if command == "merge":
        return tool.merge([LoraChoice.parse(name) for name in names], rank, wanted)
    path = user_path(names[0])
    return tool.convert(path, wanted) if command == "convert" else tool.resize(path, rank, wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

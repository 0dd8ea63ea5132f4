"""The door of ``python -m src.evaluate``: what is measured of a model's pictures, one verb at a time.

A verb is a module of src/evaluation with ``SUMMARY`` (a line for --help), ``add_arguments(parser)`` and
``run(options, say) -> int``; the module itself imports nothing heavy.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from src.doors import answer
from src.errors import ExitCode, usage_error
from src.flags import normalised
from src.terminal import Terminal
from src.version import VERSION

VERBS = {
    "adherence": "src.evaluation.adherence",
    "quality": "src.evaluation.quality",
    "subject": "src.evaluation.subject",
    "attention": "src.evaluation.attention",
    "grid": "src.evaluation.grid",
    "compare": "src.evaluation.compare",
}

PROG = "python -m src.evaluate"
EXIT_CODES = (
    "exit codes: 0 done, 1 failure, 2 wrong usage, 3 out of memory, 4 not found, 5 some pictures failed, 6 input refused, "
    "130 interrupted"
)
_INTERRUPTED = {  # what is left of an interrupted verb
    "adherence": "interrupted; the pictures drawn so far stay, and the same command goes on with them",
    **dict.fromkeys(
        ("subject", "attention", "grid", "compare"), "interrupted; the pictures drawn so far stay, without a result"
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run the verb and return its exit code. Errors are one line; ``--debug`` adds the traceback."""
    return answer(argv, _run, _INTERRUPTED.get(argv[0] if argv else "", "interrupted; nothing was written"))


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(_help_text())
        return ExitCode.OK
    if argv[0] == "--version":
        print(VERSION)
        return ExitCode.OK
    verb = argv[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        raise usage_error(f"'{verb}' is no verb; {f'did you mean {close[0]}?' if close else f'choose {_listed()}'}")
    module = importlib.import_module(VERBS[verb])
    parser = build_parser(verb, module)
    words = parser.normalised(argv[1:])
    parser.refuse_unknown(words)  # before argparse finds what is missing, which is perhaps the same flag
    options = parser.parse_args(words)
    if options.help:
        print(parser.format_help())
        return ExitCode.OK
    return module.run(options, terminal.say)


def build_parser(verb: str, module: ModuleType) -> _Parser:
    """The flags of a verb: those of every verb, then its own, which may say one of them anew."""
    parser = _Parser(
        prog=f"{PROG} {verb}", usage=f"{PROG} {verb} [options]", description=module.SUMMARY, epilog=EXIT_CODES,
        add_help=False, allow_abbrev=False, conflict_handler="resolve",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
    )  # fmt: skip
    every = parser.add_argument_group("every verb")
    every.add_argument(
        "--output", metavar="DIR", default=f"outputs/evaluation/{verb}",
        help="where result.json and report.html go (default: %(default)s)",
    )  # fmt: skip
    every.add_argument("--debug", action="store_true", help="show the traceback of an error")
    every.add_argument("--help", "-h", action=_Help, help="print this")
    module.add_arguments(parser)
    return parser


class _Help(argparse.Action):
    """Sets ``help``, and asks for nothing else: no flag is missing to someone who wants to know the flags."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: object) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, help=str(options.get("help")))

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            action.required = False


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, with the nearest flag."""

    def normalised(self, words: Sequence[str]) -> list[str]:
        """As every door reads them: dashes for underscores in flags, and ``--negative -blur`` is ``--negative=-blur``."""
        takes_value = {name: action.nargs != 0 for action in self._actions for name in action.option_strings}
        return normalised(words, takes_value)

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Raises UserError (usage) for a word that begins with -- and is no flag here."""
        known = [name for action in self._actions for name in action.option_strings]
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                close = difflib.get_close_matches(flag, known, n=1)
                self._refuse(flag, f"did you mean {close[0]}?" if close else f"see {self.prog} --help")

    def error(self, message: str) -> NoReturn:
        verb = self.prog.rpartition(" ")[2]
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            self._refuse(unknown.split()[0], f"see {self.prog} --help")
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            raise usage_error(f"{verb}: {missing} must be given; see {self.prog} --help")
        raise usage_error(f"{verb}: {message.removeprefix('argument ')}; see {self.prog} --help")

    def _refuse(self, word: str, hint: str) -> NoReturn:
        raise usage_error(f"{self.prog.rpartition(' ')[2]}: unknown argument '{word}'; {hint}")


def _help_text() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {importlib.import_module(name).SUMMARY}" for verb, name in VERBS.items()]
    return "\n".join(
        [
            f"usage: {PROG} VERB [options]",
            "",
            "Measure a model's pictures. Each verb writes result.json and one offline report.html into --output.",
            "",
            "verbs:",
            *lines,
            "",
            f"{PROG} VERB --help lists its options; --version prints {VERSION}",
            "",
            EXIT_CODES,
        ]
    )


def _listed() -> str:
    *first, last = VERBS
    return " or ".join(filter(None, (", ".join(first), last)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

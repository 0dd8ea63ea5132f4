"""What every door does: answer with an exit code, say an error in one line, and keep the traceback for ``--debug``."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence

from src import processes
from src.errors import ExitCode, UserError, explain_unexpected, is_out_of_memory
from src.terminal import Terminal


def answer(
    argv: Sequence[str], action: Callable[[Sequence[str], Terminal], int], on_interrupt: str, as_json: bool = False
) -> int:
    """Run ``action(argv, terminal)`` and return the exit code; ``on_interrupt`` is said after Ctrl-C."""
    terminal = Terminal(as_json=as_json)
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows, or LANG=C, has no character for every name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def start() -> int:
        terminal.processes = processes.from_environment()
        return action(argv, terminal)

    return guard(argv, terminal, start, on_interrupt)


def guard(argv: Sequence[str], terminal: Terminal, action: Callable[[], int], on_interrupt: str) -> int:
    """Run ``action()`` and return its exit code, or that of the error it ends with, which is said."""
    try:
        return action()
    except UserError as error:
        if "--debug" in argv:
            import traceback

            traceback.print_exception(error)
        terminal.error(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        terminal.each_speaks = False
        terminal.say(on_interrupt)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone, e.g. `| head`
        sys.stdout = None
        return ExitCode.FAILURE
    except Exception as error:
        if "--debug" in argv:
            raise
        if is_out_of_memory(error):  # where no smaller plan is at hand: while a model is loaded, or converted
            way_out = "close other programs, or use a smaller model, or --precision bf16 on a CPU"
            terminal.error(f"out of memory; {way_out}", ExitCode.OUT_OF_MEMORY)
            return ExitCode.OUT_OF_MEMORY
        terminal.error(_not_installed(error) or explain_unexpected(error), ExitCode.FAILURE)
        return ExitCode.FAILURE


def _not_installed(error: Exception) -> str | None:
    """What to do about a package that this Python does not have; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "src").partition(".")[0] == "src":
        return None
    way_out = "activate the environment (source .venv/bin/activate), or install with make demo"
    return f"the package {error.name} is not installed in this Python; {way_out}"

"""What the person at the terminal sees: one progress bar and one line per event on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from src.errors import ExitCode
from src.processes import Processes

FIRST_SPEAKS_S = 2.0  # what another process waits before it says a mistake that the first one has found, too


def shell_word(text: str) -> str:
    """``text`` as one word of a command to type: in single quotes if need be, on Windows in double ones, all that cmd knows."""
    if os.name != "nt":
        return shlex.quote(text)
    return text if re.fullmatch(r"[\w.:\\/+=-]+", text) else '"' + text.replace('"', '\\"') + '"'


class Terminal:
    """Writes for people or, with ``as_json``, for scripts: then stdout holds JSON lines alone.

    Of several ``processes`` the first speaks for all, until ``each_speaks``: then a line begins with who says it.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.processes = Processes()
        self.each_speaks = False
        self._bar: Any = None

    def say(self, line: str) -> None:
        """A line on stderr, above the progress bar if there is one."""
        if self.each_speaks and self.processes.are_several:
            self._write(f"process {self.processes.index}: {line}", sys.stderr)
        elif self.processes.is_first:
            self._write(line, sys.stderr)

    def picture(self, path: Path, facts: dict[str, Any]) -> None:
        """A finished picture: a line of JSON, or its path and what one wants to know of it."""
        if self.as_json:
            self._write(json.dumps({"file": str(path), **facts}), sys.stdout)
        else:
            size = f"{facts['width']}x{facts['height']}"
            self._write(f"{path}  seed {facts['seed']}  {size}  {facts['steps']} steps  {facts['time_s']:.1f} s", sys.stdout)

    def skipped(self, path: Path, line_number: int) -> None:
        """A picture of a job that an earlier run finished."""
        if self.as_json:
            self._write(json.dumps({"file": str(path), "line": line_number, "skipped": True}), sys.stdout)
        else:
            self.say(f"skipped {path} is finished (line {line_number}); --redo draws it again")

    def error(self, message: str, exit_code: ExitCode, line_number: int | None = None) -> None:
        """What could not be done, on stderr; in JSON also on stdout, so that no job goes without an answer."""
        if not self.processes.is_first and not self.each_speaks:
            time.sleep(FIRST_SPEAKS_S)  # it is most likely everybody's; then a launcher ends this process meanwhile
            self.each_speaks = True
        place = {} if line_number is None else {"line": line_number}
        if self.as_json:
            self._write(json.dumps({"error": message, "exit_code": int(exit_code), **place}), sys.stdout)
        self.say(f"error: {message}" if line_number is None else f"error: line {line_number}: {message}")

    def start_progress(self, steps: int) -> None:
        """Open the bar over all the steps of all the pictures; it stays silent where stderr is no terminal."""
        from tqdm import tqdm  # here, because --help must not pay for it

        self._bar = tqdm(
            total=steps, unit="it", file=sys.stderr, leave=False, dynamic_ncols=True,
            disable=None if self.processes.is_first else True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]",
        )  # fmt: skip

    def progress(self, steps_done: float, description: str) -> None:
        """Move the bar; ``steps_done`` counts the steps of all pictures so far."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description_str(description, refresh=False)
            self._bar.update(steps_done - self._bar.n)

    def end_progress(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str, stream: Any) -> None:
        """Print one line; control characters (a prompt may hold any) never reach the terminal."""
        line = "".join(char if char.isprintable() else " " for char in line)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        line = line.encode(encoding, "replace").decode(encoding)
        if self._bar is not None and not self._bar.disable:
            self._bar.clear()
        print(line, file=stream, flush=True)
        if self._bar is not None and not self._bar.disable:
            self._bar.refresh()


def counted(number: int, noun: str) -> str:
    """ "1 picture", "1,200 pictures"."""
    return f"{number:,} {noun}" + "s" * (number != 1)

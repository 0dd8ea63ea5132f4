"""Ctrl-C and SIGTERM: finish the step, save, leave. The handler sets a flag; the loop does the rest.

Saving inside a handler would start in the middle of anything, another save included. The second Ctrl-C is left to the
system, which ends the process at once, wherever it is, in a long backward pass too; the checkpoints survive any kill.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from src.errors import ExitCode

NOTICE = "\nfinishing this step, then saving; Ctrl-C again leaves at once, back to the last checkpoint\n"


class Interruption:
    """``with Interruption() as interruption:`` and ask ``interruption.requested`` after each step.

    A repeated SIGTERM changes nothing: `timeout` and cluster schedulers send it twice within a moment. A signal that was
    ignored before (nohup, a script's background job) stays ignored. Outside the main thread this does nothing.
    """

    def __init__(self, notice: str = NOTICE) -> None:
        self.requested: signal.Signals | None = None  # the first signal that came
        self._notice = notice.encode()
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C (or Windows' Ctrl-Break), 143 after SIGTERM, else 0."""
        if self.requested is None:
            return ExitCode.OK
        return ExitCode(128 + (signal.SIGTERM if self.requested == signal.SIGTERM else signal.SIGINT))

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in filter(None, (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGBREAK", None))):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: set by another language
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent decides what Ctrl-C means, and may end it
            if number == signal.SIGTERM:
                _leave(number)
            return
        if self.requested is None:
            self.requested = signal.Signals(number)
            if signal.SIGINT in self._before:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.write(2, self._notice)  # print may be what the signal has interrupted


def _leave(number: int) -> None:
    """End this process as the signal would have."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

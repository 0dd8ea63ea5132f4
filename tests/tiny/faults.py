"""The file system's faults, on purpose: full disks, kills, other users; for the tests of what writes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from src.errors import UserError

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


def in_child(action: Callable[[], object]) -> int:
    """Run ``action`` in a forked process; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_args, **_kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


def fail_from(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, code: int, once: bool = False) -> None:
    """Let ``os.<name>`` fail at its n-th call, and at all later ones unless ``once``."""
    real, count = getattr(os, name), 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth or (count > nth and not once):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


def assert_one_line(error: UserError, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert ";" in message  # the next step


@contextmanager
def seconds(limit: int) -> Iterator[None]:
    """End the test, rather than wait for ever."""

    def give_up(*_):
        pytest.fail(f"took more than {limit} s")  # no Exception, so that the code under test cannot catch it

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

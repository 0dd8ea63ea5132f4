"""The file system's faults, on purpose: full disks, kills, other users; for the tests of what writes."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from src.errors import UserError

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a disk is slow where thousands of folders are made."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


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


BOUNDARIES = ("open", "close", "write", "ftruncate", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")


def count_calls(nth: int, at_nth: Callable[[str, tuple], object], flush: bool = False) -> Callable[[], int]:
    """From now on, in this process: call ``at_nth`` before the n-th system call that may change the disk.

    ``flush=False`` leaves out real flushes, which a kill does not need and which are slow. Returns the count of calls so far.
    """
    count = 0

    def counted(name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == nth:
                at_nth(name, args)
            return None if name == "fsync" and not flush else real(*args, **kwargs)

        return call

    for name in BOUNDARIES:
        setattr(os, name, counted(name, getattr(os, name)))
    return lambda: count


def die_at(nth: int) -> None:
    """Let this process be killed before its n-th boundary, in the middle of it if that is a write."""
    real_write = os.write

    def die(name: str, args: tuple) -> None:
        if name == "write":
            real_write(args[0], args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    count_calls(nth, die)


def killed_at(nth: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that is killed at its n-th boundary; False if it got through."""
    status = in_child(lambda: (die_at(nth), action()))
    assert status in (0, -signal.SIGKILL), f"failed by itself at boundary {nth}"
    return status != 0


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

"""Signals, sent to real processes."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from src.errors import ExitCode
from src.training.interruption import Interruption
from tests.tiny.faults import POSIX, in_child, seconds

pytestmark = POSIX


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def send(number: int, stop: Interruption) -> None:
    os.kill(os.getpid(), number)
    wait_until(lambda: stop.requested)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_request(number, code, capfd):
    before = {item: signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)}
    with Interruption() as stop:
        assert stop.requested is None
        assert stop.exit_code == ExitCode.OK
        send(number, stop)
        assert stop.requested == number
        assert stop.exit_code == code
    assert stop.exit_code == code
    assert {item: signal.getsignal(item) for item in before} == before
    assert "Ctrl-C again leaves at once" in capfd.readouterr().err


def test_the_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interruption():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_next_ctrl_c_ends_at_once_also_in_the_middle_of_a_long_native_call(first):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Interruption(notice="") as stop:
            send(first, stop)
            os.write(write, b"x")
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # some ten minutes without a moment for Python
            os._exit(7)
    with seconds(20):
        assert os.read(read, 1) == b"x"
        time.sleep(0.05)
        os.kill(pid, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT  # a shell says 130
    os.close(read), os.close(write)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_repeated_sigterm_changes_nothing(first):
    def child() -> None:
        with Interruption(notice="") as stop:
            send(first, stop)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            os._exit(stop.exit_code)

    assert in_child(child) == 128 + first


def test_what_was_ignored_stays_ignored():
    def child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script does with a background job
        with Interruption(notice="") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            send(signal.SIGTERM, stop)
            assert stop.requested == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    assert in_child(child) == 0


def test_a_forked_worker_leaves_ctrl_c_to_its_parent_and_can_be_ended():
    def worker() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with Interruption() as stop:
        assert in_child(worker) == -signal.SIGTERM
        assert stop.requested is None


def test_outside_the_main_thread_nothing_is_touched():
    before, inside = signal.getsignal(signal.SIGINT), []

    def other() -> None:
        with Interruption() as stop:
            inside.append((signal.getsignal(signal.SIGINT), stop.requested, stop.exit_code))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert inside == [(before, None, ExitCode.OK)]


def test_an_unwritable_terminal_is_no_error():
    def child() -> None:
        os.close(2)
        with Interruption() as stop:
            send(signal.SIGINT, stop)

    assert in_child(child) == 0

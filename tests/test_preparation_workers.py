"""Many inputs on several processes: in order, bounded, and nobody is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.errors import ExitCode, UserError, usage_error
from src.preparation.workers import process_count, taking_turns, work

ROOT = Path(__file__).parent.parent


def double(state, number):
    time.sleep(0.01 if number % 3 == 0 else 0)
    return state + 2 * number, os.getpid()


def fail(state, number):
    if number == 3:
        raise usage_error("three is wrong")
    return number


def die(state, number):
    if number == 3:
        os._exit(9)
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes):
    results = list(work(double, 100, [(number,) for number in range(40)], processes))
    assert [value for value, _ in results] == [100 + 2 * number for number in range(40)]
    assert (os.getpid() in {pid for _, pid in results}) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_the_function_comes_back_as_it_is(processes):
    with pytest.raises(UserError, match="three is wrong") as caught:
        list(work(fail, None, [(number,) for number in range(20)], processes))
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_worker_that_is_killed_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="--workers 1") as caught:
        list(work(die, None, [(number,) for number in range(20)], 2))
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY


def test_only_a_few_results_wait():
    """Of a million inputs only what is in flight is held: the generator of inputs is not run to its end."""
    taken = []

    class Inputs:
        def __iter__(self):
            for number in range(1000):
                taken.append(number)
                yield (number,)

    results = work(double, 0, Inputs(), 2)
    next(results)
    assert len(taken) < 40
    results.close()


def in_turn(folder, number):
    with taking_turns(if_large=True):
        Path(folder, "here").touch(exist_ok=False)  # fails if another is here
        time.sleep(0.02)
        Path(folder, "here").unlink()
    return os.getpid()


def test_large_ones_take_turns(tmp_path):
    assert len(set(work(in_turn, tmp_path, [(number,) for number in range(30)], 2))) == 2
    assert len(set(work(in_turn, tmp_path, [(number,) for number in range(3)], 1))) == 1


def test_as_many_processes_as_make_sense():
    assert process_count(None, 1) == 1
    assert process_count(None, 1000) <= 4
    assert process_count(7, 1000) == 7
    assert process_count(7, 8) == 2


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    code = (
        "import os, time\nfrom src.preparation.workers import work\n"
        "from tests.test_preparation_workers import note_and_wait\n"
        f"list(work(note_and_wait, {str(tmp_path)!r}, [(n,) for n in range(8)], 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__':\n    exec({code!r})"], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    assert workers
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def note_and_wait(folder, number):
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False

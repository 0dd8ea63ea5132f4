"""Trainings that are killed again and again, and end bit-equal to one that never was; signals; a second trainer.

The ordinary suite kills 60 times; `make torture` (TORTURE=1) 500 times, and once at every boundary.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator

import pytest

from src.checkpoints import CheckpointFolder
from src.errors import ExitCode
from src.training import loop
from tests.tiny.faults import POSIX, count_calls, die_at, memory_folder
from tests.tiny.forked_training import ForkedTraining

TORTURE = bool(os.environ.get("TORTURE"))
KILLS = 500 if TORTURE else 60
STEPS = 8
SETTINGS = ("--max_steps", str(STEPS), "--checkpoint_steps", "2", "--keep", "2")
RESUME = ("--resume", "--max_steps", str(STEPS))
pytestmark = POSIX


@pytest.fixture(scope="module")
def tiny() -> Iterator[ForkedTraining]:
    with memory_folder() as folder:
        tiny = ForkedTraining(folder)
        tiny.prepare(*SETTINGS)
        yield tiny


class Reference:
    """A training that nothing disturbed, and how long it takes."""

    def __init__(self, tiny: ForkedTraining) -> None:
        before = os.times()
        assert tiny.run(*SETTINGS) == ExitCode.OK, tiny.log()
        after = os.times()
        self.cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        self.result, self.names = tiny.result(STEPS), tiny.names()
        read, write = os.pipe()
        tiny.clear()

        def counting() -> None:
            counted = count_calls(0, lambda name, args: None)
            loop_exit = os._exit
            os._exit = lambda code: (os.write(write, b"%d" % counted()), loop_exit(code))

        assert tiny.run(*SETTINGS, before=counting) == ExitCode.OK, tiny.log()
        self.boundaries = int(os.read(read, 20))
        os.close(read), os.close(write)
        print(f"{self.boundaries} boundaries, {self.cpu_s:.2f} s of CPU")


@pytest.fixture(scope="module")
def reference(tiny) -> Reference:
    return Reference(tiny)


def kill_after(cpu_s: float) -> None:
    """The system ends the process after so much computing: at a random place, however busy the machine is."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def newest_valid(tiny: ForkedTraining) -> int:
    """The newest step (0: none). Nothing is torn, whatever happened: a damaged checkpoint would be said, and fail."""

    def fail(line: str) -> None:
        raise AssertionError(line)

    valid = tiny.store(fail).valid()
    return valid[-1].step if valid else 0


class Victim:
    """One training that is resumed until it is through."""

    def __init__(self, tiny: ForkedTraining, reference: Reference) -> None:
        self.tiny, self.reference, self.kills, self.newest = tiny, reference, 0, 0
        tiny.clear()

    def start(self, kill) -> bool:
        """Start or resume, and be killed; True when the training got through before."""
        arguments = RESUME if self.newest else SETTINGS
        self.tiny.log()
        status = self.tiny.run(*arguments, before=kill)
        if status == ExitCode.USAGE and f"all {STEPS} steps are done" in self.tiny.log():
            status = ExitCode.OK  # the kill before came between the last name and the end of the process
        assert status in (ExitCode.OK, -signal.SIGKILL, -signal.SIGPROF), self.tiny.log()
        now = newest_valid(self.tiny)
        assert now >= self.newest, "a checkpoint is lost"
        self.newest = now
        if status == ExitCode.OK:
            assert self.tiny.result(STEPS) == self.reference.result
            assert self.tiny.names() == self.reference.names
        else:
            self.kills += 1
        return status == ExitCode.OK


def test_random_kills(tiny, reference):
    draw = random.Random(0)
    kills = finished = 0
    while kills < KILLS:
        victim = Victim(tiny, reference)
        through = False
        while not through:
            rest = 0.4 + 0.8 * (1 - victim.newest / STEPS)  # of the work, and more, so that it comes to an end
            kind = draw.random()
            if kind < 0.5:
                nth = draw.randint(1, int(rest * reference.boundaries))
                what, kill = f"boundary {nth}", lambda nth=nth: die_at(nth)
            elif kind < 0.8:
                moment_s = draw.uniform(0, rest) * reference.cpu_s
                what, kill = f"after {moment_s:.3f} s", lambda moment_s=moment_s: kill_after(moment_s)
            else:  # again, while the next start tidies up
                nth = draw.randint(1, 40)
                what, kill = f"boundary {nth} of the next start", lambda nth=nth: die_at(nth)
            try:
                through = victim.start(kill)
            except AssertionError as error:
                raise AssertionError(f"kill {kills + victim.kills + 1}, {what}: {error}") from error
        kills += victim.kills
        finished += 1
    print(f"{kills} kills, {finished} trainings finished")


@pytest.mark.skipif(not TORTURE, reason="minutes: make torture")
def test_a_kill_at_every_boundary_of_a_training(tiny, reference):
    for nth in range(1, reference.boundaries + 1):
        victim = Victim(tiny, reference)
        victim.start(lambda: die_at(nth))  # noqa: B023 - called at once
        if nth % 3 == 0:
            victim.start(lambda: die_at(1 + nth % 40))  # noqa: B023
        assert victim.start(lambda: None), nth


# --- signals


def signalled_run(tiny: ForkedTraining, step: int, *signals: int) -> int:
    """A training that is sent signals in the middle of a step."""
    real = loop._apply
    done = [0]

    def apply(*args):
        done[0] += 1
        if done[0] == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args)

    tiny.clear()
    return tiny.run(*SETTINGS, before=lambda: setattr(loop, "_apply", apply))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", range(1, STEPS) if TORTURE else [1, 4, 5])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tiny, reference, number, code, step):
    tiny.log()
    assert signalled_run(tiny, step, number) == code
    assert newest_valid(tiny) == step
    said = tiny.log()
    command = re.search(r"python -m src\.train_lora (.*)", said)
    assert command, said
    assert "Traceback" not in said
    assert "--resume" in command[1].split()
    assert tiny.run(*RESUME) == ExitCode.OK, tiny.log()
    assert tiny.result(STEPS) == reference.result


def test_a_signal_in_the_last_step_is_too_late(tiny, reference):
    assert signalled_run(tiny, STEPS, signal.SIGINT) == ExitCode.OK
    assert tiny.result(STEPS) == reference.result


def test_a_second_ctrl_c_leaves_at_once(tiny, reference):
    assert signalled_run(tiny, 5, signal.SIGINT, signal.SIGINT) == -signal.SIGINT
    assert newest_valid(tiny) == 4
    assert tiny.run(*RESUME) == ExitCode.OK
    assert tiny.result(STEPS) == reference.result


def test_a_signal_at_a_random_moment(tiny, reference):
    """From outside, at any time: either it is too early or late for the loop, or the step is saved; nothing is ever torn."""
    draw = random.Random(1)
    for attempt in range(200 if TORTURE else 6):
        number, code = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][attempt % 2]
        moment_s = draw.uniform(0.05, 1.2) * reference.cpu_s

        def send(number=number, moment_s=moment_s) -> None:
            signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
            signal.setitimer(signal.ITIMER_PROF, moment_s)

        tiny.clear()
        status = tiny.run(*SETTINGS, before=send)
        # SIGTERM outside the loop ends the process as it always does: nothing is being computed that could be lost.
        assert status in (ExitCode.OK, code, -signal.SIGTERM), (number, moment_s, tiny.log())
        newest = newest_valid(tiny)
        if status == code and newest:
            said = tiny.log()
            assert f"stopped after step {newest};" in said or "interrupted" in said, said


# --- others


def test_a_second_trainer_in_the_folder_is_refused_at_once(tiny):
    tiny.clear()
    holder, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        with tiny.store().lock():
            os.write(ready, b"x")
            signal.pause()
    os.read(holder, 1)
    try:
        started = time.perf_counter()
        tiny.log()
        assert tiny.run(*SETTINGS) == ExitCode.REFUSED
        assert time.perf_counter() - started < 5
        assert f"process {pid}" in tiny.log()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_full_disk_in_the_middle_of_a_training(tiny, reference):
    """The file size limit stands for a disk that is full: the error is one line, and the checkpoints before are there."""

    def limit() -> None:
        real = CheckpointFolder.save

        def save(self, step, *args):
            if step == 6:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            return real(self, step, *args)

        CheckpointFolder.save = save

    tiny.clear(), tiny.log()
    assert tiny.run(*SETTINGS, before=limit) == ExitCode.FAILURE
    said = [line for line in tiny.log().splitlines() if "not saved" in line]
    assert len(said) == 1
    assert "checkpoint-6" in said[0]
    assert "bytes" in said[0]
    assert newest_valid(tiny) == 4
    assert not [name for name in tiny.names() if "/" not in name and name.startswith((".tmp", ".old", ".del", ".incomplete"))]
    assert tiny.run(*RESUME) == ExitCode.OK
    assert tiny.result(STEPS) == reference.result

"""Several processes: who draws what, and that together they draw what one draws, also after a kill."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from PIL import Image

from src import cli, processes, terminal
from src.errors import ExitCode, UserError, usage_error
from src.jobs import Journal
from src.orders import share
from src.processes import ALONE, Processes, from_environment
from src.request import PictureRequest
from src.session import Job

ROOT = Path(__file__).parent.parent
FAST = ["--model", "embedded", "--steps", "2"]


def drawn_in(folder: Path) -> dict[int, tuple[bytes, dict]]:
    """Pixels and recipe of every picture in ``folder`` by its seed; a seed twice is an error."""
    found = {}
    for path in folder.glob("gen_*.png"):
        with Image.open(path) as picture:
            recipe = json.loads(picture.info["recipe"])
            del recipe["time_s"]
            assert recipe["seed"] not in found, "a picture was drawn twice"
            found[recipe["seed"]] = (numpy.asarray(picture).tobytes(), recipe)
    return found


def take_place(monkeypatch: pytest.MonkeyPatch, index: int, count: int) -> None:
    """Be one of several processes that were started by hand."""
    for name, number in {"RANK": index, "WORLD_SIZE": count, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.delenv("MASTER_ADDR", raising=False)


# -- who draws what


def some_jobs(source: random.Random) -> list[Job]:
    jobs = []
    for line in range(source.randrange(1, 9)):
        if source.random() < 0.2:
            jobs.append(Job(error=usage_error("wrong"), line=line))
        else:
            seed = source.choice([None, 7])
            jobs.append(Job(PictureRequest(prompt="x", seed=seed, num_images=source.randrange(1, 12)), line=line, id=str(line)))
    return jobs


def pieces(jobs: list[Job]) -> list[tuple[int, int]]:
    """(line, picture index) of all that is to be done."""
    return [(job.line, index) for job in jobs for index in (job.pictures if job.request else range(1))]


@pytest.mark.parametrize("seed", range(200))
def test_every_picture_is_drawn_by_exactly_one(seed: int) -> None:
    source = random.Random(seed)
    jobs, count = some_jobs(source), source.randrange(1, 14)
    shares = [share(jobs, Processes(index, count)) for index in range(count)]
    assert [piece for part, _ in shares for piece in pieces(part)] == pieces(jobs), "each once, and in order"
    for part, _ in shares:
        assert all(job.pictures == range(job.request.num_images) for job in part if job.request and job.request.seed is None)
    if all(job.request is None or job.request.seed is not None for job in jobs):
        sizes = [len(pieces(part)) for part, _ in shares]
        assert max(sizes) - min(sizes) <= 1
        assert [before for _, before in shares] == [sum(sizes[:index]) for index in range(count)]


def test_what_a_launcher_says() -> None:
    assert from_environment({}) == ALONE
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert from_environment(torchrun) == Processes(5, 8, 1, 4)
    open_mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert from_environment(open_mpi) == Processes(1, 2, 1, 2)
    for wrong in ({"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(UserError) as caught:
            from_environment(wrong)
        assert caught.value.exit_code == ExitCode.USAGE


def test_threads_are_the_cores_shared_out_unless_somebody_chose(monkeypatch) -> None:
    monkeypatch.setattr(processes, "quota_cores", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    pair = Processes(0, 4, 0, 2)
    assert pair.cpu_threads({"OMP_NUM_THREADS": "1"}) == pair.cpu_threads({}) == 4
    assert pair.cpu_threads({"OMP_NUM_THREADS": "3"}) is None
    assert Processes(0, 16, 0, 16).cpu_threads({}) == 1
    assert ALONE.cpu_threads({}) is None
    assert ALONE.cpu_threads({"OMP_NUM_THREADS": "1"}) is None, "somebody chose"
    alone_by_accelerate = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    assert ALONE.cpu_threads(alone_by_accelerate) == 8
    assert ALONE.cpu_threads({**alone_by_accelerate, "OMP_NUM_THREADS": "3"}) is None


@pytest.mark.parametrize(("quota", "threads"), [(None, [None, 4, 8]), (2, [2, 1, 2]), (6, [6, 3, 6]), (64, [None, 4, 8])])
def test_a_containers_quota_bounds_the_threads(monkeypatch, quota, threads) -> None:
    """As docker run --cpus=2 has it on a machine of many cores, all of which the process may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(processes, "quota_cores", lambda: quota)
    accelerate = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    assert [ALONE.cpu_threads({}), Processes(0, 2, 0, 2).cpu_threads({}), ALONE.cpu_threads(accelerate)] == threads
    assert ALONE.cpu_threads({"OMP_NUM_THREADS": "5"}) is None


def test_torch_is_told_its_threads_or_left_as_it_is(monkeypatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for threads in (3, None):
        monkeypatch.setattr(Processes, "cpu_threads", lambda _, threads=threads: threads)
        ALONE.set_threads()
    assert told == [3]


@pytest.mark.parametrize(
    ("files", "cgroup", "cores"),
    [
        ({"cpu.max": "400000 100000\n"}, "0::/", 4), ({"cpu.max": "150000 100000"}, "0::/", 2), ({"cpu.max": "5000 100000"}, "0::/", 1),
        ({"cpu.max": "max 100000"}, "0::/", None), ({"cpu.max": "max 100000", "a/b/cpu.max": "300000 100000"}, "0::/a/b", 3),
        ({"cpu.max": "200000 100000", "a/cpu.max": "800000 100000"}, "0::/a", 2),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/x", 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/x", None), ({}, "", None),
    ],
)  # fmt: skip
def test_a_quota_is_read_in_cores(files, cgroup, cores, tmp_path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processes.quota_cores(cgroup, tmp_path) == cores


def test_cores_that_a_launcher_gave_to_one_process_are_not_shared_again(monkeypatch) -> None:
    """As mpirun binds: the process may use three cores of its launcher's twelve."""
    usable = {0: 3, os.getppid(): 12}
    monkeypatch.setattr(processes, "quota_cores", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(usable[process])), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 12)
    assert Processes(0, 4, 0, 4).cpu_threads({}) == 3
    usable[0] = 12
    assert Processes(0, 4, 0, 4).cpu_threads({}) == 3

    def gone(process: int) -> set[int]:
        if process:
            raise ProcessLookupError
        return set(range(12))

    monkeypatch.setattr(os, "sched_getaffinity", gone)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert Processes(0, 4, 0, 4).cpu_threads({}) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "-"], "cannot read one input"),
        (["star", "--num", "4", "--seed", "1", "--grid"], "--grid"),
        (["star", "--num", "4"], "add --seed N"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_the_first_says_it(arguments, words, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    waited = []
    monkeypatch.setattr(terminal.time, "sleep", waited.append)
    for index, start in enumerate(("error: ", "process 1: error: ")):
        take_place(monkeypatch, index, 2)
        assert cli.main([*arguments, *FAST]) == ExitCode.USAGE
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(start)
        assert words in line
        assert waited == [terminal.FIRST_SPEAKS_S] * index, "time for a launcher to end who would say the same again"


def test_help_is_printed_once(monkeypatch, capsys) -> None:
    for index in range(2):
        take_place(monkeypatch, index, 2)
        assert cli.main(["--help"]) == 0
        assert ("usage" in capsys.readouterr().out) == (index == 0)


def test_accelerate_that_starts_one_process_of_two_is_told_on(monkeypatch) -> None:
    asked = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    assert processes.is_one_of_many_wanted(asked)
    assert not processes.is_one_of_many_wanted({**asked, "WORLD_SIZE": "2"})
    assert not processes.is_one_of_many_wanted({})


# -- drawing


def test_shares_make_up_what_one_process_draws(monkeypatch, capsys, tmp_path) -> None:
    """One order in three shares: the same pixels, recipes and numbers; a process with nothing to do does nothing."""
    monkeypatch.chdir(tmp_path)
    order = ["a {red|blue} star", "--num", "5", "--seed", "3", *FAST]
    assert cli.main([*order, "--output", "one"]) == 0
    capsys.readouterr()
    for index in range(3):
        take_place(monkeypatch, index, 3)
        assert cli.main([*order, "--output", "three"]) == 0
        out, err = capsys.readouterr()
        assert ("model " in err) == (index == 0), "the first one says what all do alike"
        assert [line.split("seed ")[1].split()[0] for line in out.splitlines()] == [["3"], ["4", "5"], ["6", "7"]][index]
    one, three = drawn_in(tmp_path / "one"), drawn_in(tmp_path / "three")
    assert one == three
    assert len(one) == 5
    numbers = sorted(path.stem[-3:] for path in (tmp_path / "three").glob("*.png"))
    assert numbers == ["000", "001", "002", "003", "004"]


def test_a_journal_of_each_process_is_read_by_all(tmp_path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    first, third = (Journal(tmp_path / ".finished.jsonl", index) for index in (0, 2))
    first.record("job", 0, tmp_path / "a.png", seed=7)
    third.record("job", 1, tmp_path / "b.png", seed=7)
    third.record("job", 0, tmp_path / "c.png", seed=7)
    assert sorted(path.name for path in tmp_path.glob(".finished*")) == [".finished-2.jsonl", ".finished.jsonl"]
    for reader in (0, 1, 2):
        journal = Journal(tmp_path / ".finished.jsonl", reader)
        assert [journal.finished("job", index) for index in (0, 1)] == [tmp_path / "c.png", tmp_path / "b.png"]
        assert journal.seed_of("job") == 7
    (tmp_path / "c.png").unlink()
    assert Journal(tmp_path / ".finished.jsonl").finished("job", 0) == tmp_path / "a.png", "one that is there counts"


def test_nobody_leaves_before_all_are_done(tmp_path) -> None:
    script = (
        "import sys, time; from src.processes import from_environment\n"
        "import torch\n"
        "time.sleep(1.5 * (sys.argv[1] == 'slow')); done = time.time(); from_environment().meet()\n"
        "print(done, time.time())"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen([sys.executable, "-c", script, pace], cwd=ROOT, env={**environment, "RANK": str(index)},
                         stdout=subprocess.PIPE, text=True)
        for index, pace in enumerate(("fast", "slow"))
    ]  # fmt: skip
    (_, fast_left), (slow_done, _) = (map(float, process.communicate(timeout=60)[0].split()) for process in started)
    assert fast_left >= slow_done
    assert [process.returncode for process in started] == [0, 0]


def start(command: list[str], folder: Path, **more: str) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, text=True, **pipes)


def launch(*arguments: str, folder: Path) -> subprocess.Popen:
    """``accelerate launch`` with two processes on the CPU."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    return start([*launcher, str(ROOT / "main.py"), *arguments], folder)


def test_two_processes_finish_what_another_number_began(monkeypatch, capsys, tmp_path) -> None:
    """The last of three is killed with -9 on its way; two by accelerate launch draw the rest: together what one draws.

    A bad line in the share of the first fails, and costs nobody a picture.
    """
    monkeypatch.chdir(tmp_path)
    lines = [f'--prompt "a {colour} star" --seed {10 * i} --num 2' for i, colour in enumerate(("red", "blue", "green", "pink"))]
    (tmp_path / "jobs.txt").write_text("\n".join(["--prompt x --steps -1", *lines]))
    order = ["--prompts", "jobs.txt", "--model", "embedded", "--steps", "4"]
    assert cli.main([*order, "--output", "one"]) == ExitCode.PARTLY_FAILED
    capsys.readouterr()
    one = drawn_in(tmp_path / "one")
    assert len(one) == 8

    order += ["--output", "two", "--json"]
    killed = start([str(ROOT / "main.py"), *order], tmp_path, RANK="2", WORLD_SIZE="3")
    two = tmp_path / "two"
    wait_until(lambda: len(list(two.glob("gen_*.png"))) >= 2 or killed.poll() is not None)
    killed.kill()
    killed.communicate(timeout=60)
    before = drawn_in(two)
    assert len(before) in (2, 3), "the kill came as likely as not between a picture and its line in the journal"

    again = launch(*order, folder=tmp_path)
    out, err = again.communicate(timeout=100)
    answers = [json.loads(line) for line in out.splitlines()]
    assert again.returncode == 1, "accelerate's own code for a process that has failed"
    assert "exitcode  : 5" in err
    assert [answer["line"] for answer in answers if "error" in answer] == [1]
    assert len([answer for answer in answers if "file" in answer]) == 8
    assert drawn_in(two) == one
    assert len([answer for answer in answers if answer.get("skipped")]) == len(before)
    assert err.count("model   embedded") == 1


def wait_until(condition, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)

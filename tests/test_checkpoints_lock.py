"""One trainer at a time in a checkpoint folder, and what a dead one left is swept."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from src.errors import ExitCode, UserError
from tests.test_checkpoints import FACTS, Folder, contents, saved, visible
from tests.tiny.faults import POSIX, assert_one_line


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def trainer_in_child(root: Path) -> tuple[int, int]:
    """A process that holds the lock until it is killed: (its id, a pipe that closes with it)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Folder(root).lock():
            os.write(write, b"x")
            signal.pause()
    os.close(write)
    assert os.read(read, 1) == b"x"
    return pid, read


@POSIX
def test_a_second_trainer_is_refused_at_once_until_the_first_is_dead(tmp_path):
    pid, pipe = trainer_in_child(tmp_path)
    try:
        started = time.perf_counter()
        with pytest.raises(UserError) as caught, Folder(tmp_path).lock():
            pytest.fail("two trainers")
        assert time.perf_counter() - started < 1
        assert caught.value.exit_code == ExitCode.REFUSED
        assert_one_line(caught.value, str(tmp_path), f"process {pid}")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pipe)
    with Folder(tmp_path).lock(), pytest.raises(UserError, match=f"process {os.getpid()}"), Folder(tmp_path).lock():
        pytest.fail("twice in one process")
    with Folder(tmp_path).lock():
        pass


@POSIX
def test_the_lock_file_is_not_a_way_out(tmp_path):
    (tmp_path / "precious").write_text("1")
    root = tmp_path / "lora"
    root.mkdir()
    (root / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError), Folder(root).lock():
        pass
    assert (tmp_path / "precious").read_text() == "1"


@POSIX
def test_a_disk_without_locks_is_said_and_nothing_is_swept(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(38, "Function not implemented")

    saved(tmp_path, 1)
    (tmp_path / ".tmp-1-0123abcd-checkpoint-2").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    folder = Folder(tmp_path)
    with folder.lock():
        folder.save(2, contents(2), FACTS)
    assert "no locks" in folder.lines[0]
    assert visible(tmp_path) == [".tmp-1-0123abcd-checkpoint-2", "checkpoint-1", "checkpoint-2"]


@POSIX
def test_sweep_takes_leftovers_and_nothing_else(tmp_path):
    root, outside = tmp_path / "lora", tmp_path / "outside"
    saved(outside, 1)
    saved(root, 1, 2, 3)
    (root / "checkpoint-2").rename(root / ".old-77-0123abcd-checkpoint-2")  # its successor never came
    shutil.copytree(root / "checkpoint-3", root / ".old-77-0123abce-checkpoint-3")  # and here it did
    for name in (".tmp-77-0123abcd-checkpoint-4", ".del-1-0123abcd-checkpoint-0"):
        (root / name / "sub").mkdir(parents=True)
        (root / name / "sub" / "link").symlink_to(outside)
        (root / name / "sub" / "file").symlink_to(outside / "checkpoint-1" / "config.yaml")
    (root / ".tmp-77-0123abcf-checkpoint-5").symlink_to(outside)
    (root / "samples").mkdir()
    for folder in (root, root / "samples"):
        (folder / ".incomplete-0123456789abcdef").write_text("half a file")
    (outside / ".incomplete-0123456789abcdef").write_text("someone is writing")
    (root / "linked").symlink_to(outside)
    strangers = ["linked", "samples", ".tmp-mine", ".tmp-1-xyz-a", ".cache", ".tmp-77-0123abc0-file"]
    for name in strangers[2:-1]:
        (root / name).mkdir()
    (root / strangers[-1]).write_text("a file")
    for _ in range(2):
        with Folder(root).lock():
            pass
        assert visible(root) == sorted(
            ["checkpoint-1", "checkpoint-2", "checkpoint-3", ".tmp-77-0123abcf-checkpoint-5", *strangers]
        )
    assert [item.step for item in Folder(root).valid()] == [1, 2, 3]
    assert [item.step for item in Folder(outside).valid()] == [1]
    assert os.listdir(root / "samples") == []
    assert (outside / ".incomplete-0123456789abcdef").exists()

"""What is on the disk after a save, a fault, a kill at each step, and a race."""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path

import pytest

from src import files
from src.errors import ExitCode, UserError
from tests.tiny.faults import POSIX, assert_one_line, fail_from, in_child, no_hard_links

OLD, NEW = b"old" * 1000, b"new" * 1_000_000  # NEW takes three writes


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# --- publish_bytes


def test_publish_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    assert files.publish_bytes(path, OLD) == path
    assert files.publish_bytes(path, NEW) == path
    assert path.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["a.bin"]
    assert files.publish_bytes(tmp_path / "empty", b"").read_bytes() == b""


@POSIX
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o644)])
def test_mode_is_0644_less_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for exclusive in (False, True):
            path = files.publish_bytes(tmp_path / f"{exclusive}", b"x", exclusive=exclusive)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize("links", [True, False])
def test_exclusive_never_replaces(tmp_path, monkeypatch, links):
    if not links:
        no_hard_links(monkeypatch)
    path = tmp_path / "a.bin"
    assert files.publish_bytes(path, OLD, exclusive=True) == path
    with pytest.raises(FileExistsError):
        files.publish_bytes(path, NEW, exclusive=True)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["a.bin"]


@POSIX
def test_symlinks_are_written_through_but_not_by_an_exclusive_save(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), outside.mkdir()
    (inside / "link").symlink_to("../out/real")  # dangling
    with pytest.raises(FileExistsError):
        files.publish_bytes(inside / "link", b"x", exclusive=True)
    assert visible(outside) == []
    assert files.publish_bytes(inside / "link", b"x") == outside / "real"
    assert (inside / "link").is_symlink()
    assert (outside / "real").read_bytes() == b"x"


@POSIX
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_a_file_is_replaced(tmp_path, kind):
    target = tmp_path / "target"
    target.mkdir() if kind == "folder" else os.mkfifo(target)
    with pytest.raises(UserError) as caught:
        files.publish_bytes(target, b"x")
    assert_one_line(caught.value, str(target))
    assert os.listdir(tmp_path) == ["target"]
    assert not target.is_file()


@POSIX
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("replace", ["flush file", "replace", "flush folder"]),
        ("exclusive", ["flush file", "link", "flush folder"]),
        ("numbered", ["flush file", "link", "flush folder"]),
        ("no links", ["flush file", "replace", "flush folder"]),
    ],
)
def test_the_order_that_survives_a_power_cut(tmp_path, monkeypatch, mode, expected):
    steps: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace", "link", "rename", "write")}

    def fsync(descriptor):
        steps.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        real["fsync"](descriptor)

    def recorded(name):
        return lambda *args, **kwargs: (steps.append(name), real[name](*args, **kwargs))[1]

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "link", "rename", "write"):
        monkeypatch.setattr(os, name, recorded(name))
    if mode == "no links":
        no_hard_links(monkeypatch)
    if mode == "numbered":
        files.publish_numbered(tmp_path, str, NEW)
    else:
        files.publish_bytes(tmp_path / "a", NEW, exclusive=mode != "replace")
    assert [step for step in steps if step != "write"] == expected
    assert "write" not in steps[steps.index("flush file") :]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    ("call", "nth", "code"),
    [
        *(("write", nth, code) for nth in (1, 2, 3) for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
        ("fsync", 1, errno.EIO),
        ("open", 1, errno.EROFS),
    ],
)
def test_an_io_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, nth, code, once, exclusive):
    old = tmp_path / "a.bin"
    old.write_bytes(OLD)
    target = tmp_path / "b.bin" if exclusive else old
    with monkeypatch.context() as patch:
        fail_from(patch, call, nth, code, once)
        with pytest.raises(UserError) as caught:
            files.publish_bytes(target, NEW, exclusive=exclusive)
    assert caught.value.exit_code == ExitCode.FAILURE
    assert_one_line(caught.value, str(target), f"{len(NEW):,} bytes", os.strerror(code))
    assert old.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_failed_rename_leaves_nothing(tmp_path, monkeypatch, exclusive):
    no_hard_links(monkeypatch)
    fail_from(monkeypatch, "replace", 1, errno.EIO)
    with pytest.raises(UserError):
        files.publish_bytes(tmp_path / "a", NEW, exclusive=exclusive)
    assert os.listdir(tmp_path) == []


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:77_777]))
    assert files.publish_bytes(tmp_path / "a", NEW).read_bytes() == NEW


@POSIX
def test_a_real_size_limit(tmp_path):
    import resource

    path = tmp_path / "a"
    path.write_bytes(OLD)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(UserError, match="File too large"):
            files.publish_bytes(path, NEW)

    assert in_child(save) == 0
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        files.publish_bytes(tmp_path / "no" / "a", b"x")
    assert_one_line(caught.value, str(tmp_path / "no" / "a"), "create the folder")


@POSIX
@pytest.mark.parametrize("mode", ["replace", "exclusive", "no links"])
def test_a_kill_at_any_step_leaves_all_or_nothing(tmp_path, monkeypatch, mode):
    """Kill -9 before each n-th system call of a save, until a save gets through."""
    if mode == "no links":
        no_hard_links(monkeypatch)
    calls = ("open", "write", "fsync", "close", "replace", "link", "unlink")
    allowed = {"replace": {OLD, NEW}, "exclusive": {None, NEW}, "no links": {None, b"", NEW}}[mode]
    seen = set()
    for nth in range(1, 50):
        folder = tmp_path / str(nth)
        folder.mkdir()
        target = folder / "a"
        if mode == "replace":
            target.write_bytes(OLD)

        def save(target=target, nth=nth):
            count = 0

            def deadly(real):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == nth:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for name in calls:
                setattr(os, name, deadly(getattr(os, name)))
            files.publish_bytes(target, NEW, exclusive=mode != "replace")

        status = in_child(save)
        found = target.read_bytes() if target.exists() else None
        seen.add(found)
        assert found in allowed, (mode, nth, len(found or b""))
        assert set(visible(folder)) <= {"a"}
        if status == 0:
            assert found == NEW
            assert os.listdir(folder) == ["a"]
            break
    assert seen == allowed  # the kills did land on both sides of each step
    assert nth > 8


# --- publish_numbered


def picture_name(number: int) -> str:
    return f"gen_20260102_030405_{number:03d}.png"


@POSIX
@pytest.mark.parametrize("links", [True, False])
def test_four_processes_in_one_second_lose_no_picture(tmp_path, monkeypatch, links):
    if not links:
        no_hard_links(monkeypatch)
    gate_read, gate_write = os.pipe()
    children = []
    for worker in range(4):
        pid = os.fork()
        if pid == 0:
            os.close(gate_write)
            os.read(gate_read, 1)  # returns for all at once, when the parent closes its end
            for index in range(25):
                files.publish_numbered(tmp_path, picture_name, f"{worker}-{index}".encode())
            os._exit(0)
        children.append(pid)
    os.close(gate_read), os.close(gate_write)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == [picture_name(number) for number in range(100)]
    contents = {path.read_bytes().decode() for path in tmp_path.iterdir()}
    assert contents == {f"{worker}-{index}" for worker in range(4) for index in range(25)}


def test_numbered_takes_the_first_free_name(tmp_path):
    (tmp_path / picture_name(3)).write_bytes(b"kept")
    saved = [files.publish_numbered(tmp_path, picture_name, b"new", start=2).name for _ in range(3)]
    assert saved == [picture_name(2), picture_name(4), picture_name(5)]
    assert (tmp_path / picture_name(3)).read_bytes() == b"kept"


def test_numbered_reports_a_full_disk(tmp_path, monkeypatch):
    fail_from(monkeypatch, "write", 1, errno.ENOSPC)
    with pytest.raises(UserError, match="free some space"):
        files.publish_numbered(tmp_path, picture_name, NEW)
    assert os.listdir(tmp_path) == []

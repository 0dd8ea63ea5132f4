"""Kills at every step, power cuts, full disks: the checkpoints before are there, and what is there is whole.

`make torture` (TORTURE=1) tries every second kill as well.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from src import files, folders
from src.checkpoints import CheckpointFolder, read_manifest
from src.errors import ExitCode, UserError
from tests.tiny.faults import POSIX, assert_one_line, fail_from, killed_at, memory_folder
from tests.tiny.power_cut import Recording, recorded, write_tree

TORTURE = bool(os.environ.get("TORTURE"))
pytestmark = POSIX


def contents(text: str) -> dict[str, bytes]:
    return {"weights": text.encode() * 50, "unet_lora/adapter_model": text.encode() * 30, "unet_lora/config": b"{}"}


def quiet(line: str) -> None:
    pass


def loud(line: str) -> None:
    raise AssertionError(line)


def trainer(root: Path, say: Callable[[str], None] = quiet) -> CheckpointFolder:
    return CheckpointFolder(root, say)


def prepare(root: Path) -> None:
    folder = trainer(root)
    for step in (1, 2):
        folder.save(step, contents(f"old {step}"), {"n": step})
    folder.publish("final", contents("old final"), {})


# What a training does to its folder. `mark` is told what is promised from then on.
def save(root: Path, mark: Callable[[str], None] = quiet) -> None:
    with trainer(root).lock():
        trainer(root).save(3, contents("new 3"), {"n": 3})
        mark("checkpoint-3")


def save_again(root: Path, mark: Callable[[str], None] = quiet) -> None:
    with trainer(root).lock():
        trainer(root).save(2, contents("new 2"), {"n": 2})
        mark("checkpoint-2")


def publish(root: Path, mark: Callable[[str], None] = quiet) -> None:
    with trainer(root).lock():
        trainer(root).publish("final", contents("new final"), {})
        mark("final")


def prune(root: Path, mark: Callable[[str], None] = quiet) -> None:
    with trainer(root).lock():
        trainer(root).prune(1)


def everything(root: Path, mark: Callable[[str], None] = quiet) -> None:
    folder = trainer(root)
    with folder.lock():
        folder.save(3, contents("new 3"), {"n": 3})
        mark("checkpoint-3")
        folder.prune(1)
        folder.publish("final", contents("new final"), {})
        mark("final")


def begin(root: Path, mark: Callable[[str], None] = quiet) -> None:
    """The first save, in a folder that is not there yet."""
    with trainer(root).lock():
        trainer(root).save(3, contents("new 3"), {"n": 3})
        mark("checkpoint-3")


ACTIONS = [save, save_again, publish, prune, everything, begin]


def held(folder: Path) -> dict[str, bytes]:
    found = read_manifest(folder)
    return {name: found.read(name) for name in found.files}


def check(root: Path, action: Callable, promised: tuple[str, ...] = ()) -> None:
    """As the next start finds it: nothing torn, nothing lost, nothing left over."""
    folder = trainer(root, loud)  # a torn checkpoint would be said
    with folder.lock():
        valid = {item.folder.name: held(item.folder) for item in folder.valid()}
        names = {entry.name for entry in root.iterdir()} - {".lock"}
        assert names <= {"checkpoint-1", "checkpoint-2", "checkpoint-3", "final"}
        assert valid or (action is begin and not promised)
        for name, found in valid.items():
            step = name[-1]
            allowed = [contents(f"old {step}")] if name != "checkpoint-3" else [contents("new 3")]
            if action is save_again and step == "2":
                allowed.append(contents("new 2"))
            assert found in allowed
        if action not in (prune, everything, begin):
            assert {"checkpoint-1", "checkpoint-2"} <= valid.keys()
        if "checkpoint-3" in promised:
            assert valid.get("checkpoint-3") == contents("new 3")
        if "checkpoint-2" in promised:
            assert valid.get("checkpoint-2") == contents("new 2")
        if action is not begin:
            new = [contents("new final")] if "final" in promised else [contents("old final"), contents("new final")]
            assert held(root / "final") in (new if action in (publish, everything) else [contents("old final")])


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    """A kill takes nothing from the disk; for power cuts the flushes are recorded."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def prepared(scratch) -> Path:
    prepare(scratch / "prepared")
    return scratch / "prepared"


def fresh(prepared: Path, root: Path, action: Callable) -> Path:
    """The state that the action starts from."""
    shutil.rmtree(root, ignore_errors=True)
    return root if action is begin else Path(shutil.copytree(prepared, root))


# --- kill -9


@pytest.mark.parametrize("action", ACTIONS, ids=lambda item: item.__name__)
def test_a_kill_at_every_boundary(scratch, prepared, action):
    """Kill before the n-th system call, for every n, and again while the next start tidies up; then finish."""
    action(fresh(prepared, scratch / "reference", action))
    expected = tree(scratch / "reference")
    root, again = scratch / "lora", scratch / "again"
    for nth in itertools.count(1):
        fresh(prepared, root, action)
        if not killed_at(nth, lambda: action(root)):
            break
        for second in itertools.count(1) if TORTURE else [1 + 7 * nth % 40] if nth % 3 == 0 else []:
            fresh(root, again, save)  # as the first kill left it
            if not killed_at(second, lambda: action(again)):
                break
            check(again, action)
        check(root, action)
        action(root)
        assert tree(root) == expected, nth
    print(f"{action.__name__}: {nth - 1} boundaries")
    assert nth > {prune: 15, everything: 80}.get(action, 30)


# --- power cuts


def images_of(recording: Recording, scratch: Path, action: Callable, top: Path) -> tuple[int, list[str]]:
    """(disks tried, what went wrong on which)."""
    wrong, count = [], 0
    for end, how, disk in recording.disks():
        count += 1
        image = scratch / f"image{count}"
        write_tree(disk, image)
        promised = tuple(mark for mark in recording.events[:end] if isinstance(mark, str))
        root = image / top.relative_to(recording.root)
        try:
            if root.exists() or promised:
                check(root, action, promised)
        except (AssertionError, UserError) as error:
            wrong.append(f"cut before event {end}, {how}: {error}")
        shutil.rmtree(image)
    return count, wrong


def cut(scratch: Path, prepared: Path, action: Callable) -> tuple[int, list[str]]:
    disk = Path(tempfile.mkdtemp(dir=scratch))
    root = fresh(prepared, disk / "models" / "lora", action)
    with recorded(disk) as recording:
        action(root, recording.events.append)
    return images_of(recording, disk, action, Path(os.path.realpath(root)))


def test_a_power_cut_at_every_step(scratch, prepared):
    total = 0
    for action in ACTIONS:
        count, wrong = cut(scratch, prepared, action)
        assert wrong == [], (action.__name__, wrong[:3], len(wrong))
        total += count
    print(total, "disks")
    assert total > 1000


def _without(condition: Callable[[Path], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.flush_folder
    monkeypatch.setattr(files, "flush_folder", lambda folder: None if condition(folder) else real(folder))


def unflushed_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(descriptor, data)
    os.close(descriptor)


SABOTAGE = {
    "files are not flushed": (save, lambda patch: patch.setattr(files, "write_flushed", unflushed_file)),
    "the new folder is not flushed": (save, lambda patch: _without(lambda f: f.name.startswith(".tmp"), patch)),
    "its sub-folder is not flushed": (save, lambda patch: _without(lambda f: f.name == "unet_lora", patch)),
    "the new name is not flushed": (save, lambda patch: _without(lambda f: f.name == "lora", patch)),
    "a name is not gone before its files are": (prune, lambda patch: _without(lambda f: f.name == "lora", patch)),
    "the root's own name is not flushed": (begin, lambda patch: _without(lambda f: f.name == "models", patch)),
    "written in place": (save_again, lambda patch: patch.setattr(folders, "publish_folder", in_place)),
    "pruned first": (everything, lambda patch: patch.setattr(CheckpointFolder, "save", pruned_first)),
}


def in_place(folder: Path, data: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folders._write(folder, data)
    files.flush_folder(folder.parent)
    return folder


def pruned_first(self: CheckpointFolder, step: int, data: dict[str, bytes], facts: dict) -> None:
    for old in (1, 2):
        folders.remove_folder(self.root / f"checkpoint-{old}")
    self.publish(f"checkpoint-{step}", data, facts, step)


@pytest.mark.parametrize("case", SABOTAGE)
def test_the_power_cuts_find_what_is_broken_on_purpose(scratch, prepared, monkeypatch, case):
    action, sabotage = SABOTAGE[case]
    sabotage(monkeypatch)
    _, wrong = cut(scratch, prepared, action)
    assert wrong


# --- errors of the disk


@pytest.mark.parametrize("action", [save, save_again, publish, everything, begin], ids=lambda item: item.__name__)
@pytest.mark.parametrize("call", ["write", "fsync", "open", "mkdir", "rename"])
def test_an_error_at_any_call_leaves_the_old_state(scratch, prepared, action, call):
    root, tried = scratch / "lora", 0
    for once in (True, False):
        for code in (errno.ENOSPC, errno.EIO):
            for nth in range(1, 1000):
                fresh(prepared, root, action)
                before = tree(root)
                folder = trainer(root, quiet)
                folders.make_folder(root)
                with pytest.MonkeyPatch.context() as patch:
                    fail_from(patch, call, nth, code, once)
                    hit = attempt(folder, action)
                if hit is None:
                    break
                tried += 1
                assert hit.exit_code == ExitCode.FAILURE
                assert_one_line(hit, str(root), os.strerror(code), "bytes" if "not saved" in str(hit) else "")
                leftovers = [name for name in os.listdir(root) if name.startswith(".")]
                assert leftovers == [] or (call in ("rename", "open") and not once), (
                    nth,
                    leftovers,
                )  # cannot be deleted either
                if action is not everything and leftovers == []:
                    assert tree(root) == before
                check(root, action)
    assert tried >= 4


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    save(tmp_path)
    assert held(tmp_path / "checkpoint-3") == contents("new 3")


def attempt(folder: CheckpointFolder, action: Callable) -> UserError | None:
    """What ``action`` does while it holds the lock; the error that it met."""
    try:
        if action in (save, everything, begin):
            folder.save(3, contents("new 3"), {"n": 3})
        if action is everything:
            folder.prune(1)
        if action is save_again:
            folder.save(2, contents("new 2"), {"n": 2})
        if action in (publish, everything):
            folder.publish("final", contents("new final"), {})
    except UserError as error:
        return error
    return None

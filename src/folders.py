"""The only way to write a folder of files as one thing: it appears whole or not at all, also after a power cut.

A folder is written under a hidden name next to its place, flushed (files, then folders), renamed, and its parent flushed.
What is there already is first moved aside and deleted last, so that a kill at any moment leaves the old one, the new one or
both; `sweep` tidies up. Hidden names: ``.tmp-`` being written, ``.old-`` moved aside, ``.del-`` being deleted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from src import files
from src.errors import UserError, refused

LOCK_NAME = ".lock"
LOOK_EVERY_S = 0.1  # whether another process is done
_LEFTOVER = re.compile(r"\.(tmp|old|del)-\d+-[0-9a-f]{8}-(.+)", re.DOTALL)
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}  # what the systems say of a lock that another process holds


def make_folder(folder: Path) -> Path:
    """Make ``folder`` and the folders above it where they are missing, durably; returns it. Raises UserError (failure)."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), [folder, *folder.parents]))
    with files.named_errors(folder, 0):
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster, or a link leads nowhere
                path.mkdir()
            files.flush_folder(path.parent)
        if not folder.is_dir():
            raise OSError(errno.ENOTDIR, "there is something else of that name")
    return folder


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse now what the disk of ``folder``, which may not exist yet, has no room for. Raises UserError (failure)."""
    nearest = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    with contextlib.suppress(OSError):
        total, _, free = shutil.disk_usage(nearest)
        if free < needed_bytes and total:  # some network drives say 0 of 0
            raise UserError(
                f"{folder}: {needed_bytes:,} bytes are needed, {free:,} are free on that disk; "
                "free some space or choose another folder"
            )


def publish_folder(folder: Path, contents: Mapping[str, bytes | files.Stream]) -> Path:
    """Write ``contents`` (bytes by name, perhaps with sub-folders) as ``folder``, in place of all that it held.

    Modes 0644 and 0755 less the umask. The parent must exist. On any error the old folder stays and nothing else is left.
    Returns the path. Raises UserError: refused for an unsafe name in ``contents``, failure when the disk says no.
    """
    size_bytes = sum(data.size_bytes if isinstance(data, files.Stream) else len(data) for data in contents.values())
    check_space(folder.parent, size_bytes)
    temporary, old = _hidden("tmp", folder), _hidden("old", folder)
    with files.named_errors(folder, size_bytes):
        try:
            _write(temporary, contents)
            _put_in_place(temporary, folder, old)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)
    return folder


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it: at once by name, then file by file. No symlink is followed.

    Raises UserError (failure) if it cannot be taken away. Files that resist stay under a hidden name.
    """
    doomed = _hidden("del", folder)
    try:
        files.renamed(os.rename, folder, doomed)
        files.flush_folder(folder.parent)  # else a power cut could bring the name back without all of its files
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rename(doomed, folder)
        raise UserError(f"{folder}: not deleted ({error.strerror or error}); delete it yourself") from None
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename what has this name, whatever it is, to the first free ``NAME-set-aside``, and return that. Raises UserError."""
    for number in itertools.count(1):
        target = folder.with_name(f"{folder.name}-set-aside" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(target):
            with files.named_errors(folder, 0):
                files.renamed(os.rename, folder, target)
                files.flush_folder(folder.parent)
            return target
    raise AssertionError("the count has no end")


def sweep(root: Path) -> None:
    """Tidy up what killed processes left in ``root``: an old folder whose successor never came is put back, the rest deleted.

    Half-written files go from ``root`` and the folders in it. Only for the process that holds `locked`: what another one is
    writing looks the same. Raises UserError (failure).
    """
    files.remove_incomplete(root)
    with os.scandir(root) as entries:
        inside = [Path(root, entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in inside:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            files.remove_incomplete(path)
        elif match[1] == "old" and not os.path.lexists(root / match[2]):
            with files.named_errors(root / match[2], 0):
                files.renamed(os.rename, path, root / match[2])
                files.flush_folder(root)
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(root: Path, waits: bool = False) -> Iterator[bool]:
    """Keep every other process from ``root`` for a while; yields False where the file system has no locks.

    The system drops the lock of a process that died, however it died. Raises UserError: refused, with the process id, if
    another one holds it (unless this one ``waits`` for that); failure when the disk says no.
    """
    path = root / LOCK_NAME
    with files.named_errors(path, 0):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        try:
            _lock(descriptor, waits)
            alone = True
        except OSError as error:
            if error.errno in _TAKEN:
                holder = os.read(descriptor, 32).strip()
                process = holder.decode() if holder.isdigit() else "unknown"
                raise refused(
                    f"{root}: another training is running there (process {process}); "
                    "wait for it, end it, or choose another folder"
                ) from None
            alone = False
        with files.named_errors(path, 0):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield alone
    finally:
        os.close(descriptor)


def _lock(descriptor: int, waits: bool) -> None:
    """Take the lock, or raise OSError."""
    while waits:
        try:
            return _lock(descriptor, waits=False)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            time.sleep(LOOK_EVERY_S)  # and not a lock that waits, which Ctrl-C cannot end everywhere
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a byte that nobody needs: others can still read the process id
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _hidden(kind: str, folder: Path) -> Path:
    """A free hidden name next to ``folder`` that says what is going on, by whom, and with what."""
    return folder.with_name(f".{kind}-{os.getpid()}-{secrets.token_hex(4)}-{folder.name}")


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Rename ``new`` to ``folder``, and what was there to ``old``; on any error all names are as before."""
    try:
        if os.path.lexists(folder):
            files.renamed(os.rename, folder, old)
        files.renamed(os.rename, new, folder)
        files.flush_folder(folder.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # what fails here is put right by `sweep`
            if not os.path.lexists(new):
                os.rename(folder, new)
            if os.path.lexists(old):
                os.rename(old, folder)
        raise


def _write(folder: Path, contents: Mapping[str, bytes | files.Stream]) -> None:
    """Make ``folder`` with these files in this order; all of it is on the disk then, but for the folder's own name."""
    folder.mkdir(mode=0o755)
    made = [folder]
    for name, data in contents.items():
        path = files.safe_join(folder, name)
        for parent in reversed(Path(name).parents[:-1]):  # of "a/b/c": a, a/b
            if folder / parent not in made:
                (folder / parent).mkdir(mode=0o755)
                made.append(folder / parent)
        files.write_flushed(path, data)
    for path in reversed(made):
        files.flush_folder(path)

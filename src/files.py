"""The only way to write: a file appears whole or not at all, a picture never replaces another, names stay inside their folder.
Folders of files are written by src/folders.py with the same means.

The order that survives a power cut is: flush the file, give it its name, flush the folder. A rename alone survives a killed
process, but may reach the disk before the data that it names.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import UserError, not_found, refused, usage_error

Announce = Callable[[Path, bytes], None]

MAX_NAME_BYTES = 120
_CHUNK_BYTES = 1 << 20
_RACY_NS = 2_000_000_000  # the coarsest file clock in use (FAT) ticks every 2 s
_SCANNED_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_RESERVED_ON_WINDOWS = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³]) *(\.|$)", re.IGNORECASE)
_FORBIDDEN_ON_WINDOWS = frozenset('\\:*?"<>|')
_NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EBADF}
_NEXT_STEP = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "the file system or a limit allows no file of this size there, so choose another folder",
    errno.ENOENT: "create the folder first",
    **({errno.EACCES: "close the program that has it open, or choose another folder"} if os.name == "nt" else {}),
}


@dataclass(frozen=True, slots=True)
class Stream:
    """The bytes of a large file, made piece by piece whenever they are asked for: they never lie in memory all at once."""

    size_bytes: int
    pieces: Callable[[], Iterator[bytes | memoryview]]


def publish_bytes(path: Path, data: bytes, *, exclusive: bool = False) -> Path:
    """Write ``data`` so that ``path`` holds either what it held before or all of ``data``, also after a power cut.

    A symlink is written through, unless ``exclusive``, which makes a new file and never follows or replaces a name that is
    taken. Mode 0644 less the umask. The folder must exist. Returns the path that was written, links resolved.
    Raises FileExistsError (``exclusive`` and the name is taken), UserError (failure) when the disk says no.
    """
    # realpath, because Path.resolve raises on a circle of links, and not the same way in every Python.
    target = Path(os.path.realpath(path.parent)) / path.name if exclusive else Path(os.path.realpath(path))
    with named_errors(path, len(data)):
        if not exclusive and target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "there is a folder or device of that name")  # rename would replace /dev/null for root
        with _durable_temporary(target.parent, data) as temporary:
            if exclusive:
                _name_exclusively(temporary, target)
            else:
                renamed(os.replace, temporary, target)
        flush_folder(target.parent)
    return target


def publish_numbered(
    folder: Path, name_of: Callable[[int], str], data: bytes, start: int = 0, announce: Announce | None = None
) -> Path:
    """Save ``data`` under the first free name of ``name_of(start)``, ``name_of(start + 1)``, ... and return its path.

    ``name_of`` gives a different file name for each number. Any number of processes may do so in one folder: a name is
    taken in one step that fails if another process has it, so nothing is lost or overwritten, whatever the clock says.
    ``announce(path, data)`` is called just before a name is tried.
    Raises UserError (failure) when the disk says no.
    """
    folder = Path(os.path.realpath(folder))
    with named_errors(folder / name_of(start), len(data)), _durable_temporary(folder, data) as temporary:
        for number in itertools.count(start):
            target = folder / name_of(number)
            if os.path.lexists(target):
                continue
            if announce is not None:
                announce(target, data)
            with contextlib.suppress(FileExistsError):
                _name_exclusively(temporary, target)
                flush_folder(folder)
                return target
    raise AssertionError("the count has no end")


def append_line(path: Path, text: str) -> None:
    """Append one line to a journal and flush it to the disk. The folder must exist.

    What a killed process left without a newline stays a line of its own, so only that line is damaged.
    Raises ValueError if ``text`` holds a newline, UserError (failure) when the disk says no.
    """
    if "\n" in text or "\r" in text:
        raise ValueError(f"a journal entry is one line, got {text!r}")
    line = text.encode("utf-8", errors="replace") + b"\n"
    with named_errors(path, len(line)), open(path, "ab+", buffering=0) as journal:
        is_new = journal.seek(0, os.SEEK_END) == 0
        if not is_new:
            journal.seek(-1, os.SEEK_END)
            if journal.read(1) != b"\n":
                line = b"\n" + line
        _write_all(journal.fileno(), line)  # O_APPEND: at the end, wherever the last read was
        os.fsync(journal.fileno())
        if is_new:
            flush_folder(path.parent)


def move_files(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Give each file its new path on the same disk, in place of what is there; durable together. Raises UserError (failure)."""
    folders: set[Path] = set()
    for source, target in pairs:
        with named_errors(target, 0):
            renamed(os.replace, source, target)
        folders |= {source.parent, target.parent}
    for folder in folders:
        flush_folder(folder)


def delete_files(paths: Iterable[Path]) -> None:
    """Delete files; one that is gone already is no error. Raises UserError (failure)."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: not deleted ({error.strerror or error}); delete it yourself") from None


def check_writable_folder(path: Path) -> Path:
    """Make the folder if it is missing, and prove by doing that files can be saved in it; returns ``path``.

    Permission bits are not asked: they say yes to root on a read-only disk. Raises UserError (usage).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _durable_temporary(path, b"probe"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        cause = "it is not a folder" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or str(error)
        raise usage_error(f"{path}: nothing can be saved there ({cause}); choose another folder") from None
    return path


def remove_incomplete(folder: Path) -> None:
    """Delete what killed processes left of the files that they were writing in ``folder``, while nobody else writes there."""
    for path in folder.glob(".incomplete-*"):
        if re.fullmatch(r"\.incomplete-[0-9a-f]{16}", path.name) and (path.is_symlink() or path.is_file()):
            with contextlib.suppress(OSError):
                path.unlink()


def check_stem(folder: Path, stem: str, number: str) -> None:
    """Refuse what cannot begin the name of a picture's file in ``folder``. Raises UserError (refused)."""
    if not stem or set(stem) & set("/\\"):
        raise refused(f"{stem!r}: is no start of a file name; name the folder apart from it")
    safe_join(folder, f"{stem}_{number}.png")


def safe_join(root: Path, name: str) -> Path:
    """Return the resolved path of ``name``, a file name or relative path with ``/``, that lies inside ``root``.

    For names that come from elsewhere: metadata, job files, data sets. The rules of POSIX and Windows hold on every
    system, so that a data set made on one is safe and readable on the other: no absolute path, drive, UNC, backslash,
    ``..``, empty part, device name (CON, NUL, COM1), trailing dot or space, hidden or control character, at most
    120 bytes; and no symlink that leads out of ``root``. Raises UserError (refused).
    """
    problem = _problem_of(name)
    base = Path(os.path.realpath(root))
    if problem is None:
        target = Path(os.path.realpath(base / name))
        if target != base and target.is_relative_to(base):
            return target
        problem = "it leads out of the folder"
    shown = ascii(name if len(name) <= 60 else name[:60] + "...")
    raise refused(f"{shown} is not a safe name in {root}: {problem}; rename it")


def require_file(path: Path) -> os.stat_result:
    """Return the status of a regular file (links followed), which can be opened without waiting for anyone.

    Raises UserError: not found if it is missing, refused if it is a folder, pipe, socket or device, or out of reach.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise not_found(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        cause = getattr(error, "strerror", error)
        raise refused(f"{str(path)!a}: cannot be read ({cause}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise refused(f"{path}: is {kind}, not a file; name a file")
    return status


def sha256_of(path: Path, cache: Path | None = None) -> str:
    """Return the SHA-256 of a file as 64 hex digits, read in pieces.

    ``cache`` is a JSON file that remembers the hash by resolved path, size and modification time, so that a 4 GB model is
    read once. A file of the Hugging Face cache (``blobs/<sha256>``) answers by its name: that identifies the file, it
    does not verify it. Raises UserError: not found, refused.
    """
    status = require_file(path)
    real = Path(os.path.realpath(path))
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    stamp = [status.st_size, status.st_mtime_ns]
    known = _read_hashes(cache) if cache else {}
    if str(real) in known and known[str(real)][:2] == stamp:
        return known[str(real)][2]
    digest = hashlib.sha256()
    try:
        with open(real, "rb") as file:
            while piece := file.read(_CHUNK_BYTES):
                digest.update(piece)
        after = os.stat(real)
    except OSError as error:
        raise refused(f"{path}: cannot be read ({error.strerror}); copy it again or check its permissions") from None
    # A file written a moment ago may change once more within the same tick of the file clock: such a stamp proves nothing.
    settled = time.time_ns() - status.st_mtime_ns > _RACY_NS
    if cache and settled and [after.st_size, after.st_mtime_ns] == stamp:
        # Read again, because another process may have added its own while this one was hashing.
        entries = _read_hashes(cache) | {str(real): [*stamp, digest.hexdigest()]}
        with contextlib.suppress(UserError, OSError):  # a cache that cannot be written costs time, not the answer
            cache.parent.mkdir(parents=True, exist_ok=True)
            publish_bytes(cache, json.dumps(entries, indent=1).encode())
    return digest.hexdigest()


def _read_hashes(cache: Path) -> dict[str, list[Any]]:
    """The entries ``{path: [size, mtime_ns, sha256]}`` that have this form; none if the cache is missing or damaged."""
    try:
        entries = json.loads(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        path: entry
        for path, entry in entries.items()
        if isinstance(entry, list) and [type(item) for item in entry] == [int, int, str] and len(entry[2]) == 64
    }


def _problem_of(name: str) -> str | None:
    """What is wrong with a relative name on POSIX or Windows, or None."""
    if not name.isprintable():  # control and format characters, NUL, lone surrogates
        return "it holds a hidden or control character"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    if forbidden := _FORBIDDEN_ON_WINDOWS.intersection(name):
        return f"'{min(forbidden)}' is not allowed"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "it is empty, absolute, or has an empty, '.' or '..' part"
        if part[-1] in ". ":
            return "a part ends with a dot or a space"
        if is_device_name(part):
            return f"'{part}' is a device on Windows"
    return None


def is_device_name(name: str) -> bool:
    """Whether Windows takes a file of this name for a device: con, nul, com1, aux.txt ..."""
    return _RESERVED_ON_WINDOWS.match(name) is not None


def write_flushed(path: Path, data: bytes | Stream) -> None:
    """Make a new file, mode 0644 less the umask, and flush its data; its name is durable once its folder is flushed too.

    A kill leaves half a file: write into a folder or under a name that nobody reads yet. Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
    try:
        for piece in data.pieces() if isinstance(data, Stream) else (data,):
            _write_all(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _durable_temporary(folder: Path, data: bytes) -> Iterator[Path]:
    """A hidden file in ``folder`` that holds ``data`` on the disk; whatever happens, it is gone afterwards."""
    temporary = folder / f".incomplete-{secrets.token_hex(8)}"
    try:
        write_flushed(temporary, data)
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # a rename has taken it away
            os.unlink(temporary)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    """``os.write`` may write less than it was given: just before the disk is full, and always above 2 GiB."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[:_CHUNK_BYTES]) :]


def _name_exclusively(temporary: Path, target: Path) -> None:
    """Give the finished file its name in one step, or raise FileExistsError if the name is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        # exFAT and many network drives have no hard links. Take the name with an empty file, then rename over it: a kill
        # between the two leaves an empty file, but never half a picture, and never another one's name.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        try:
            renamed(os.replace, temporary, target)
        except OSError:
            os.unlink(target)
            raise


def renamed(action: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """``os.rename`` or ``os.replace``, tried again for three seconds on Windows, where a virus scanner, the search index or a
    cloud drive opens every new file for a moment and nothing with an open file in it can be renamed. Raises OSError."""
    for wait_s in _SCANNED_S if os.name == "nt" else ():
        try:
            return action(source, target)
        except PermissionError:
            time.sleep(wait_s)
    return action(source, target)


def flush_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power cut, where the system can do so."""
    if os.name == "nt":
        return  # Windows gives no handle to flush a folder by
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some network drives cannot, and a write-only folder cannot be opened
        if error.errno not in _NO_FOLDER_FLUSH:
            raise


@contextlib.contextmanager
def named_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn what the system says into one line that names the file, its size, the cause and the next step."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        step = _NEXT_STEP.get(error.errno, "choose another folder")
        raise UserError(f"{path}: not saved, {needed_bytes:,} bytes ({error.strerror or error}); {step}") from None

"""Checkpoints: folders of bytes that are whole or invisible, checked by SHA-256, the newest valid one found by its step.

``ROOT/checkpoint-250/`` holds its files and ``manifest.json``: step, facts (any JSON), size and SHA-256 of each file, and a
hash of the manifest itself. A published folder is never edited. Nothing in a manifest names code or a path outside its
folder; it may come from a stranger.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src import files, folders
from src.errors import UserError, refused
from src.files import Stream

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_FILES = 1000
_FORMAT = "checkpoint 1"
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,11})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose manifest is whole. What its files hold is checked when they are read."""

    folder: Path
    step: int | None  # optimizer steps done; None in a folder that was published without
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]  # name: (size_bytes, sha256)

    def read(self, name: str) -> bytes:
        """The bytes of one file, equal to those that were saved. Raises UserError (refused) if they are not."""
        return b"".join(self._pieces(name))

    def verify(self) -> None:
        """Read every file once. Raises UserError (refused) for the first that is not what was saved."""
        for name in self.files:
            for _ in self._pieces(name):
                pass

    def verified(self, name: str) -> Path:
        """The path of one file, read once to the end: for what is too large for `read`. Raises UserError (refused)."""
        for _ in self._pieces(name):
            pass
        return files.safe_join(self.folder, name)

    def _pieces(self, name: str) -> Iterator[bytes]:
        """The file in pieces; after the last the hash is compared."""
        if name not in self.files:
            raise refused(f"{self.folder}: holds no {name!a}; it was written by another version or for another purpose")
        size_bytes, sha256 = self.files[name]
        path = files.safe_join(self.folder, name)
        found_bytes = files.require_file(path).st_size
        if found_bytes != size_bytes:
            raise refused(_damaged(path, f"{found_bytes:,} bytes where {size_bytes:,} were saved"))
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while piece := file.read(_CHUNK_BYTES):
                    digest.update(piece)
                    yield piece
        except OSError as error:
            raise refused(_damaged(path, f"it cannot be read: {error.strerror}")) from None
        if digest.hexdigest() != sha256:
            raise refused(_damaged(path, "its SHA-256 is not the one that was saved"))


class CheckpointFolder:
    """The checkpoints of one training, ``ROOT/checkpoint-<step>/``, and the folders published beside them."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self.root, self.say = root, say
        self._said: set[str] = set()
        self._sound: dict[int, Checkpoint] = {}  # saved or verified by this process: published folders are not edited

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder, keep other trainers out of it while the block runs, and `sweep`.

        Raises UserError: refused, with the process id, if another trainer is at work there.
        """
        folders.make_folder(self.root)
        with folders.locked(self.root) as alone:
            if alone:
                self.sweep()
            else:
                self.say(f"{self.root}: this disk has no locks; start no second training in that folder")
            yield

    def sweep(self) -> None:
        """Tidy up what killed processes left. Only while the folder is locked."""
        folders.sweep(self.root)

    def check_space(self, needed_bytes: int) -> None:
        """Raises UserError (failure) if the disk has less room than that."""
        folders.check_space(self.root, needed_bytes)

    def save(self, step: int, contents: Mapping[str, bytes | Stream], facts: Mapping[str, Any]) -> Checkpoint:
        """Save ``contents`` as ``checkpoint-<step>``, in place of an older one of that step; no other folder is touched.

        When it returns, the checkpoint survives a power cut. ``facts`` is JSON, without NaN. Raises UserError (failure) when
        the disk says no, with nothing left behind and the older one in its place.
        """
        checkpoint = read_manifest(self.publish(f"checkpoint-{step}", contents, facts, step))
        self._sound[step] = checkpoint
        return checkpoint

    def publish(
        self, name: str, contents: Mapping[str, bytes | Stream], facts: Mapping[str, Any], step: int | None = None
    ) -> Path:
        """Save ``contents`` as ``ROOT/<name>``, such as ``final`` or ``best``, in place of the whole folder; else as `save`.

        What has this name and is not ours to delete is renamed, and that is said.
        """
        if MANIFEST in contents:
            raise ValueError(f"{MANIFEST} is written here")
        sums = {file: _sum(data) for file, data in contents.items()}
        manifest = _manifest(step, dict(facts), sums)
        folder = folders.make_folder(self.root) / name
        if os.path.lexists(folder) and (reason := _not_ours(folder)):
            moved = folders.set_aside(folder)
            self.say(f"{folder}: {reason}; it is now {moved.name}")
        return folders.publish_folder(folder, {**contents, MANIFEST: manifest})

    def valid(self) -> list[Checkpoint]:
        """All checkpoints whose files are what was saved, by ascending step. A damaged one is said in one line.

        Files that this process saved or has read before are not read again.
        """
        return [found for step in self._steps() if (found := self._verified(step, trust=True))]

    def newest(self, strict: bool = False) -> Checkpoint | None:
        """The valid checkpoint of the highest step; a damaged one is said in one line and the one before is taken.

        Raises UserError (refused) for a damaged one if ``strict``.
        """
        return next((found for step in reversed(self._steps()) if (found := self._verified(step, strict=strict))), None)

    def prune(self, keep: int | None, protect: Collection[int] = ()) -> None:
        """Delete all checkpoints older than the ``keep`` newest valid ones (None: none), but not those of steps ``protect``.

        What this program did not make stays, and so does what it cannot vouch for: a folder without a whole manifest, or
        with a file in it that the manifest does not name. What resists is said in one line.
        """
        if keep is None:
            return
        if keep < 1:
            raise ValueError(f"at least one checkpoint stays, got keep={keep}")
        kept = [checkpoint.step for checkpoint in self.valid()][-keep:]
        for step in self._steps():
            if kept and step < kept[0] and step not in protect:
                folder = self._folder(step)
                try:
                    if reason := _not_ours(folder):
                        self._say_once(f"{folder}: stays, {reason}")
                    else:
                        folders.remove_folder(folder)
                except UserError as error:
                    self._say_once(str(error))

    def _folder(self, step: int) -> Path:
        return self.root / f"checkpoint-{step}"

    def _steps(self) -> list[int]:
        """The steps that have a folder, ascending: by number, not by a date that a copy or a clock changes."""
        try:
            names = os.listdir(self.root)
        except OSError:
            return []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)) and (self.root / name).is_dir())

    def _verified(self, step: int, strict: bool = False, trust: bool = False) -> Checkpoint | None:
        try:
            checkpoint = read_manifest(self._folder(step))
            if checkpoint.step != step:
                raise refused(_damaged(self._folder(step), f"its manifest is that of step {checkpoint.step}"))
            if not trust or checkpoint != self._sound.get(step):
                checkpoint.verify()
        except UserError as error:
            if strict:
                raise
            self._say_once(f"passed over: {error}")
            return None
        self._sound[step] = checkpoint
        return checkpoint

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)


def read_manifest(folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself; its files are not touched. Raises UserError (refused) if it is not whole."""
    path = folder / MANIFEST
    if not path.exists():
        raise refused(f"{folder}: has no {MANIFEST}, so it is no whole checkpoint of this program; move it away")
    try:
        size_bytes = files.require_file(path).st_size
        if size_bytes > MAX_MANIFEST_BYTES:
            raise refused(_damaged(path, f"{size_bytes:,} bytes, the limit is {MAX_MANIFEST_BYTES:,}"))
        raw = path.read_bytes()
        content = json.loads(raw)
        step, facts, entries = content["step"], content["facts"], content["files"]
        if not (step is None or (type(step) is int and step >= 0)) or not isinstance(facts, dict) or len(entries) > MAX_FILES:
            raise ValueError
        sums = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        if any(type(count) is not int or type(digest) is not str for count, digest in sums.values()):
            raise ValueError
        # Written anew it must be the same bytes: so each bit of it is covered by its own hash, or part of that.
        if _manifest(step, facts, sums) != raw:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise refused(_damaged(path, "it is not what was saved")) from None
    return Checkpoint(folder, step, facts, sums)


def _sum(data: bytes | Stream) -> tuple[int, str]:
    """Size in bytes and SHA-256. A stream is made once more for it, which is cheap beside writing it."""
    if not isinstance(data, Stream):
        return len(data), hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    for piece in data.pieces():
        digest.update(piece)
    return data.size_bytes, digest.hexdigest()


def _manifest(step: int | None, facts: dict[str, Any], sums: Mapping[str, tuple[int, str]]) -> bytes:
    """The manifest's bytes: the same for the same content. Raises ValueError for NaN, infinity, or too much."""
    content = {
        "format": _FORMAT,
        "step": step,
        "facts": facts,
        "files": {name: {"bytes": size_bytes, "sha256": digest} for name, (size_bytes, digest) in sums.items()},
    }
    digest = hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()
    manifest = json.dumps({**content, "sha256": digest}, allow_nan=False, indent=1).encode() + b"\n"
    if len(manifest) > MAX_MANIFEST_BYTES or len(sums) > MAX_FILES:
        raise ValueError(f"a manifest of {len(manifest):,} bytes and {len(sums)} files is too large")
    return manifest


def _not_ours(folder: Path) -> str | None:
    """Why this program may not delete what has this name: it did not make it, or not all of it. None if it may."""
    if folder.is_symlink():
        return "it is a link"
    try:
        known = {MANIFEST, *read_manifest(folder).files}
    except UserError:
        return f"it has no whole {MANIFEST}"
    found = (Path(parent, name).relative_to(folder).as_posix() for parent, _, names in os.walk(folder) for name in names)
    strangers = sorted(set(found) - known)
    return f"it holds {strangers[0]!a}, which no training put there" if strangers else None


def _damaged(path: Path, cause: str) -> str:
    return f"{path}: damaged, {cause}; delete this checkpoint or copy it again"

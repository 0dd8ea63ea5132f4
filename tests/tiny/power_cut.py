"""A disk that loses what was not flushed: system calls are recorded, and each disk that a power cut may leave is built.

The model is that of Pillai et al. 2014, "All File Systems Are Not Created Equal" (OSDI): a file's data are safe after fsync
of the file, a change of a folder's names after fsync of that folder. Until then a write may be missing, zeros or cut, and a
change of names may be there without the ones before it. A rename is one change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOSSES = ("kept", "missing", "zeros", "cut")


@dataclass(eq=False)
class Node:
    """A file (``data``) or a folder (``data`` None)."""

    data: bytes | None = None
    names: dict[str, Node] = field(default_factory=dict)


@dataclass(eq=False)
class Change:
    """A write to a file (``data`` at ``offset``) or new names in a folder (``names``; None takes one away)."""

    node: Node
    offset: int = 0
    data: bytes | None = None
    names: dict[str, Node | None] = field(default_factory=dict)
    flushed_at: float = float("inf")  # index of the event that made it safe


class Recording:
    """What was done below ``root``: changes, flushes (None), and marks (texts) of what the program had promised by then."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = Path(os.path.realpath(root)), read_tree(root)
        self.events: list[Change | str | None] = []
        self._start = list(_walk(self.top))
        self._descriptors: dict[int, tuple[Node, int]] = {}  # node, position

    def disks(self) -> Iterator[tuple[int, str, Node]]:
        """Every different disk that a cut may leave: (index of the first event that did not happen, how, tree)."""
        seen = set()
        for end in range(len(self.events) + 1):
            done = [event for event in self.events[:end] if isinstance(event, Change)]
            loose = {change for change in done if change.names and change.flushed_at >= end}
            subsets = [set(), loose, *({change} for change in loose), *(loose - {change} for change in loose)]
            for lost in subsets:
                for how in LOSSES:
                    disk = self._disk([change for change in done if change not in lost], end, how)
                    key = (tuple(mark for mark in self.events[:end] if isinstance(mark, str)), _fingerprint(disk))
                    if key not in seen:
                        seen.add(key)
                        yield end, f"data {how}, {len(lost)} of {len(loose)} names lost", disk

    def _disk(self, changes: list[Change], end: int, how: str) -> Node:
        copies = {node: Node(data) for node, data, _ in self._start}
        for node, _, names in self._start:
            copies[node].names = {name: copies[child] for name, child in names.items()}
        twin = lambda node: copies.setdefault(node, Node(None if node.data is None else b""))  # noqa: E731
        for change in changes:
            node = twin(change.node)
            for name, child in change.names.items():
                node.names.pop(name, None)
                if child is not None:
                    node.names[name] = twin(child)
            if change.data is not None:
                data = change.data if change.flushed_at < end else _spoiled(change.data, how)
                if data is not None:
                    old = node.data.ljust(change.offset, b"\0")
                    node.data = old[: change.offset] + data + old[change.offset + len(data) :]
        return copies[self.top]

    # --- the system calls, followed in a tree of our own because the system uses inode numbers again

    def _find(self, path: str | os.PathLike | int, dir_fd: int | None = None) -> tuple[Node, str] | None:
        """The folder below root and the name in it, or None for what is elsewhere."""
        if isinstance(path, int):
            return None
        if dir_fd is not None:
            return (self._descriptors[dir_fd][0], os.fspath(path)) if dir_fd in self._descriptors else None
        parts = Path(os.path.abspath(path))
        if not parts.is_relative_to(self.root) or parts == self.root:
            return (Node(names={"": self.top}), "") if parts == self.root else None
        node = self.top
        for part in parts.relative_to(self.root).parts[:-1]:
            if part not in node.names:
                return None
            node = node.names[part]
        return node, parts.name

    def _change(self, folder: Node, names: dict[str, Node | None]) -> None:
        for name, child in names.items():
            folder.names.pop(name, None)
            if child is not None:
                folder.names[name] = child
        self.events.append(Change(folder, names=names))

    def open(self, real: Callable, path: Any, flags: int, *args: Any, dir_fd: int | None = None) -> int:
        descriptor = real(path, flags, *args, dir_fd=dir_fd)
        if spot := self._find(path, dir_fd):
            folder, name = spot
            if name not in folder.names:
                self._change(folder, {name: Node(b"")})
            self._descriptors[descriptor] = (folder.names[name], 0)
        return descriptor

    def close(self, real: Callable, descriptor: int) -> None:
        self._descriptors.pop(descriptor, None)
        real(descriptor)

    def write(self, real: Callable, descriptor: int, data: bytes) -> int:
        count = real(descriptor, data)
        if descriptor in self._descriptors:
            node, position = self._descriptors[descriptor]
            self.events.append(Change(node, position, bytes(data[:count])))
            self._descriptors[descriptor] = (node, position + count)
        return count

    def fsync(self, real: Callable, descriptor: int) -> None:
        node = self._descriptors[descriptor][0]
        for event in self.events:
            if isinstance(event, Change) and event.node is node:
                event.flushed_at = min(event.flushed_at, len(self.events))
        self.events.append(None)

    def mkdir(self, real: Callable, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        if spot := self._find(path, dir_fd):
            self._change(spot[0], {spot[1]: Node()})

    def rename(self, real: Callable, source: Any, target: Any) -> None:
        real(source, target)
        (folder, old), (same, new) = self._find(source), self._find(target)
        assert folder is same, "the model knows renames within a folder only"
        self._change(folder, {old: None, new: folder.names[old]})

    def unlink(self, real: Callable, path: Any, *, dir_fd: int | None = None) -> None:
        real(path, dir_fd=dir_fd)
        if spot := self._find(path, dir_fd):
            self._change(spot[0], {spot[1]: None})

    replace, rmdir = rename, unlink


@contextmanager
def recorded(root: Path) -> Iterator[Recording]:
    """Record what is done below ``root`` with the functions of `os`. Real flushes are left out: they are slow."""
    recording = Recording(root)
    names = ("open", "close", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
    real = {name: getattr(os, name) for name in names}

    def wrapped(name: str) -> Callable:
        return lambda *args, **kwargs: getattr(recording, name)(real[name], *args, **kwargs)

    try:
        for name in names:
            setattr(os, name, wrapped(name))
        yield recording
    finally:
        for name in names:
            setattr(os, name, real[name])


def _spoiled(data: bytes, how: str) -> bytes | None:
    return {"kept": data, "missing": None, "zeros": bytes(len(data)), "cut": data[: len(data) // 2]}[how]


def _walk(node: Node) -> Iterator[tuple[Node, bytes | None, dict[str, Node]]]:
    yield node, node.data, dict(node.names)
    for child in node.names.values():
        yield from _walk(child)


def _fingerprint(node: Node) -> Any:
    if node.data is not None:
        return node.data
    return frozenset((name, _fingerprint(child)) for name, child in node.names.items())


def read_tree(path: Path) -> Node:
    if path.is_dir():
        return Node(names={child.name: read_tree(child) for child in path.iterdir()})
    return Node(path.read_bytes())


def write_tree(node: Node, path: Path) -> None:
    if node.data is not None:
        path.write_bytes(node.data)
        return
    path.mkdir(exist_ok=True)
    for name, child in node.names.items():
        write_tree(child, path / name)

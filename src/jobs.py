"""Job files, one picture order a line, and the journal that lets an interrupted batch go on where it stopped."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from src.errors import refused, usage_error
from src.files import append_line, require_file, sha256_of
from src.prompts import decode_utf8

MAX_JOB_FILE_BYTES = 64 << 20
STDIN = "-"


@dataclass(frozen=True, slots=True)
class JobLine:
    """One job as written, and its line number, counted from 1."""

    number: int
    text: str


def read_job_lines(source: str, stdin: TextIO) -> list[JobLine]:
    """Read a job file, or ``stdin`` when ``source`` is "-": UTF-8, blank lines and lines that begin with # do not count.

    Raises UserError: not found; refused for what is not a file, not UTF-8 (line and byte are named) or over 64 MiB.
    """
    name = source_name(source)
    data = _read_stdin(stdin) if source == STDIN else _read_file(Path(os.path.expanduser(source)), MAX_JOB_FILE_BYTES + 1)
    if len(data) > MAX_JOB_FILE_BYTES:
        raise refused(f"{name}: larger than {MAX_JOB_FILE_BYTES >> 20} MiB; split it into several job files")
    step = "send it as UTF-8" if source == STDIN else "save the file as UTF-8"
    lines = decode_utf8(data, name, step).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    stripped = (JobLine(number, line.strip()) for number, line in enumerate(lines, start=1))
    return [line for line in stripped if line.text and not line.text.startswith("#")]


def source_name(source: str) -> str:
    """What people call a job file: its path, or "standard input" for "-"."""
    return "standard input" if source == STDIN else source


def _read_stdin(stdin: TextIO) -> bytes:
    binary = getattr(stdin, "buffer", None)  # past the terminal's own encoding, which need not be UTF-8
    if binary is not None:
        return binary.read(MAX_JOB_FILE_BYTES + 1)
    return stdin.read(MAX_JOB_FILE_BYTES + 1).encode("utf-8", "surrogatepass")


def _read_file(path: Path, size: int = -1) -> bytes:
    """The first ``size`` bytes of a file, or all of them."""
    require_file(path)
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise refused(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def split_flags(text: str, short_flags: Collection[str] = ()) -> list[str] | None:
    """Split a job line that begins with ``--`` or one of ``short_flags`` as a shell would; None for a bare prompt.

    Within double quotes ``\\(`` stays as it is. Raises UserError (usage) for a quote that is not closed.
    """
    first_word = text.split(maxsplit=1)[0] if text else ""
    if not text.startswith("--") and first_word.partition("=")[0] not in short_flags:
        return None
    try:
        words = shlex.shlex(text, posix=True)
        words.whitespace_split, words.commenters = True, ""
        if os.name == "nt":  # there it parts folders
            words.escape = ""
        return list(words)
    except ValueError as error:
        cause = str(error).lower()  # "no closing quotation" or "no escaped character"
        raise usage_error(f'{text[:60]!a}: {cause}; put text with spaces or apostrophes in "..."') from None


def job_id(settings: Mapping[str, Any], occurrence: int) -> str:
    """Name a job by its content: 16 hex digits, the same for the same settings in any order.

    ``settings`` hold JSON values; ``occurrence`` counts equal jobs of one batch from 0, so that each has its own pictures.
    """
    document = json.dumps([occurrence, dict(settings)], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


class _Entry(NamedTuple):
    """One line of the journal about a picture of a job."""

    file: str
    seed: int  # the job's
    sha256: str | None  # of a picture that was only announced


class Journal:
    """What earlier runs into a folder have finished: a JSON line per picture, appended after the picture is on disk.

    Before that a line with its SHA-256 announces it: after a kill between the two, the file is known by its content.

    A line says ``{"job": ..., "index": ..., "seed": ..., "file": ...}``, or ``{"forgotten": [[job, index, file], ...]}`` of
    what is to be drawn again. Lines that are torn or not ours do not count.
    Each of several processes writes a file of its own, because lines that two machines append to one file of a network
    drive can fall on each other; all of them are read.
    """

    def __init__(self, path: Path, process: int = 0) -> None:
        """Open the journal ``path``, which lies in the folder of its pictures and need not exist yet.

        ``process`` writes to ``path`` itself if it is 0, else to ``STEM-process.SUFFIX`` beside it.
        """
        self.path = path.with_name(f"{path.stem}-{process}{path.suffix}") if process else path
        self._jobs: dict[str, dict[int, list[_Entry]]] = {}
        self._forgotten: set[tuple[str, int, str]] = set()
        others = path.parent.glob(f"{glob.escape(path.stem)}-[0-9]*{glob.escape(path.suffix)}")
        for written in [path, *sorted(others)]:
            for line in _read_file(written).split(b"\n") if written.exists() else ():
                self._remember(line)

    def finished(self, job: str, index: int) -> Path | None:
        """The file of a job's picture if it was finished and is still there."""
        for name, _, sha256 in reversed(self._entries(job, index)):
            path = self.path.parent / name
            if path.is_file() and sha256 in (None, sha256 and sha256_of(path)):
                return path
        return None

    def seed_of(self, job: str) -> int | None:
        """The seed that an earlier run drew for a job, so that its other pictures belong to those that are there."""
        return next((entry.seed for index in self._jobs.get(job, ()) for entry in self._entries(job, index)), None)

    def forget(self, pictures: Mapping[str, Iterable[int]]) -> None:
        """Note that these pictures, job -> indices, are to be drawn again; their files stay. Raises UserError (disk).

        Files are named one by one: those that another process or a later run makes of the same picture count.
        """
        old = [(job, at, entry.file) for job, indices in pictures.items() for at in indices for entry in self._entries(job, at)]
        if old:
            append_line(self.path, json.dumps({"forgotten": old}))
            self._forgotten.update(old)

    def _entries(self, job: str, index: int) -> list[_Entry]:
        entries = self._jobs.get(job, {}).get(index, ())
        return [entry for entry in entries if (job, index, entry.file) not in self._forgotten]

    def announce(self, job: str, index: int, path: Path, seed: int, data: bytes) -> None:
        """Note that ``data`` is about to become the file ``path``, unless another process takes that name first."""
        self.record(job, index, path, seed, sha256=hashlib.sha256(data).hexdigest())

    def record(self, job: str, index: int, path: Path, seed: int, **more: str) -> None:
        """Note a finished picture. ``seed`` is the job's, which picture ``index`` adds its index to.

        Raises ValueError for a picture outside the journal's folder, UserError when the disk says no.
        """
        if path.resolve().parent != self.path.resolve().parent:
            raise ValueError(f"{path} does not lie beside the journal {self.path}")
        line = json.dumps({"job": job, "index": index, "seed": seed, "file": path.name, **more})
        append_line(self.path, line)
        self._remember(line.encode())

    def _remember(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if "forgotten" in entry:
                self._forgotten.update(map(tuple, entry["forgotten"]))
                return
            job, index, seed, name = (entry[key] for key in ("job", "index", "seed", "file"))
            sha256 = entry.get("sha256")
        except (ValueError, TypeError, LookupError, RecursionError):
            return
        is_ours = isinstance(job, str) and type(index) is int and type(seed) is int and isinstance(name, str)
        if is_ours and index >= 0 and seed >= 0 and name not in {".", ".."} and not set(name) & set("/\\\0"):
            self._jobs.setdefault(job, {}).setdefault(index, []).append(_Entry(name, seed, sha256))

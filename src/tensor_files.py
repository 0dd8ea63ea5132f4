"""What stands in a .safetensors header - names, shapes, types, metadata - read in milliseconds and without torch.

Format (huggingface/safetensors): 8 bytes little-endian N, N bytes of JSON, then the tensors' bytes. The JSON maps each
name to ``dtype``, ``shape`` and ``data_offsets`` ``[begin, end]`` counted from the end of the header; ``__metadata__``
maps text to text. The offsets must cover the rest of the file exactly, so a file that was cut off is known at once.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from src.errors import UserError, not_found, refused

MAX_HEADER_BYTES = 16 * 2**20  # SDXL's has 0.3 MB
MAX_TENSORS = 100_000  # SDXL has 2,500

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8,
}  # fmt: skip

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_PICKLE_WAY_OUT = (
    "a pickle can run code when it is opened and is never read here; take the .safetensors version, "
    "or let https://huggingface.co/spaces/safetensors/convert make one"
)
_AGAIN = "copy or download it again"
# First bytes of what is often found under a .safetensors name, and what to say of it.
_STRANGERS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull`, or download the file"),
    (b"<!doctype html", f"is a web page saved under this name (often a login or error page); {_AGAIN}"),
    (b"<html", f"is a web page saved under this name (often a login or error page); {_AGAIN}"),
    (b"pk\x03\x04", f"is a zip or PyTorch archive; {_PICKLE_WAY_OUT}"),
    *((bytes((0x80, protocol)), f"is a pickle; {_PICKLE_WAY_OUT}") for protocol in range(2, 6)),
    (b"gguf", "is a GGUF file, which is not read; take the .safetensors version"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it."""

    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    size_bytes: int
    offset: int  # of its first byte in the file


@dataclass(frozen=True, slots=True)
class Header:
    """Everything a .safetensors file says before its tensors, in the file's order."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check the header of a .safetensors file; no tensor is touched.

    Raises UserError: not found (with the nearest name in that folder), or refused when the file is empty, cut off,
    damaged, too large in its header, or something else under this name (pickle, zip, web page, Git LFS pointer).
    """
    path = Path(path)
    refuse_pickle(path)
    try:
        if not path.exists():
            raise missing(path)
        if not path.is_file():
            raise refused(f"{path}: is not a file; name the .safetensors file itself")
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            start = file.read(64)
            header_bytes = _header_bytes(path, start, file_bytes)
            file.seek(8)
            text = file.read(header_bytes)
    except OSError as error:
        raise refused(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its metadata is not text")
    if len(entries) > MAX_TENSORS:
        raise refused(f"{path}: has {len(entries):,} tensors, the limit is {MAX_TENSORS:,}; it is no image model")
    return Header(_check_tensors(path, entries, 8 + header_bytes, file_bytes), metadata)


def refuse_pickle(path: str | Path) -> None:
    """Refuse a file whose suffix says that it is a pickle (.ckpt, .pt, .bin ...), whether it is there or not."""
    if Path(path).suffix.lower() in PICKLE_SUFFIXES:
        raise refused(f"{path}: {_PICKLE_WAY_OUT}")


def missing(path: Path) -> UserError:
    """The error for a path that is not there, with the nearest name beside it."""
    if not path.parent.is_dir():
        return not_found(f"{path}: not found, nor is the folder {path.parent}; check the path")
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return not_found(f"{path}: not found; {f'did you mean {close[0]!r}?' if close else 'check the path'}")


def quoted(name: str) -> str:
    """A name out of a file, safe to print: control characters escaped, no longer than a line."""
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _header_bytes(path: Path, start: bytes, file_bytes: int) -> int:
    """The header's length, or the reason why this is no .safetensors file."""
    if not start:
        raise refused(f"{path}: is empty (0 bytes); {_AGAIN}")
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 9 and start[8:9] == b"{" and length <= MAX_HEADER_BYTES:
        if 8 + length > file_bytes:
            raise refused(f"{path}: is truncated: {file_bytes:,} bytes of at least {8 + length:,}; {_AGAIN}")
        return length
    # Only now: a sound header of 640 bytes begins exactly like a pickle (0x80 0x02).
    for magic, verdict in _STRANGERS:
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(magic):
            raise refused(f"{path}: {verdict}")
    if start[8:9] == b"{":
        raise refused(f"{path}: its header says {length:,} bytes, the limit is {MAX_HEADER_BYTES:,}; {_AGAIN}")
    raise refused(f"{path}: is not a .safetensors file (no header at its start); {_AGAIN}")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice")
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, a name twice, a number of 10,000 digits
        _damaged(path, "its header is not the JSON it should be")
    if not isinstance(entries, dict):
        _damaged(path, "its header is not a table")
    return entries


def _check_tensors(path: Path, entries: dict[str, Any], start: int, file_bytes: int) -> dict[str, TensorInfo]:
    """Check that every entry is well formed and that together they cover the file from ``start`` without hole or overlap."""
    data_bytes = file_bytes - start
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if not rest:
                pass
            case _:
                _damaged(path, f"the entry of {quoted(name)} is malformed")
        if dtype not in DTYPE_BYTES:
            raise refused(f"{path}: tensor {quoted(name)} has the unknown type {quoted(dtype)}; save it as F16, BF16 or F32")
        if len(shape) > 8 or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            _damaged(path, f"the shape of {quoted(name)} is malformed")
        size_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if end - begin != size_bytes:
            _damaged(path, f"the shape and the offsets of {quoted(name)} disagree")
        tensors[name] = TensorInfo(dtype, tuple(shape), size_bytes, start + begin)
        spans.append((begin, end))
    covered = 0
    for begin, end in sorted(spans):
        if begin != covered:
            _damaged(path, "its tensors overlap or leave holes")
        covered = end
    if covered > data_bytes:
        raise refused(f"{path}: is truncated: {data_bytes:,} of {covered:,} bytes of tensors; {_AGAIN}")
    if covered < data_bytes:
        raise refused(f"{path}: has {data_bytes - covered:,} bytes after its last tensor; the file is damaged, {_AGAIN}")
    return tensors


def _damaged(path: Path, cause: str) -> NoReturn:
    raise refused(f"{path}: the file is damaged: {cause}; {_AGAIN}")

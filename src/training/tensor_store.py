"""Tensors that are kept on disk under the hash of all that they were made from.

A key is the SHA-256 of its ingredients: whatever changes - a byte of a picture, the crop, the model, the precision - asks
for another key, so nothing here can be out of date. Each file is a .safetensors file that holds the hash of its own
content; one that does not agree with it is as good as missing.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from src.files import publish_bytes
from src.folders import make_folder

MEMORY_BYTES = 1 << 30  # of one store; what does not fit is read from the disk each time
_METADATA_KEY = "sha256"  # one alone: the library writes several in random order, and equal entries shall be equal files

Tensors = dict[str, torch.Tensor]


def key_of(**ingredients: Any) -> str:
    """The SHA-256, as 64 hex digits, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


class TensorStore:
    """A folder of tensors by key; the first that are used stay in memory, up to ``memory_bytes``."""

    def __init__(self, folder: Path, say: Callable[[str], None], memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._say = folder, say
        self._room_bytes = memory_bytes
        self._resident: dict[str, Tensors] = {}

    def read(self, key: str, is_right: Callable[[Tensors], bool]) -> Tensors | None:
        """The tensors of ``key``; None if there are none, or they are damaged (which is said) or not ``is_right``."""
        if key in self._resident:
            return self._resident[key]
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"cache   {path.name[:12]}... cannot be read ({error.strerror}) and is made again")
            return None
        tensors = _parse(data, key)
        if tensors is None or not is_right(tensors):
            self._say(f"cache   {path.name[:12]}... is damaged and is made again")
            return None
        self._keep(key, tensors)
        return tensors

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep CPU tensors under ``key``, whole or not at all. Raises UserError (failure) when the disk says no."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        path = self._path(key)
        make_folder(path.parent)
        publish_bytes(path, save(tensors, {_METADATA_KEY: _content_hash(key, tensors)}))
        self._keep(key, tensors)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"

    def _keep(self, key: str, tensors: Tensors) -> None:
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if size_bytes <= self._room_bytes:
            self._room_bytes -= size_bytes
            self._resident[key] = tensors


def _parse(data: bytes, key: str) -> Tensors | None:
    """The tensors of a file's bytes, if these are what was written under ``key``."""
    try:
        (header_bytes,) = struct.unpack_from("<Q", data)  # a .safetensors file begins with its header's length
        metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
        tensors = load(data)
        return tensors if metadata[_METADATA_KEY] == _content_hash(key, tensors) else None
    except Exception:  # a damaged file is anything, and what parsers raise over it has no class in common
        return None


def _content_hash(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of a key and the names, types, shapes and values of its tensors: the format itself has no check sum."""
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

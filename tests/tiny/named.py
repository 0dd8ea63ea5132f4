"""Small files that a request may name: a sound adapter file, a picture; and their hashes."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from PIL import Image


def safetensors(path: Path, value: int = 0, note: str = "") -> Path:
    """A sound .safetensors file of one byte, made by hand from the format's description."""
    header = json.dumps({"__metadata__": {"note": note}, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes([value]))
    return path


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def picture(path: str, colour: int = 0) -> str:
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)
    return path

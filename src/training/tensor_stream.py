"""Tensors as a .safetensors file that is made piece by piece while it is written: one tensor at a time leaves the card.

The format: 8 bytes with the header's length (little-endian), the header (JSON: type, shape and place of each tensor), the
tensors (huggingface.co/docs/safetensors). Widest types first, so that each begins at a multiple of its own size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from src.files import Stream
from src.model_weights import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT_BYTES = 8


def streamed(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Stream:
    """The file that holds ``tensors``, those of floating point as ``dtype`` (None: as they are)."""
    stored = {name: dtype if dtype and item.is_floating_point() else item.dtype for name, item in tensors.items()}
    order = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    offset = 0
    for name in order:
        end = offset + tensors[name].numel() * stored[name].itemsize
        entries[name] = {"dtype": NAMES[stored[name]], "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT_BYTES)

    def pieces() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(header)) + header
        for name in order:
            # Converted on the CPU: on a Mac, a copy that converts may overwrite its source (pytorch#189563).
            held = tensors[name].detach().cpu().to(stored[name]).contiguous()
            yield memoryview(held.reshape(-1).view(torch.uint8).numpy())

    return Stream(8 + len(header) + offset, pieces)

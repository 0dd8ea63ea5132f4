"""Streamed tensors are the file that safetensors writes; and a folder of streams is published as one of bytes is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from src.checkpoints import CheckpointFolder
from src.errors import UserError
from src.files import Stream
from src.model_weights import read_tensors
from src.training.tensor_stream import streamed

TENSORS = {
    "b.weight": torch.randn(3, 5), "a": torch.tensor(7.0), "bits": torch.arange(5, dtype=torch.uint8), "none": torch.zeros(0, 4),
    "half": torch.randn(4).half(), "brain": torch.randn(2, 3).bfloat16(), "turned": torch.randn(4, 6).t(), "ä": torch.arange(3),
}  # fmt: skip


def whole(stream: Stream) -> bytes:
    data = b"".join(bytes(piece) for piece in stream.pieces())
    assert len(data) == stream.size_bytes
    return data


def test_it_is_what_safetensors_reads() -> None:
    data = whole(streamed(TENSORS))
    found = safetensors.torch.load(data)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert data == whole(streamed(TENSORS))
    assert b'"__metadata__":{"format":"pt"}' in data


def test_floats_are_rounded_and_whole_numbers_are_not() -> None:
    found = safetensors.torch.load(whole(streamed(TENSORS, torch.float16)))
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: torch.float16 if tensor.is_floating_point() else tensor.dtype for name, tensor in TENSORS.items()
    }
    assert torch.equal(found["b.weight"], TENSORS["b.weight"].half())


def test_it_is_made_tensor_by_tensor() -> None:
    """Never more than one tensor beside those that are there."""
    stream = streamed({str(number): torch.zeros(1000) for number in range(50)})
    assert max(len(piece) for piece in stream.pieces()) == 4000
    assert stream.size_bytes > 50 * 4000


def test_a_checkpoint_of_streams(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, print)
    saved = folder.save(3, {"state/weights.safetensors": streamed(TENSORS), "small": b"bytes"}, {})
    path = saved.verified("state/weights.safetensors")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == saved.files["state/weights.safetensors"][1]
    found = read_tensors(path, None)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        saved.verified("state/weights.safetensors")


def test_a_stream_that_breaks_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, print)
    folder.publish("final", {"a": b"old"}, {})
    calls = []

    def breaking():
        yield b"first"
        calls.append(1)
        if len(calls) == 2:  # the first time it is hashed
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="free some space"):
        folder.publish("final", {"a": Stream(5, breaking)}, {})
    assert (tmp_path / "final" / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]

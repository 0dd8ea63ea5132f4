"""Tensors on disk by key: what is damaged, foreign or not wanted is never used."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from src.training.tensor_store import TensorStore, key_of

KEY = key_of(a=1)
TENSORS = {"mean": torch.arange(12.0).view(3, 4), "std": torch.ones(2, dtype=torch.float16)}


def anything(tensors: dict) -> bool:
    return True


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def path(tmp_path: Path, said: list[str]) -> Path:
    """The one file of a store in which TENSORS were written."""
    TensorStore(tmp_path, said.append).write(KEY, TENSORS)
    [path] = tmp_path.rglob("*.safetensors")
    return path


def test_what_was_written_is_read_back(tmp_path: Path, path: Path, said: list[str]) -> None:
    assert path == tmp_path / KEY[:2] / f"{KEY}.safetensors"
    read = TensorStore(tmp_path, said.append).read(KEY, anything)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in safetensors.torch.load_file(path).items())
    assert TensorStore(tmp_path, said.append).read(key_of(a=2), anything) is None
    assert said == []


def test_a_key_is_told_by_every_ingredient() -> None:
    keys = [key_of(a=1, b="x"), key_of(a=2, b="x"), key_of(a=1, b="y"), key_of(a=1), key_of(a="1", b="x"), key_of(a=[1], b="x")]
    assert len(set(keys)) == len(keys)
    assert key_of(b="x", a=1) == keys[0]
    assert key_of(size=(1, 2)) == key_of(size=[1, 2])


def test_any_changed_byte_is_noticed(tmp_path: Path, path: Path, said: list[str]) -> None:
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        read = TensorStore(tmp_path, said.append).read(KEY, anything)
        if read is not None and not all(name in read and torch.equal(read[name], TENSORS[name]) for name in TENSORS):
            unnoticed.append(place)
    assert unnoticed == []
    assert all("damaged" in line and "\n" not in line for line in said)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 50, 200, -1])
def test_a_file_that_was_cut_off_is_as_good_as_missing(tmp_path: Path, path: Path, said: list[str], length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert TensorStore(tmp_path, said.append).read(KEY, anything) is None
    assert len(said) == 1


def test_a_file_under_anothers_name_is_not_taken(tmp_path: Path, path: Path, said: list[str]) -> None:
    other = key_of(a=2)
    target = tmp_path / other[:2] / f"{other}.safetensors"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    assert TensorStore(tmp_path, said.append).read(other, anything) is None


def test_what_is_not_right_is_not_used(tmp_path: Path, path: Path, said: list[str]) -> None:
    assert TensorStore(tmp_path, said.append).read(KEY, lambda tensors: "latents" in tensors) is None
    assert len(said) == 1


def test_what_does_not_fit_into_memory_is_read_each_time(tmp_path: Path, said: list[str]) -> None:
    store = TensorStore(tmp_path, said.append, memory_bytes=100)
    one, two = {"x": torch.zeros(20)}, {"x": torch.ones(20)}
    store.write(KEY, one)
    store.write(key_of(a=2), two)
    first = store.read(KEY, anything)
    assert first["x"] is store.read(KEY, anything)["x"]
    again = [store.read(key_of(a=2), anything)["x"] for _ in range(2)]
    assert torch.equal(again[0], two["x"])
    assert again[0] is not again[1]

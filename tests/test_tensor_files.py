import json
import os
import random
import struct
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from src.errors import ExitCode, UserError
from src.tensor_files import MAX_HEADER_BYTES, MAX_TENSORS, quoted, read_header, refuse_pickle


def container(header, data=b"", length=None):
    """A .safetensors file by hand: 8 bytes of length, the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    return caught.value


def test_header_agrees_with_the_safetensors_library(tmp_path):
    tensors = {
        "half": torch.zeros(3, 5, dtype=torch.float16), "brain": torch.zeros(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(4.0), "whole": torch.zeros(2, 2, 2, dtype=torch.int64),
        "none": torch.zeros(0, 7), "tiny": torch.zeros(3).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_base_model_version": "sd_v1", "note": "é"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"ss_base_model_version": "sd_v1", "note": "é"}
    assert {name: (info.dtype, info.shape, info.size_bytes) for name, info in header.tensors.items()} == {
        "half": ("F16", (3, 5), 30), "brain": ("BF16", (2,), 4), "scalar": ("F32", (), 4),
        "whole": ("I64", (2, 2, 2), 64), "none": ("F32", (0, 7), 0), "tiny": ("F8_E4M3", (3,), 3),
    }  # fmt: skip


def test_a_header_of_640_bytes_is_no_pickle(tmp_path):
    """Its length, 0x280 little-endian, begins as a pickle of protocol 2 does."""
    text = json.dumps({"a": entry(0, 1)}).encode().ljust(640)
    (tmp_path / "a.safetensors").write_bytes(container(text, b"x"))
    assert list(read_header(tmp_path / "a.safetensors").tensors) == ["a"]


BROKEN = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\0" * 7, "not a .safetensors file"),
    "random": (b"\xff" * 100, "not a .safetensors file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
    "html": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    "html with a mark": (b"\xef\xbb\xbf<html lang=en>", "web page"),
    "pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94.", "a pickle"),
    "old torch pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "zip or PyTorch archive"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
    "header cut": (container({"a": entry(0, 4)}, b"")[:-10], "is truncated: 58 bytes of at least 68"),
    "data cut": (container({"a": entry(0, 4)}, b"123"), "is truncated: 3 of 4 bytes of tensors"),
    "data left over": (container({"a": entry(0, 4)}, b"12345"), "1 bytes after its last tensor"),
    "header too long": (container({"a": entry(0, 4)}, b"1234", length=MAX_HEADER_BYTES + 1), "the limit is 16,777,216"),
    "no json": (container(b"{'a': 1}"), "not the JSON"),
    "not utf-8": (container(b'{"\xff": 1}'), "not the JSON"),
    "nested": (container(b'{"a":' + b"[" * 200_000), "not the JSON"),
    "long number": (container(b'{"a":' + b"9" * 10_000 + b"}"), "not the JSON"),
    "name twice": (container(b'{"a":1,"a":1}'), "not the JSON"),
    "metadata not text": (container({"__metadata__": {"a": 1}}), "metadata is not text"),
    "metadata a list": (container({"__metadata__": ["a"]}), "metadata is not text"),
    "entry not a table": (container({"a": 3}), "'a' is malformed"),
    "entry with a guest": (container({"a": entry(0, 1) | {"code": "x"}}, b"1"), "'a' is malformed"),
    "three offsets": (container({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"), "'a' is malformed"),
    "unknown type": (container({"a": entry(0, 1, dtype="F5")}, b"1"), "unknown type 'F5'"),
    "negative size": (container({"a": entry(0, 1, shape=[-1, -1])}, b"1"), "shape of 'a'"),
    "fraction": (container({"a": entry(0, 1, shape=[1.0])}, b"1"), "shape of 'a'"),
    "shape and offsets": (container({"a": entry(0, 4, shape=[5])}, b"1234"), "disagree"),
    "overlap": (container({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlap or leave holes"),
    "hole": (container({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"), "overlap or leave holes"),
    "negative offset": (container({"a": entry(-2, 2)}, b"12"), "overlap or leave holes"),
    "too many": (container({str(i): entry(0, 0) for i in range(MAX_TENSORS + 1)}), "the limit is 100,000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_says_why(case, tmp_path):
    content, says = BROKEN[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    error = refusal(path)
    assert says in str(error)
    assert str(path) in str(error)
    assert error.exit_code is ExitCode.REFUSED


def test_a_real_torch_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    assert "huggingface.co/spaces/safetensors/convert" in str(refusal(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["a.ckpt", "a.PT", "a.pth", "a.bin", "a.pkl"])
def test_a_pickle_is_refused_by_its_name_alone(name, tmp_path):
    with pytest.raises(UserError, match="can run code"):
        refuse_pickle(tmp_path / name)
    assert refusal(tmp_path / name).exit_code is ExitCode.REFUSED


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "golden-dog.safetensors").write_bytes(b"")
    error = refusal(tmp_path / "golden-dgo.safetensors")
    assert error.exit_code is ExitCode.NOT_FOUND
    assert "did you mean 'golden-dog.safetensors'?" in str(error)
    assert "nor is the folder" in str(refusal(tmp_path / "nowhere" / "a.safetensors"))


def test_folders_and_pipes_are_refused_without_waiting(tmp_path):
    assert "is not a file" in str(refusal(tmp_path))
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.safetensors")
        assert "is not a file" in str(refusal(tmp_path / "pipe.safetensors"))


def test_names_are_printed_without_their_control_characters():
    assert quoted("a\x1b[31m\n\u202e") == r"'a\x1b[31m\n\u202e'"
    assert len(quoted("x" * 10_000)) < 110


def test_300_damaged_files_either_read_or_are_refused(tmp_path):
    sound = container({"a": entry(0, 8, [2], "F32"), "b": entry(8, 12, [1, 2], "F16")}, b"0123456789ab")
    path = tmp_path / "a.safetensors"
    verdicts = []
    for seed in range(300):
        dice = random.Random(seed)
        damaged = bytearray(sound)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(damaged))
            damaged[at : at + dice.randint(0, 2)] = bytes(dice.choice(b'0129{}[]",:\xff\0') for _ in range(dice.randint(0, 2)))
        path.write_bytes(damaged)
        try:
            read_header(path)
        except UserError:
            verdicts.append(seed)
    assert len(verdicts) > 200, "so few refusals mean that the damage was too gentle"

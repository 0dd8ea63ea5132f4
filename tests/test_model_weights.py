"""Tensors come from files as the safetensors library reads them, in the precision asked for, and in no more memory."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from src import model_weights
from src.config import PROJECT_FOLDER
from tests.tiny import pipelines


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(7, 5, generator=generator)
    tensors = {f"float.{kind}": numbers.to(kind) for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
    tensors |= {"tiny": numbers.to(torch.float8_e4m3fn), "scalar": torch.tensor(4.0), "none": torch.zeros(0, 7)}
    tensors |= {"positions": torch.arange(5)[None], "flags": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_the_librarys_in_the_precision_asked_for(file, dtype) -> None:
    read, expected = model_weights.read_tensors(file, dtype), load_file(file)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert read[name].dtype == wanted.dtype
        assert read[name].shape == wanted.shape
        assert torch.equal(read[name].float(), wanted.float())


def test_only_names_that_begin_so_are_read(file) -> None:
    assert set(model_weights.read_tensors(file, torch.float32, ("flags", "float.torch.b"))) == {"flags", "float.torch.bfloat16"}


def test_a_read_may_give_less_than_was_asked_for(file) -> None:
    class Stuttering:
        name = "a.safetensors"

        def __init__(self, content: bytes) -> None:
            self.content = content

        def readinto(self, buffer: memoryview) -> int:
            count = min(3, len(buffer), len(self.content))
            buffer[:count], self.content = self.content[:count], self.content[count:]
            return count

    buffer = bytearray(10)
    model_weights._read_into(Stuttering(b"0123456789"), memoryview(buffer))
    assert buffer == b"0123456789"
    with pytest.raises(OSError, match="ended early"):
        model_weights._read_into(Stuttering(b"012345678"), memoryview(bytearray(10)))


def test_an_empty_network_has_no_weights_and_draws_no_random_numbers() -> None:
    model = pipelines.sd1()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    unet = model_weights.build_empty(lambda: UNet2DConditionModel.from_config(model.unet.config))
    encoder = model_weights.build_empty(lambda: CLIPTextModel(model.text_encoder.config))
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.device.type for parameter in (*unet.parameters(), *encoder.parameters())} == {"meta"}
    assert {buffer.device.type for buffer in encoder.buffers()} == {"cpu"}  # of no file: they must be real at once
    assert model_weights.fill(unet, model.unet.state_dict()) == []
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(unet.parameters(), model.unet.parameters(), strict=True))


def test_what_no_tensor_came_for_is_named_and_another_shape_refused() -> None:
    layer = model_weights.build_empty(lambda: nn.Linear(3, 2))
    assert model_weights.fill(layer, {"weight": torch.ones(2, 3)}) == ["bias"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model_weights.fill(layer, {"weight": torch.ones(3, 3)})


def test_old_names_become_todays_and_todays_stay() -> None:
    names = ["mid.attentions.0.to_q.weight", "mid.attentions.0.to_out.0.bias", "embeddings.x", "text_model.encoder.y"]
    old = [
        "mid.attentions.0.query.weight",
        "mid.attentions.0.proj_attn.bias",
        "text_model.embeddings.x",
        "text_model.encoder.y",
    ]
    assert list(model_weights.renamed({name: torch.ones(1) for name in old}, names)) == names
    assert list(model_weights.renamed({name: torch.ones(1) for name in names}, names)) == names


MEASURE = """
import json, sys, torch
from pathlib import Path
from src import model_weights
from src.bench.sides import peak_memory_bytes
model_weights.read_tensors(Path(sys.argv[1]), torch.bfloat16, ("warm",))
before = peak_memory_bytes()
tensors = model_weights.read_tensors(Path(sys.argv[1]), torch.bfloat16)
after = peak_memory_bytes()
print(json.dumps({"grown": after - before, "held": sum(tensor.nbytes for tensor in tensors.values())}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts as Linux counts")
def test_reading_fp32_as_bf16_never_holds_fp32(tmp_path) -> None:
    save_file({"warm": torch.ones(1)} | {f"{i}": torch.ones(1 << 20) for i in range(64)}, tmp_path / "a.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "a.safetensors"],
        cwd=PROJECT_FOLDER,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["held"] == 64 * 2**21 + 2
    assert measured["grown"] > 0.9 * measured["held"]
    assert measured["grown"] < 1.2 * measured["held"]  # 1.03; with the file mapped into memory 3

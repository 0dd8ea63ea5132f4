"""Adapters in a running generator: seen anew when their file changes, kept over a reload, never lost in silence."""

import hashlib
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from src.config import AppConfig
from src.errors import UserError
from src.generator import TextToImageGenerator
from src.lora import shelf
from src.lora.shelf import last_of_each
from src.request import LoraChoice
from tests.tiny import pipelines

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pipelines.save(pipelines.sd1(), tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture
def generator(folder, tmp_path) -> TextToImageGenerator:
    config = AppConfig()
    config.model.model_id, config.model.precision, config.model.device = folder, "fp32", "cpu"  # a Path is as good as text
    config.paths.cache, config.generation.num_inference_steps = str(tmp_path / "cache"), 2
    return TextToImageGenerator(config)


def adapter(path: Path, seed: int) -> Path:
    """A kohya file of random weights for the cross-attention of the tiny U-Net."""
    tensors, source = {}, torch.Generator().manual_seed(seed)
    for name, module in pipelines.sd1().unet.named_modules():
        if name.endswith("attn2.to_v"):
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = torch.randn(2, module.in_features, generator=source)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(module.out_features, 2, generator=source)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    os.utime(path, ns=(seed * 10**9, seed * 10**9))  # so that a rewrite within one tick of the clock is another file
    return path


def draw(generator: TextToImageGenerator) -> numpy.ndarray:
    return numpy.asarray(generator.generate(PROMPT, seed=1)[0]).astype(int)


def fresh(generator: TextToImageGenerator, *paths: Path) -> numpy.ndarray:
    other = TextToImageGenerator(generator.config)
    for path in paths:
        other.load_lora_weights(path)
    return draw(other)


def test_swapping_leaves_no_trace_and_unloading_gives_the_base_back(generator, tmp_path) -> None:
    first, second = adapter(tmp_path / "a.safetensors", 1), adapter(tmp_path / "b.safetensors", 2)
    base = draw(generator)
    generator.load_lora_weights(first)
    assert abs(draw(generator) - base).max() > 5
    generator.unload_lora_weights()
    generator.load_lora_weights(second)
    assert numpy.array_equal(draw(generator), fresh(generator, second))
    generator.unload_lora_weights()
    assert numpy.array_equal(draw(generator), base)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_retrained_adapter_is_read_again(generator, tmp_path, in_folder: bool) -> None:
    file = tmp_path / "lora" / "final" / "pytorch_lora_weights.safetensors"
    named = adapter(file, 1).parent if in_folder else adapter(file, 1)
    generator.load_lora_weights(named)
    before = draw(generator)
    adapter(file, 2)
    after = draw(generator)
    assert abs(after - before).max() > 5
    assert numpy.array_equal(after, fresh(generator, named))


def test_an_adapter_is_recorded_as_it_was_read_when_its_file_is_gone(generator, tmp_path) -> None:
    """Its hashes by hand: of the whole file, and of the bytes behind the header, as A1111 takes them."""
    path = adapter(tmp_path / "a.safetensors", 1)
    data = path.read_bytes()
    behind = data[8 + int.from_bytes(data[:8], "little") :]
    generator.load_lora_weights(path)
    (picture,) = generator.generate(PROMPT, seed=1, on_step=lambda step: path.unlink(missing_ok=True))
    (lora,) = json.loads(picture.info["recipe"])["loras"]
    assert not path.exists()
    assert [lora["sha256"], lora["tensors_sha256"]] == [hashlib.sha256(part).hexdigest() for part in (data, behind)]


def test_the_report_is_of_the_adapter_that_was_named(generator, tmp_path) -> None:
    first, second = adapter(tmp_path / "a.safetensors", 1), adapter(tmp_path / "b.safetensors", 2)
    generator.load_lora_weights(first)
    generator.load_lora_weights(second)
    assert generator.load_lora_weights(str(first), scale=0.5).name == "a"
    assert [choice.weight for choice in generator._loras] == [0.5, 1.0]


def test_an_adapter_named_twice_counts_once_however_spelled(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    choices = [LoraChoice(Path("a"), 0.3), LoraChoice(Path("b")), LoraChoice(tmp_path / "x" / ".." / "a", 0.8)]
    assert [(choice.path.name, choice.weight) for choice in last_of_each(choices)] == [("a", 0.8), ("b", 1.0)]


def test_adapters_outlive_a_reload_and_a_failed_one(generator, tmp_path) -> None:
    generator.load_lora_weights(adapter(tmp_path / "a.safetensors", 1))
    expected, model_id = draw(generator), generator.config.model.model_id
    generator.config.model.model_id = str(tmp_path / "typo")
    with pytest.raises(UserError, match="typo"):
        draw(generator)
    generator.config.model.model_id = model_id
    assert numpy.array_equal(draw(generator), expected)


def test_an_adapter_that_does_not_fit_changes_nothing(generator, tmp_path) -> None:
    good, bad = adapter(tmp_path / "a.safetensors", 1), tmp_path / "bad.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 4), "lora_unet_x.lora_up.weight": torch.zeros(4, 2)}, bad)
    generator.load_lora_weights(good)
    expected = draw(generator)
    with pytest.raises(UserError):
        generator.load_lora_weights(bad)
    assert numpy.array_equal(draw(generator), expected)


@pytest.mark.parametrize("path", [None, 5, b"x"])
def test_what_is_no_path_is_one_line(generator, path: object) -> None:
    with pytest.raises(UserError):
        generator.load_lora_weights(path)


def test_large_adapters_do_not_stay_after_use(generator, tmp_path, monkeypatch) -> None:
    paths = [adapter(tmp_path / f"{seed}.safetensors", seed) for seed in range(1, 5)]
    monkeypatch.setattr(shelf, "KEPT_BYTES", 2 * paths[0].stat().st_size)
    for path in paths:
        generator.set_loras([LoraChoice(path)])
    assert [key[0].name for key in generator._shelf._read] == ["2.safetensors", "3.safetensors", "4.safetensors"]
    generator.set_loras([])
    assert [key[0].name for key in generator._shelf._read] == ["3.safetensors", "4.safetensors"]

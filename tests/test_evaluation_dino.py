"""DINO: transformers' own features and preprocessing, and folders that are refused."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from src.errors import ExitCode
from src.evaluation.dino import Dino, check, find
from tests.tiny.model_folders import refusal

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def save_dino(folder: Path, kind: str = "vit") -> Path:
    torch.manual_seed(0)
    network = (
        ViTModel(ViTConfig(intermediate_size=32, **SIZE), add_pooling_layer=False)
        if kind == "vit"
        else Dinov2Model(Dinov2Config(mlp_ratio=2, **SIZE))
    )
    network.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "network"), [("vit", ViTModel), ("dinov2", Dinov2Model)])
def test_features_are_the_class_token_of_transformers(tmp_path: Path, kind: str, network) -> None:
    folder = save_dino(tmp_path / "dino", kind)
    source = numpy.random.default_rng(0)
    pictures = [Image.fromarray(source.integers(0, 256, (height, 40, 3), dtype="uint8")) for height in (40, 70)]
    state = torch.get_rng_state()
    dino = Dino(folder)
    found = dino.picture_features(pictures)
    assert torch.equal(torch.get_rng_state(), state)
    pixels = ViTImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = network.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(found, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-5)


def test_the_one_in_the_cache_comes_before_those_of_the_hubs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    cache = tmp_path / "cache"
    assert find(cache) is None
    storage, commit = tmp_path / "hub" / "models--facebook--dinov2-small", "a" * 40
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(commit)
    in_hub = save_dino(storage / "snapshots" / commit, "dinov2")
    assert find(cache) == in_hub
    own = save_dino(cache / "dino")
    assert find(cache) == own
    (own / "model.safetensors").unlink()
    assert find(cache) == in_hub, "without weights it is none"


def test_what_is_no_dino_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(ExitCode.NOT_FOUND, check, tmp_path / "typo")
    assert "config.json" in refusal(ExitCode.NOT_FOUND, check, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert "'clip'" in refusal(ExitCode.REFUSED, Dino, tmp_path)
    folder = save_dino(tmp_path / "dino")
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert "cannot be loaded" in refusal(ExitCode.REFUSED, Dino, folder)

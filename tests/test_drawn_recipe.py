"""What a drawn picture says it was drawn from."""

import json
from pathlib import Path

import pytest

from src.config import AppConfig
from src.generator import TextToImageGenerator
from tests.tiny import pipelines


@pytest.mark.parametrize(("model", "name"), [("client/project", "project"), ("owner/fox", "owner/fox")])
def test_a_local_folder_is_told_by_its_name_and_a_hub_id_whole(tmp_path, monkeypatch, model: str, name: str) -> None:
    """A folder in a folder is spelled like a hub id."""
    monkeypatch.chdir(tmp_path)
    pipelines.save(pipelines.sd1(), tmp_path / "client" / "project")
    pipelines.vae().save_pretrained("own/vae")
    storage = Path("models/cache/models--owner--fox")
    (storage / "refs").mkdir(parents=True)
    (storage / "snapshots").mkdir()
    (storage / "refs" / "main").write_text("0" * 40)
    (storage / "snapshots" / ("0" * 40)).symlink_to(tmp_path / "client" / "project")
    config = AppConfig()
    config.model.model_id, config.model.vae, config.model.architecture = model, "own/vae", "own/shapes"
    config.model.precision, config.model.device = "fp32", "cpu"
    (picture,) = TextToImageGenerator(config).generate("a cat", seed=1, num_inference_steps=1, width=64, height=64)
    recipe = json.loads(picture.info["recipe"])
    told = [recipe["config"]["model"][key] for key in ("model_id", "vae", "architecture")]
    assert (recipe["model"]["name"], recipe["vae"]["name"], told) == (name, "vae", [name, "vae", "shapes"])
    assert not any(folder in picture.info["recipe"] for folder in ("client", "own/"))

"""Inpainting models in a single file: nine channels, which the configuration of their architecture does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.config import AppConfig
from src.estimate import estimate, find_model
from src.generator import TextToImageGenerator
from src.request import PictureRequest
from tests import original_layout
from tests.test_model_shapes import count
from tests.tiny import pipelines


@pytest.fixture
def config(tmp_path: Path) -> AppConfig:
    """A tiny inpainting file, and the folder of its architecture, whose configuration says four channels."""
    config = AppConfig()
    config.model.architecture = str(pipelines.save(pipelines.sd1(), tmp_path / "four"))
    file = original_layout.write(tmp_path / "inpainting.safetensors", pipelines.sd1(in_channels=9))
    config.model.model_id, config.model.device, config.paths.cache = str(file), "cpu", str(tmp_path / "cache")
    return config


def test_it_is_planned_as_the_model_that_it_is(config: AppConfig) -> None:
    config.generation.num_images = config.generation.batch_size = 4
    answer, shapes = estimate(config, PictureRequest.from_config(config.generation, "-")), find_model(config)[1]
    assert answer.request.batch_size == 1, "one picture at a time"
    generator = TextToImageGenerator(config)
    generator.load_model()
    assert generator._memory._need.batch_size == 1
    assert generator._memory._shapes.parameters == shapes.parameters, "or what is measured would not be found again"
    assert shapes.parameters["unet"] == count(generator.model.pipeline.unet)

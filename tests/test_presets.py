"""Every preset loads, says no more than it must, and names itself in the command of its comment."""

from __future__ import annotations

import shlex
from itertools import pairwise

import pytest

from src.config import PRESETS_FOLDER, AppConfig, load_config, preset_names
from src.model_shapes import bundled_shapes
from src.strict_yaml import read_yaml

MODELS = ["embedded", "ofa-small", "sd15", "sd21", "sd21-base", "sdxl", "small-sd"]
CARDS = ["2gb", "3gb", "4gb", "6gb", "8gb"]


def settings(name: str) -> dict[str, object]:
    sections = read_yaml(PRESETS_FOLDER / f"{name}.yaml")
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def test_the_presets_are_the_promised_ones():
    assert preset_names() == sorted(MODELS + CARDS)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_sets_what_it_says(name):
    config = load_config(name).to_dict()
    for key, value in settings(name).items():
        section, _, field = key.partition(".")
        assert config[section][field] == value


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_repeats_no_default(name):
    defaults = AppConfig().to_dict()
    for key, value in settings(name).items():
        section, _, field = key.partition(".")
        if key != "model.model_id":  # a model preset names its model even when it is the default: it may follow another preset
            assert defaults[section][field] != value, key


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_begins_with_its_purpose_and_its_command(name):
    comment = [line for line in (PRESETS_FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert len(comment) >= 2
    words = shlex.split(comment[-1].removeprefix("# "))
    assert words[:2] == ["python", "main.py"]
    assert words[-2:] == ["--config", name]
    load_config(*(word for before, word in pairwise(words) if before == "--config"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_preset_draws_at_the_size_of_its_model(name):
    config = load_config(name)
    assert bundled_shapes(config.model.model_id) == bundled_shapes(name)
    assert (config.generation.width, config.generation.height) == (None, None)  # the model's own, or that of --init-image


@pytest.mark.parametrize("name", CARDS)
def test_a_card_preset_limits_memory_to_its_name(name):
    config = load_config(name)
    assert config.optimization.max_vram_gb == int(name.removesuffix("gb"))
    assert {key.partition(".")[0] for key in settings(name)} <= {"optimization", "model"}


def test_attention_slicing_is_on_nowhere():
    assert not any(load_config(name).optimization.enable_attention_slicing for name in preset_names())

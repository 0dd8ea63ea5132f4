"""The verb ``attention`` from end to end: the same picture as without recording, and what is written of it."""

from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.torch import load_file

from src.config import AppConfig
from src.errors import UserError
from src.evaluation import attention
from src.evaluation.overlay import heat
from src.generator import TextToImageGenerator
from tests.tiny.evaluation import Run, adapter, model

PROMPT = "a {red|red} circle and a castle"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return model(tmp_path_factory.mktemp("attention") / "tiny")


@pytest.fixture(scope="module")
def run(base) -> Run:
    return Run(attention, base.parent / "out", [PROMPT, "--model", str(base), "--steps", "6", "--seed", "3"])


def test_the_picture_is_the_one_without_recording(run, base) -> None:
    config = AppConfig()
    config.model.model_id, config.model.device, config.model.precision = str(base), "cpu", "fp32"
    (plain,) = TextToImageGenerator(config).generate(PROMPT, seed=3, num_inference_steps=6, width=64, height=64)
    (path,) = run.pictures
    with Image.open(path) as drawn:
        assert numpy.abs(numpy.asarray(drawn, dtype=int) - numpy.asarray(plain, dtype=int)).max() <= 1
        assert "a red circle and a castle" in drawn.info["parameters"]


def test_it_writes_sheet_maps_figures_and_report(run) -> None:
    assert run.code == 0
    result = run.result
    assert [word["word"] for word in result["words"]] == ["red", "circle", "castle"]
    maps = load_file(run.folder / "maps.safetensors")
    assert {name: tuple(item.shape) for name, item in maps.items()} == dict.fromkeys(("red", "circle", "castle"), (6, 8, 8))
    assert result["words"][0]["mean"] == pytest.approx(maps["red"].mean().item())
    assert result["words"][2]["mean_by_call"] == pytest.approx(maps["castle"].mean(dim=(1, 2)).tolist())
    assert result["calls"] == len(result["timesteps"]) == 6
    assert run.page.count("<img") == 4 * 4, "the picture and three words, in all steps and their thirds"
    with Image.open(run.folder / "attention.png") as sheet:
        assert sheet.width > sheet.height


def test_parts_show_each_step(base, tmp_path) -> None:
    arguments = ["a red circle", "--model", str(base), "--steps", "4", "--seed", "3", "--words", "red", "--parts", "4"]
    run = Run(attention, tmp_path / "out", arguments)
    assert run.page.count("<img") == 2 * 5, "the picture and the word, in all steps and in each"
    assert all(f"step {number}<" in run.page for number in range(1, 5))


def test_one_step_has_no_thirds_and_a_lora_may_be_in_it(base, tmp_path) -> None:
    arguments = ["a red circle", "--model", str(base), "--steps", "1", "--words", "red circle"]
    run = Run(attention, tmp_path / "out", [*arguments, "--lora", str(adapter(tmp_path / "a.safetensors"))])
    assert run.page.count("<img") == 2
    assert run.result["loras"] == [["a", 1.0]]
    assert run.result["words"][0]["tokens"] >= 2


def test_sdxl_a_long_prompt_and_a_sampler_that_asks_twice(tmp_path) -> None:
    base = model(tmp_path / "xl", "sdxl")
    prompt = "a castle, " * 14 + "a (blue:1.4) square"
    run = Run(attention, tmp_path / "out", [prompt, "--model", str(base), "--steps", "3", "--sampler", "Heun"])
    assert run.result["calls"] == 5
    assert attention._numbers("call", 0, 2) == "calls 1 to 2"
    words = {word["word"]: word for word in run.result["words"]}
    assert set(words) == {"castle", "blue", "square"}
    assert min(words["square"]["places"]) > 77, "in the second window"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a red circle", "--words", "blue"], "its words are: red, circle"),
        (["the of a"], "no word to show"),
        (["a red circle", "--torch-compile"], "--torch-compile"),
        (["a red circle", "--deep-cache", "2"], "--deep-cache"),
        (["a red circle", "--parts", "0"], "--parts 0 is outside 1 to 50"),
        (["a red circle", "--parts", "6", "--steps", "5"], "--parts 6 is more than --steps 5"),
    ],
)
def test_mistakes_are_refused_before_drawing(base, tmp_path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run(attention, tmp_path / "out", [*arguments, "--model", str(base)])
    assert not list(tmp_path.rglob("*.png"))


def test_heat_is_bright_where_values_are_high() -> None:
    picture = Image.new("RGB", (64, 64), (90, 90, 90))
    values = numpy.zeros((8, 8))
    values[:, 6:] = 1
    found = numpy.asarray(heat(picture, values, 0, 1), dtype=float).mean(axis=(0, 2))
    assert found[:32] == pytest.approx(0.55 * 90, abs=1), "the picture in dim grey"
    assert found[60] > 120
    assert numpy.allclose(numpy.asarray(heat(picture, values * 0, 0, 0)), numpy.asarray(heat(picture, values * 0, 0, 1)))

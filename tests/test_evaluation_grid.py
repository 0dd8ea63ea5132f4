"""The verb ``grid``: each cell is the picture that main.py draws of these settings, models are loaded once, axes are labelled."""

from pathlib import Path

import numpy
import pytest
from PIL import Image

from src import base_models
from src.config import AppConfig
from src.errors import ExitCode, UserError
from src.evaluation import grid
from src.generator import TextToImageGenerator
from tests.tiny.evaluation import Run, adapter, model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return model(tmp_path_factory.mktemp("grid") / "tiny")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The models that were loaded."""
    found, load = [], base_models.load
    monkeypatch.setattr(base_models, "load", lambda config: found.append(config.model.model_id) or load(config))
    return found


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as picture:
        return numpy.asarray(picture, dtype=int)


def test_cells_are_the_pictures_of_their_settings(base, tmp_path, loads) -> None:
    arguments = ["--prompt", "a red circle", "--model", str(base), "--x", "steps=1,2", "--y", "seed=5-6"]
    run = Run(grid, tmp_path / "out", arguments)
    assert (run.code, loads) == (ExitCode.OK, [str(base)])
    config = AppConfig()
    config.model.model_id, config.model.device, config.model.precision = str(base), "cpu", "fp32"
    generator = TextToImageGenerator(config)
    cells = run.result["cells"]
    assert [(cell["row"], cell["column"], cell["seed"], cell["steps"]) for cell in cells] == [
        (0, 0, 5, 1), (0, 1, 5, 2), (1, 0, 6, 1), (1, 1, 6, 2),
    ]  # fmt: skip
    for cell in cells:
        (wanted,) = generator.generate(
            "a red circle", seed=cell["seed"], num_inference_steps=cell["steps"], width=64, height=64
        )
        assert numpy.abs(pixels(run.folder / cell["file"]) - numpy.asarray(wanted, dtype=int)).max() <= 1
    with Image.open(run.folder / cells[3]["file"]) as picture:
        assert "Seed: 6" in picture.info["parameters"]
    assert run.page.count("<img") == 4
    assert all(label in run.page for label in ("steps 1", "steps 2", "seed 5", "seed 6", "a red circle · "))
    with Image.open(run.folder / "grid.png") as sheet:
        assert sheet.info["title"].startswith("a red circle")
        assert "steps" not in sheet.info["title"]
        assert min(sheet.size) > 2 * 128


def test_a_model_is_loaded_once_though_it_is_the_inner_axis(base, tmp_path, loads) -> None:
    other = model(tmp_path / "other", seed=1)
    first, second = adapter(tmp_path / "one.safetensors", 1), adapter(tmp_path / "two.safetensors", 2)
    arguments = ["--prompt", "a", "--steps", "1", "--x", f"model={base},{other}", "--y", f"lora=none,{first},{second}:0.5"]
    run = Run(grid, tmp_path / "out", arguments)
    assert loads == [str(base), str(other)]
    cells = {(cell["row"], cell["column"]): cell for cell in run.result["cells"]}
    assert [cells[row, 0]["loras"] for row in range(3)] == [[], [["one", 1.0]], [["two", 0.5]]]
    assert [cells[0, column]["model"] for column in range(2)] == ["tiny", "other"]
    assert len({pixels(run.folder / cell["file"]).tobytes() for cell in cells.values()}) == 6


def test_weights_of_adapters_over_checkpoints(base, tmp_path) -> None:
    one, two = adapter(tmp_path / "step1.safetensors", 1), adapter(tmp_path / "step2.safetensors", 2)
    arguments = ["--prompt", "a", "--model", str(base), "--steps", "1", "--x", "lora_scale=0.5,1", "--y", f"lora={one},{two}"]
    run = Run(grid, tmp_path / "out", arguments)
    assert [cell["loras"] for cell in run.result["cells"]] == [
        [["step1", 0.5]], [["step1", 1.0]], [["step2", 0.5]], [["step2", 1.0]],
    ]  # fmt: skip


def test_the_title_names_an_adapter_whose_weight_varies(base, tmp_path) -> None:
    arguments = [
        "--prompt",
        "a",
        "--model",
        str(base),
        "--steps",
        "1",
        "--lora",
        f"{adapter(tmp_path / 'fox.safetensors')}:0.7",
    ]
    run = Run(grid, tmp_path / "out", [*arguments, "--x", "lora_scale=0.5"])
    assert " · fox · " in run.result["title"]


def test_one_axis_is_a_row_and_a_cell_that_fails_is_left_empty(base, tmp_path) -> None:
    run = Run(grid, tmp_path / "out", ["--prompt", "a", "--model", str(base), "--steps", "1", "--x", "clip_skip=9,1"])
    assert run.code == ExitCode.PARTLY_FAILED
    assert "has 3 layers" in run.result["cells"][0]["error"]
    assert run.result["cells"][1]["model"] == "tiny"
    assert any("column 1 is left empty" in line for line in run.said)
    assert run.page.count("<img") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "--x is missing"),
        (["--x", "steps=1"], "the prompt is missing"),
        (["--prompt", "a", "--x", "steps=0,1"], "steps 0 is out of range"),
        (["--prompt", "a", "--x", "steps=one"], "whole number"),
        (["--prompt", "a", "--x", "model=./nowhere"], "nowhere"),
        (["--prompt", "a", "--x", "lora=./nowhere.safetensors"], "nowhere"),
        (["--prompt", "a", "--x", "scheduler=eulr"], "did you mean 'euler'"),
        (["--prompt", "a", "--x", "strength=0.3,0.6"], "--init-image"),
        (["--prompt", "a", "--seed", "3", "--x", "seed=1-2"], "leave the flag out"),
        (["--prompt", "a", "--x", "seed=0-99", "--y", "steps=1-99"], "more than 1,024"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(tmp_path, loads, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run(grid, tmp_path / "out", arguments)
    assert loads == []

"""The verb ``compare``: the same prompts and seeds on both sides, figures that are those of the pictures, sides told apart."""

import shutil
import statistics
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from src.errors import UserError
from src.evaluation import compare
from src.evaluation.arms import Shot
from src.training.scores import Clip
from tests.test_training_scores import save_clip
from tests.tiny.evaluation import Run, adapter, model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return model(tmp_path_factory.mktemp("compare") / "tiny")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("judge") / "clip")


def open_rgb(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_a_model_with_and_without_an_adapter(base, clip, tmp_path) -> None:
    lora = adapter(tmp_path / "dog.safetensors")
    (tmp_path / "prompts.txt").write_text("a (red:1.2) circle\na blue square\n")
    arguments = ["none", f"{lora}:0.8", "--model", str(base), "--prompts", str(tmp_path / "prompts.txt"), "--num", "2"]
    run = Run(compare, tmp_path / "out", [*arguments, "--steps", "1", "--seed", "4", "--clip", str(clip)])
    result = run.result
    one, other = result["sides"]
    assert (one["label"], other["label"], result["pictures"], result["clip"]) == ("A: no LoRA", "B: dog 0.8", 4, "clip")
    wanted = [(prompt, seed) for prompt in ("a (red:1.2) circle", "a blue square") for seed in (4, 5)]
    for side, loras in ((one, []), (other, [["dog", 0.8]])):
        assert [(item["prompt"], item["seed"]) for item in side["pictures"]] == wanted
        assert all(item["loras"] == loras for item in side["pictures"])
    judge = Clip(clip)
    texts = judge.text_features(["a red circle", "a red circle", "a blue square", "a blue square"])
    for side in (one, other):
        seen = judge.picture_features([open_rgb(run.folder / item["file"]) for item in side["pictures"]])
        scores = (100 * torch.nn.functional.cosine_similarity(seen, texts)).tolist()
        assert [item["clip_score"] for item in side["pictures"]] == pytest.approx(scores, abs=1e-3)
        assert side["clip_score"]["mean"] == pytest.approx(statistics.fmean(scores), abs=1e-3)
    assert (result["prompts"], one["clip_score"]["count"], one["clip_score"]["of"]) == (2, 2, "prompts")
    of_prompts = [statistics.fmean(scores[:2]), statistics.fmean(scores[2:])]  # of the other side
    assert other["clip_score"]["standard_error"] == pytest.approx(abs(of_prompts[0] - of_prompts[1]) / 2, abs=1e-3)
    assert all(item["prompt_weights"] for item in one["pictures"])
    gains = [b["clip_score"] - a["clip_score"] for a, b in zip(one["pictures"], other["pictures"])]
    assert result["clip_score_difference"]["mean"] == pytest.approx(statistics.fmean(gains))
    levels = [
        numpy.abs(
            numpy.asarray(open_rgb(run.folder / a["file"]), float) - numpy.asarray(open_rgb(run.folder / b["file"]), float)
        )
        for a, b in zip(one["pictures"], other["pictures"])
    ]
    assert result["pixel_difference"]["mean"] == pytest.approx(numpy.mean(levels), rel=1e-4)
    assert run.page.count("<img") == 8
    assert (run.folder / "sheet.png").is_file()


def test_two_models_without_a_judge(base, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    other = model(tmp_path / "other", "sdxl")
    run = Run(compare, tmp_path / "out", [str(base), str(other), "--prompt", "a circle", "--num", "1", "--steps", "1"])
    assert [side["pictures"][0]["model"] for side in run.result["sides"]] == ["tiny", "other"]
    assert run.result["clip"] is None
    assert any(line.startswith("scores  none") for line in run.said)
    assert "pixel difference" in capsys.readouterr().out


def test_where_judging_fails_the_sheet_is_there(base, clip, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("src.evaluation.likeness.features_of", lambda *_: 1 / 0)
    lora = adapter(tmp_path / "dog.safetensors")
    arguments = [str(lora), "none", "--model", str(base), "--prompt", "a", "--num", "1", "--steps", "1", "--clip", str(clip)]
    with pytest.raises(ZeroDivisionError):
        Run(compare, tmp_path / "out", arguments)
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 2


def test_a_judge_that_cannot_be_loaded_is_known_before_anything_is_drawn(base, clip, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    broken = tmp_path / "cache" / "clip"  # where one is looked for
    shutil.copytree(clip, broken)
    (broken / "model.safetensors").write_bytes(b"cut off")
    lora = adapter(tmp_path / "dog.safetensors")
    arguments = [str(lora), "none", "--model", str(base), "--prompt", "a", "--num", "1", "--steps", "1"]
    with pytest.raises(UserError, match="no CLIP that can be loaded"):
        Run(compare, tmp_path / "named", [*arguments, "--clip", str(broken)])
    assert not list(tmp_path.rglob("*.png"))
    run = Run(compare, tmp_path / "out", arguments)  # nobody asked for this one: pictures without scores
    assert run.result["clip"] is None
    assert any(line.startswith("scores  none") for line in run.said)


def test_clip_reads_the_prompt_as_it_was_drawn(tmp_path) -> None:
    shot = {"prompt": "un(believ)able", "prompt_weights": True}
    assert Shot(tmp_path, shot, None).text == "unbelievable"
    assert Shot(tmp_path, shot | {"prompt_weights": False}, None).text == "un(believ)able"


def test_the_same_twice_differs_in_nothing(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    lora = adapter(tmp_path / "dog.safetensors")
    run = Run(
        compare, tmp_path / "out", ["none", f"{lora}:0", "--model", str(base), "--prompt", "a", "--num", "1", "--steps", "1"]
    )
    assert run.result["pixel_difference"]["mean"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embedded", "embedded", "--prompt", "a"], "A and B are both"),
        (["embedded", "sd15", "--prompt", "a", "--model", "sd21"], "leave it out"),
        (["embedded", "none"], "give the prompts"),
        (["embedded", "none", "--prompt", "a", "--num", "0"], "--num 0"),
        (["embedded", "./nowhere", "--prompt", "a"], "nowhere"),
        (
            ["none", "LORA", "--model", "BASE", "--prompt", "a <lora:tiny:1>", "--set", "paths.lora=SHELF"],
            "drawn on every side",
        ),
        (["embedded", "none", "--model", "embedded", "--prompt", "a", "--clip", "./nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(base, tmp_path, arguments: list[str], message: str) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    names = {"BASE": base, "LORA": adapter(shelf / "tiny.safetensors", seed=1), "SHELF": shelf}
    for name, place in names.items():
        arguments = [word.replace(name, str(place)) for word in arguments]
    with pytest.raises(UserError, match=message):
        Run(compare, tmp_path / "out", arguments)
    assert not list(tmp_path.rglob("*.png"))

"""Likeness: cosines over pairs by hand, differences of pixels, means with their errors, the judge that is chosen."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.errors import ExitCode
from src.evaluation import likeness
from src.evaluation.likeness import Mean, clip_folder, consistency, features_of, open_clip, pixel_difference, say_cut
from src.evaluation.listing import text_table
from src.model_files import EMBEDDED
from tests.test_training_scores import save_clip
from tests.tiny.model_folders import refusal


def test_consistency_is_the_mean_over_all_pairs() -> None:
    features = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(one @ other) for one, other in itertools.combinations(features, 2)]
    assert consistency(features) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert consistency(features[:1].repeat(4, 1)) == pytest.approx(1)
    assert consistency(torch.eye(3)) == pytest.approx(0)
    assert consistency(features[:1]) is None


def test_means_and_their_errors() -> None:
    found = Mean.of([1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.count) == (2.5, 4)
    assert found.error == pytest.approx(math.sqrt((2.25 + 0.25) * 2 / 3) / 2)
    assert str(found) == "2.500 ± 0.645"
    assert (Mean.of([3.0]).error, str(Mean.of([3.0])), Mean.of([])) == (None, "3.000", None)


def test_the_error_of_prompts_with_several_seeds_is_that_of_the_prompts() -> None:
    """Seeds that all agree say nothing new: the error is that of two values, and not of eight."""
    values, prompts = [1.0] * 4 + [3.0] * 4, ["a"] * 4 + ["b"] * 4
    found = Mean.over_prompts(values, prompts)
    assert (found.value, found.error, found.count, found.as_json()["of"]) == (2.0, pytest.approx(1.0), 2, "prompts")
    assert Mean.over_prompts([*values, 5.0, None], [*prompts, "b", "c"]).value == pytest.approx((1.0 + 17 / 5) / 2)
    one = Mean.over_prompts([1.0, 3.0], ["a", "a"])
    assert (one.count, one.error, one.as_json()["of"]) == (2, pytest.approx(1.0), "pictures")
    assert Mean.over_prompts([None], ["a"]) is None


def test_pixel_difference() -> None:
    grey = Image.new("RGB", (4, 4), (10, 10, 10))
    assert pixel_difference(grey, Image.new("RGB", (4, 4), (13, 10, 4))) == pytest.approx(3)
    assert pixel_difference(grey, grey) == 0
    assert pixel_difference(grey, Image.new("RGB", (4, 5))) is None


def test_features_are_in_the_order_of_the_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(likeness, "BATCH", 2)
    paths = []
    for level in (5, 1, 9):
        paths.append(tmp_path / f"{level}.png")
        Image.new("RGB", (2, 2), (level, 0, 0)).save(paths[-1])
    found = features_of(paths, lambda pictures: torch.tensor([[float(item.getpixel((0, 0))[0])] for item in pictures]))
    assert found.tolist() == [[5.0], [1.0], [9.0]]


def test_the_judge_is_the_one_named_or_the_first_that_knows_these_pictures(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    monkeypatch.setattr("src.training.scores.EMBEDDED", tmp_path / "embedded")
    cache = tmp_path / "cache"
    assert "--clip FOLDER" in refusal(ExitCode.NOT_FOUND, clip_folder, None, ["tiny"], cache)
    general = save_clip(cache / "clip")
    assert clip_folder(None, ["tiny"], cache) == clip_folder(None, ["embedded", "tiny"], cache) == general
    assert "models/embedded/clip" in refusal(ExitCode.NOT_FOUND, clip_folder, None, ["embedded"], cache)
    own = save_clip(tmp_path / "embedded" / "clip")
    assert clip_folder(None, ["embedded", "embedded"], cache) == own
    assert clip_folder(None, ["embedded", str(EMBEDDED)], cache) == own, "its folder is the embedded model, too"
    namesake = tmp_path / "other" / "embedded"
    namesake.mkdir(parents=True)
    assert clip_folder(None, [str(namesake)], cache) == general, "a name does not make it one"
    assert clip_folder(str(general), ["embedded"], cache) == general
    assert "no such folder" in refusal(ExitCode.NOT_FOUND, clip_folder, str(tmp_path / "typo"), ["tiny"], cache)
    assert "both towers" in refusal(ExitCode.REFUSED, clip_folder, str(namesake), ["tiny"], cache)
    assert open_clip(general).picture_features([Image.new("RGB", (40, 40))]).shape == (1, 16)
    assert "no CLIP that can be loaded" in refusal(ExitCode.REFUSED, open_clip, tmp_path)


def test_prompts_that_clip_reads_by_their_beginning_are_counted_once_each(tmp_path: Path) -> None:
    said: list[str] = []
    clip = open_clip(save_clip(tmp_path / "clip"))
    say_cut(clip, ["a circle"], said.append)
    assert said == []
    say_cut(clip, ["circle " * 90, "circle " * 90, "a circle"], said.append)
    assert said == ["prompts 1 prompt longer than CLIP's window: compared by their beginning"]


def test_tables_for_the_terminal() -> None:
    assert text_table(["", "score"], [["model", 0.123456], ["other one", None]]) == [
        "            score", "model      0.1235", "other one       –",
    ]  # fmt: skip

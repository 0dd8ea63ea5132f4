"""Likeness: cosines over pairs by hand, differences of pixels, means with their errors, the judge that is chosen."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.errors import ExitCode
from src.evaluation import likeness
from src.evaluation.likeness import Mean, clip_folder, consistency, features_of, open_clip, pixel_difference
from src.evaluation.listing import text_table
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
    assert clip_folder(str(general), ["embedded"], cache) == general
    assert "no such folder" in refusal(ExitCode.NOT_FOUND, clip_folder, str(tmp_path / "typo"), ["tiny"], cache)
    assert open_clip(general).picture_features([Image.new("RGB", (40, 40))]).shape == (1, 16)
    assert "no CLIP that can be loaded" in refusal(ExitCode.REFUSED, open_clip, tmp_path)


def test_tables_for_the_terminal() -> None:
    assert text_table(["", "score"], [["model", 0.123456], ["other one", None]]) == [
        "            score", "model      0.1235", "other one       –",
    ]  # fmt: skip

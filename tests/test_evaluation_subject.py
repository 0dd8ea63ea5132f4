"""The verb ``subject``: the figures of a training's own scorer, with and without the adapter, and consistency by pairs."""

import itertools
import shutil
import statistics
from pathlib import Path

import pytest
from PIL import Image

from src.errors import UserError
from src.evaluation import subject
from src.training.scores import Clip, Score, Scorer, balance
from tests.test_evaluation_dino import save_dino
from tests.test_training_scores import save_clip
from tests.tiny import training
from tests.tiny.evaluation import Run, adapter, model

PROMPTS = ("a photo of sks dog on a hill", "a red circle", "sks dog, ink")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    model(folder / "tiny")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    training.photos(folder / "photos", 5)
    adapter(folder / "dog.safetensors")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def arguments(place: Path, *more: str) -> list[str]:
    own = ["--photos", str(place / "photos"), "--lora", str(place / "dog.safetensors"), "--model", str(place / "tiny")]
    return [*own, "--prompts", str(place / "prompts.txt"), "--num", "2", "--steps", "1", *more]


@pytest.fixture(scope="module")
def run(place) -> Run:
    judges = ["--clip", str(place / "clip"), "--dino", str(place / "dino"), "--trigger", "sks dog"]
    return Run(subject, place / "out", arguments(place, *judges))


def pictures(run: Run, arm: int) -> list[Image.Image]:
    found = []
    for item in run.result["arms"][arm]:
        with Image.open(run.folder / item["file"]) as picture:
            found.append(picture.convert("RGB"))
    return found


def test_figures_are_those_of_a_trainings_scorer(run, place) -> None:
    photos = [Image.open(path).convert("RGB") for path in sorted((place / "photos").glob("*.png"))]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    scorer = Scorer(Clip(place / "clip"), photos, prompts, "sks dog")
    scores = [scorer.score(pictures(run, arm)) for arm in (0, 1)]
    figures = run.result["figures"]
    for label, wanted in zip(("without dog", "with dog"), scores):
        assert figures[label]["clip_i"] == pytest.approx(wanted.clip_i, abs=1e-5)
        assert figures[label]["clip_t"] == pytest.approx(wanted.clip_t, abs=1e-5)
    assert figures["with dog"]["balance"] == pytest.approx(
        balance(*map(lambda item: Score(item.clip_i, item.clip_t), scores[::-1])), abs=1e-4
    )


def test_consistency_is_of_the_pictures_that_show_the_subject(run, place) -> None:
    features = Clip(place / "clip").picture_features(pictures(run, 1))
    shown = [features[index] for index in (0, 1, 4, 5)]
    pairs = [float(one @ other) for one, other in itertools.combinations(shown, 2)]
    figures = run.result["figures"]
    assert figures["with dog"]["consistency"] == pytest.approx(statistics.fmean(pairs), abs=1e-5)
    assert figures["with dog"]["dino_consistency"] != pytest.approx(statistics.fmean(pairs), abs=1e-5)


def test_both_arms_differ_in_the_adapter_alone(run) -> None:
    without, with_it = run.result["arms"]
    assert [item["loras"] for item in without] == [[]] * 6
    assert [item["loras"] for item in with_it] == [[["dog", 1.0]]] * 6
    assert [(item["prompt"], item["seed"]) for item in without] == [(item["prompt"], item["seed"]) for item in with_it]
    assert run.result["judges"] == ["clip", "dino"]
    assert run.page.count("<img") == 5 + 12


def test_dino_alone(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    run = Run(subject, tmp_path / "out", arguments(place, "--dino", str(place / "dino")))
    figures = run.result["figures"]["with dog"]
    assert figures["clip_i"] is None is figures["clip_t"]
    assert -1 <= figures["dino"] <= 1
    assert any("by DINO alone" in line for line in run.said)


def test_a_dino_on_this_disk_judges_without_being_named(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    shutil.copytree(place / "dino", tmp_path / "cache" / "dino")
    run = Run(subject, tmp_path / "out", [*arguments(place), "--num", "1"])
    assert run.result["judges"] == ["dino"]
    assert run.result["figures"]["with dog"]["dino"] is not None


def test_a_photo_that_cannot_be_read_is_known_before_anything_is_drawn(place, tmp_path) -> None:
    photos = shutil.copytree(place / "photos", tmp_path / "photos")
    next(photos.glob("*.png")).write_bytes(b"cut off")
    with pytest.raises(UserError, match="photos"):
        Run(subject, tmp_path / "out", arguments(place, "--photos", str(photos), "--clip", str(place / "clip")))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_where_judging_fails_the_sheet_is_there(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subject._Jury, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run(subject, tmp_path / "out", arguments(place, "--clip", str(place / "clip")))
    assert (tmp_path / "out" / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--clip FOLDER"),
        (["--clip", "./nowhere"], "nowhere: no such folder"),
        (["--dino", "./nowhere"], "nowhere: no such folder"),
        (["--photos", "./nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(place, tmp_path, monkeypatch, more: list[str], message: str) -> None:
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    with pytest.raises(UserError, match=message):
        Run(subject, tmp_path / "out", arguments(place, *more))
    with pytest.raises(UserError, match="--photos is missing"):
        Run(subject, tmp_path / "out", ["--lora", "a"])
    assert not list(tmp_path.rglob("*.png"))


def test_a_trigger_that_no_prompt_has_is_refused_before_drawing(place, tmp_path) -> None:
    judge = ["--clip", str(place / "clip"), "--trigger"]
    with pytest.raises(UserError, match="'sks dgo': no prompt has it"):
        Run(subject, tmp_path / "out", arguments(place, *judge, "sks dgo"))
    assert not list(tmp_path.rglob("*.png"))
    (tmp_path / "prompts.txt").write_text("a photo of a (sks:1.2) dog")
    more = [*arguments(place, *judge, "sks dog"), "--prompts", str(tmp_path / "prompts.txt"), "--num", "1"]
    assert Run(subject, tmp_path / "out", more).code == 0

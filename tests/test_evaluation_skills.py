"""Prompts are of the splits and kinds that are asked for; shares have Wilson's intervals; a picture counts for what it is asked."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from src.errors import UserError
from src.evaluation.checking import Verdict
from src.evaluation.skills import SKILLS, Judged, Scores, Share, choose
from src.scenes import grammar


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (7, 20), (81, 263), (500, 500)])
def test_wilson_interval_solves_its_equation(right: int, count: int) -> None:
    """The bounds are where the share lies 1.96 standard errors away, by the bound's own standard error (Wilson 1927)."""
    share = right / count
    for bound in Share(right, count).interval:
        assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / count), abs=1e-7)
    low, high = Share(81, 263).interval
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3
    assert Share(0, 0).interval is None


def test_half_is_held_out_and_half_unseen_evenly_over_kinds() -> None:
    scenes = choose(61, 3, "both")
    assert Counter(grammar.split_of(scene) for scene in scenes) == {"held-out": 31, "unseen": 30}
    kinds = Counter(scene.kind for scene in scenes[:31])
    assert set(kinds) == set(grammar.KINDS)
    assert max(kinds.values()) - min(kinds.values()) <= 1
    assert len({scene.caption for scene in scenes}) == 61
    assert choose(61, 3, "both") == scenes
    assert choose(61, 4, "both") != scenes


def test_the_first_grammar_is_plain() -> None:
    scenes = choose(30, 0, "held-out", "v0")
    assert Counter(scene.kind for scene in scenes) == {"one": 10, "pair": 10, "group": 10}
    assert {scene.background.kind for scene in scenes} == {"plain"}
    assert not any("outline" in scene.caption or "inside" in scene.caption for scene in scenes)
    assert choose(5, 0, "both", "simple")[:3] == [scene for scene in choose(9, 0, "held-out", "v0") if scene.kind == "one"]
    assert len(choose(5, 0, "both", "simple")) == 5


def test_captions_come_again_only_when_all_have_come() -> None:
    captions = Counter(scene.caption for scene in choose(160, 0, "held-out") if scene.kind == "landscape")
    assert captions.total() == 40
    assert max(captions.values()) - min(captions.values()) <= 1
    assert len({scene.caption for scene in choose(160, 0, "held-out") if scene.kind != "landscape"}) == 120
    with pytest.raises(UserError, match="at least one"):
        choose(0, 0, "both")


def test_a_picture_counts_for_each_skill_it_is_asked_and_only_when_all_is_right() -> None:
    scenes = choose(96, 1, "both")
    right, wrong = Verdict(True, True, True), Verdict(True, False, True)
    scores = Scores(tuple(Judged(scene, i, right if i % 3 else wrong) for i, scene in enumerate(scenes)))
    for name, share in scores.skills.items():
        asked = [i for i, scene in enumerate(scenes) if SKILLS[name][1](scene)]
        assert (share.right, share.count) == (sum(i % 3 > 0 for i in asked), len(asked))
        assert share.count > 0
    assert (scores.overall.count, scores.skills["unseen combinations"].count) == (48, 48)
    assert all(grammar.split_of(scene) == "held-out" for scene in scenes if SKILLS["overall"][1](scene))
    assert (scores.checks["count"].right, scores.checks["count"].count) == (64, 96)
    assert scores.checks["position"] == Share(0, 0)
    landscapes = scores.skills["landscapes"]
    assert (landscapes.count, landscapes.captions) == (12, None)
    lines = [line for line in scores.lines() if " to " in line]
    assert len({line.index(" to ") for line in lines if "two to" not in line}) == 1  # aligned


def test_pictures_of_one_caption_count_once_for_the_interval() -> None:
    scenes = choose(160, 0, "held-out")
    scores = Scores(tuple(Judged(scene, i, Verdict(True, i % 4 > 0, True)) for i, scene in enumerate(scenes)))
    share = scores.skills["landscapes"]
    distinct = len({scene.caption for scene in scenes if scene.kind == "landscape"})
    assert (share.count, share.captions) == (40, distinct)
    assert distinct < 20
    low, high = share.interval
    for bound in (low, high):  # Wilson's equation for so many captions
        away = 1.959964 * math.sqrt(bound * (1 - bound) / distinct)
        assert abs(share.value - bound) == pytest.approx(away, abs=1e-7)
    assert scores.skills["counting"].captions is None
    assert share.as_dict()["captions"] == distinct
    assert scores.skills["counting"].as_dict()["captions"] == 40
    words = f"40 pictures of {distinct} captions"
    assert str(share).endswith(words)
    assert [line.split()[0] for line in scores.lines() if words in line] == ["landscapes"]

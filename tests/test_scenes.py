"""The grammar keeps its word: captions say what the data says, splits do not meet, things have room; the drawing is where it says."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from src.scenes import drawing, facts, grammar
from src.scenes.grammar import COLOURS, KINDS, SHAPES, SIZE_PX, Background, Scene, Thing

SCENES = list(islice(grammar.scenes(3, "train"), 3000))


def test_the_same_seed_gives_the_same_scenes_and_another_seed_others() -> None:
    again = list(islice(grammar.scenes(3, "train"), 50))
    assert again == SCENES[:50]
    assert list(islice(grammar.scenes(4, "train"), 50)) != again
    assert np.array_equal(drawing.draw(again[0]), drawing.draw(SCENES[0]))


def test_a_scene_survives_json() -> None:
    for scene in SCENES[:300]:
        assert Scene.from_dict(json.loads(json.dumps(scene.as_dict()))) == scene


def test_captions_say_what_is_there() -> None:
    for scene in SCENES:
        words = scene.caption.split()
        assert len(words) <= 26  # of 30 tokens
        if scene.landscape is not None:
            assert scene.landscape.house in words
            assert scene.landscape.house != scene.landscape.hills
            assert scene.landscape.time in scene.caption
            continue
        assert scene.caption.endswith(f"on {grammar.describe(scene.background)}")
        for thing in scene.things:
            assert thing.colour in words
            assert thing.shape in scene.caption
            assert thing.colour not in scene.background.colours
            assert thing.outline not in (thing.colour, *scene.background.colours)
        assert re.search(r"\ban [^aeiou]|\ba [aeiou]", scene.caption) is None
        if scene.kind == "group":
            assert words[0] == grammar.NUMBERS[len(scene.things)]
        if scene.relation:
            assert f" {scene.relation} " in scene.caption


def test_answers_are_all_that_captions_say_and_nothing_else() -> None:
    of_caption: dict[str, tuple[int, ...]] = {}
    for scene in SCENES:
        caption = scene.caption.removeprefix("a picture of ")
        answered = facts.answers(scene)
        assert of_caption.setdefault(caption, answered) == answered  # the same words, the same answers
        said = [possible[place] for possible, place in zip(facts.QUESTIONS.values(), answered)]
        for question, word in zip(facts.QUESTIONS, said):
            if question == "number":
                word = grammar.NUMBERS.get(word) if scene.kind == "group" else None
            if question not in ("kind", "trees") and word not in (None, "plain"):
                assert word in caption, (question, caption)
    assert len(set(of_caption.values())) == len(of_caption)  # other words, other answers


def test_things_are_where_the_caption_says() -> None:
    for scene in SCENES:
        first = scene.things[0] if scene.things else None
        if scene.position:
            x, y = grammar.POSITIONS[scene.position]
            assert math.hypot(first.x - x * SIZE_PX, first.y - y * SIZE_PX) < 20
        if scene.relation:
            second = scene.things[1]
            right, down = first.x - second.x, first.y - second.y
            sides = {"left of": -right, "right of": right, "above": -down, "below": down}
            assert sides.get(scene.relation, 100) > 30
            assert scene.relation != "inside" or (right, down) == (0, 0)
        apart = [
            math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius for i, a in enumerate(scene.things) for b in scene.things[:i]
        ]
        assert scene.relation == "inside" or all(gap >= grammar.GAP_PX - 1e-6 for gap in apart)
        for thing in scene.things:
            assert all(thing.radius + 2 <= middle <= SIZE_PX - thing.radius - 2 for middle in (thing.x, thing.y))


def test_on_a_lattice_things_stand_between_squares_of_latents_upright_and_in_few_sizes() -> None:
    """The captions stay what they are; a shape of one size is then the same picture wherever it stands, moved by whole squares."""
    settled = list(islice(grammar.scenes(3, "train", lattice_px=8), len(SCENES)))
    assert [scene.caption for scene in settled] == [scene.caption for scene in SCENES]
    things = [thing for scene in settled for thing in scene.things]
    assert {place % 8 for thing in things for place in (thing.x, thing.y)} == {0}
    assert {thing.turn for thing in things} == {0}
    assert {thing.radius for thing in things} == {16, 20, 24, 36, 44}
    assert {scene.background.phase for scene in settled if scene.background} == {0}
    for scene in settled:
        apart = [math.dist((a.x, a.y), (b.x, b.y)) - a.radius - b.radius for a in scene.things for b in scene.things if a != b]
        assert scene.relation == "inside" or all(gap >= grammar.GAP_PX for gap in apart)
        for thing in scene.things:
            assert all(
                thing.radius + grammar.MARGIN_PX <= at <= SIZE_PX - thing.radius - grammar.MARGIN_PX
                for at in (thing.x, thing.y)
            )
    striped = next(scene for scene in settled if scene.background and scene.background.kind == "striped")
    columns = (
        np.asarray(drawing.background(striped.background).resize((SIZE_PX, 1), Image.Resampling.BOX))
        .reshape(16, 8, 3)
        .astype(int)
    )
    assert np.ptp(columns, axis=1).max() == 0  # a square has one of the two colours


def test_processes_that_draw_scenes_load_no_torch() -> None:
    """One a core, each would take half a gigabyte and ten seconds for it."""
    code = "import sys, src.scenes.shards; print(sorted({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_on_a_lattice_an_arrangement_moves_as_a_whole() -> None:
    """Four things, each with nine places of its own, would be 6,561 pictures of one caption; moved together they are nine."""
    made: dict[tuple, dict[tuple, set]] = {}
    for scene in islice(grammar.scenes(3, "train", ("pair", "group"), lattice_px=8), 6000):
        left, top = min(thing.x for thing in scene.things), min(thing.y for thing in scene.things)
        arrangement = tuple(sorted((thing.x - left, thing.y - top) for thing in scene.things))
        made.setdefault((scene.relation, len(scene.things)), {}).setdefault(arrangement, set()).add((left, top))
    for (relation, number), arrangements in made.items():
        assert len(arrangements) == ({"and": 2}.get(relation, 1) if relation else {2: 2, 3: 4, 4: 1}[number])
        assert all(len(moved) == 9 for moved in arrangements.values())
    assert set(made[None, 2]) == {((0, 0), (64, 64)), ((0, 64), (64, 0))}  # across the middle, as on a die


def test_hard_scenes_are_those_with_what_is_learnt_last() -> None:
    hard = re.compile(r"dotted|outline|inside|house|^(a picture of )?(two|three) ")
    some = list(islice(grammar.scenes(9, "train"), 3000))
    assert [grammar.is_hard(scene) for scene in some] == [bool(hard.search(scene.caption)) for scene in some]
    assert 0.3 < sum(map(grammar.is_hard, some)) / len(some) < 0.5


def test_landscapes_stand_on_the_lattice_too() -> None:
    lands = list(islice(grammar.scenes(5, "train", ("landscape",), lattice_px=8), 1000))
    views = [drawing._view_of(scene.landscape) for scene in lands]
    places = {
        place / drawing.FINER % 8 for view in views for place in (*view.house[:2], view.horizon * SIZE_PX * drawing.FINER)
    }
    assert places | {place / drawing.FINER % 8 for view in views for tree in view.trees for place in tree[:2]} == {0}
    arrangements = {(view.house[0], frozenset(tree[0] for tree in view.trees), view.light[0]) for view in views}
    assert len(arrangements) == 2 * 4 * (3 + 3 + 1)  # the sun's side, the house's place, one, two or three of the other places
    assert len({tuple(view.stars) for scene, view in zip(lands, views) if scene.landscape.time == "at night"}) == 1


def test_splits_never_share_a_caption_and_unseen_pairs_are_in_one_alone() -> None:
    captions = {}
    for split in grammar.SPLITS:
        scenes = list(islice(grammar.scenes(5, split), 600))
        captions[split] = {scene.caption.removeprefix("a picture of ") for scene in scenes}
        unseen = [any(grammar.is_unseen(thing.colour, thing.shape) for thing in scene.things) for scene in scenes]
        assert all(unseen) if split == "unseen" else not any(unseen)
    assert not captions["train"] & captions["held-out"]
    assert not captions["train"] & captions["unseen"]
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if grammar.is_unseen(colour, shape)]
    assert sorted(shape for _, shape in pairs) == sorted(SHAPES)  # one colour of each
    assert len({colour for colour, _ in pairs}) == len(pairs)
    with pytest.raises(ValueError, match="held-out"):
        next(grammar.scenes(0, "test"))


def test_the_simple_grammar_is_one_thing_on_a_plain_background() -> None:
    scenes = list(islice(grammar.scenes(3, "train", grammar="simple"), 300))
    said = re.compile(r"(a picture of )?an? ((small|large) )?(\w+) (\w+)( (on the|at the|in the) \w+)? on a \w+ background")
    matches = [said.fullmatch(scene.caption) for scene in scenes]
    assert all(matches)
    assert {match[4] for match in matches} == set(COLOURS)
    assert {match[5] for match in matches} == set(SHAPES)
    every = grammar.scenes(3, "train", ("one",))
    assert scenes == list(islice((one for one in every if one.background.kind == "plain" and not one.things[0].outline), 300))


def test_every_word_of_the_grammar_occurs() -> None:
    said = " ".join(scene.caption for scene in SCENES)
    words = [*COLOURS, *SHAPES, *grammar.POSITIONS, *grammar.RELATIONS, *grammar.TIMES, *grammar.NUMBERS.values()]
    words += ["small", "large", "a picture of", "gradient", "striped", "dotted", "outline", "crosses"]
    assert [word for word in words if word not in said] == []
    assert {scene.kind for scene in SCENES} == set(KINDS)
    share = sum(scene.kind == "pair" for scene in SCENES) / len(SCENES)
    assert abs(share - KINDS["pair"] / sum(KINDS.values())) < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_where_its_data_says_and_as_large_as_mathematics(shape: str) -> None:
    thing = Thing(shape, "red", 50.0, 70.0, 30.0, 0.0)
    pixels = np.asarray(drawing.draw(Scene("one", "x", (thing,), Background("plain", ("white",))))).astype(float)
    white, red = np.array(COLOURS["white"]), np.array(COLOURS["red"])
    share = (pixels - white) @ (red - white) / ((red - white) @ (red - white))  # of each pixel that is covered
    corners = np.array(drawing.outline_of(shape)) * 30
    around = np.roll(corners, -1, axis=0)
    area = abs(np.sum(corners[:, 0] * around[:, 1] - corners[:, 1] * around[:, 0])) / 2
    if shape == "ring":
        area = math.pi * 30**2 * (1 - (1 - drawing.RING) ** 2)
    assert share.sum() == pytest.approx(area, rel=0.03)
    y, x = np.nonzero(share > 0.5)
    assert abs(x.mean() + 0.5 - 50) < 1
    assert abs((x.min() + x.max() + 1) / 2 - 50) < 1
    assert y.min() >= 70 - 30 * 1.1


def test_backgrounds_have_both_colours_in_their_order() -> None:
    def mean(kind: str, rows: slice) -> np.ndarray:
        return np.asarray(drawing.background(Background(kind, ("black", "white"), 0.3)))[rows].mean()

    assert mean("gradient", slice(0, 20)) < 30
    assert mean("gradient", slice(-20, None)) > 240
    assert mean("striped", slice(None)) == pytest.approx(135, abs=5)
    dotted = 20 + 230 * math.pi * 0.25**2
    assert mean("dotted", slice(None)) == pytest.approx(dotted, abs=5)


def test_an_inner_thing_lies_above_and_an_outline_around() -> None:
    inner, outer = Thing("circle", "red", 64, 64, 12, 0), Thing("ring", "blue", 64, 64, 40, 0)
    pixels = drawing.draw(Scene("pair", "x", (inner, outer), Background("plain", ("white",))))
    assert [pixels.getpixel((x, 64)) for x in (64, 80, 100)] == [COLOURS["red"], COLOURS["white"], COLOURS["blue"]]
    outlined = Thing("square", "red", 64, 64, 30, 0, outline="black")
    pixels = drawing.draw(Scene("one", "x", (outlined,), Background("plain", ("white",))))
    assert [pixels.getpixel((x, 64)) for x in (64, 90, 98)] == [COLOURS["red"], COLOURS["black"], COLOURS["white"]]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_of_shapes_has_each_where_the_picture_shows_its_colour(shape: str) -> None:
    thing = Thing(shape, "red", 47, 70, 38, 10)
    other = Thing(SHAPES[0], "black", 104, 104, 18, 0)
    scene = Scene("pair", "", (other, thing), Background("plain", ("white",)))
    pixels = np.asarray(drawing.draw(scene)).astype(int)
    shares = [
        (np.abs(pixels - COLOURS[colour]).max(-1) < 4).reshape(16, 8, 16, 8).mean((1, 3))
        for colour in ("white", "red", "black")
    ]
    found = drawing.shapes_map(scene, 16)
    for share, kind in zip(shares, (0, 1 + SHAPES.index(shape), 1)):
        assert (share > 0.7).sum() > 1
        assert (found[share > 0.7] == kind).all()


def test_houses_and_trees_of_landscapes_are_told_where_they_stand() -> None:
    """A cell is a tree's where nearly all of its pixels have the colour of leaves, and the sky above is nothing's."""
    seen = 0
    for scene in islice(grammar.scenes(5, "train", ("landscape",)), 12):
        found = drawing.shapes_map(scene, 32)  # the middle of a tree lies between cells of 16
        pixels = np.asarray(drawing.draw(scene)).astype(int)
        dark = drawing.DARKER[scene.landscape.time]
        leaves = np.abs(pixels - [round(part * dark) for part in (21, 94, 60)]).max(-1) < 3
        walls = np.abs(pixels - [round(part * max(dark, 0.75)) for part in COLOURS[scene.landscape.house]]).max(-1) < 3
        for mask, kind in ((leaves, "tree"), (walls, "house")):
            full = mask.reshape(32, 4, 32, 4).mean((1, 3)) > 0.9
            seen += int(full.sum())
            assert (found[full] == 1 + drawing.TOLD.index(kind)).all()
        assert not found[:8].any()
        assert {*np.unique(found)} <= {0, 1 + drawing.TOLD.index("house"), 1 + drawing.TOLD.index("tree")}
    assert seen > 12

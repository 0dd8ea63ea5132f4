"""A grammar of pictures: each scene is data (what, which colour, where), and a caption that says it.

    [a picture of] a|an [small|large] COLOUR SHAPE [with a COLOUR outline] [on the left|...|in the center] on a BACKGROUND
    a COLOUR SHAPE left of|right of|above|below|and|inside a COLOUR SHAPE on a BACKGROUND
    two|three|four COLOUR SHAPEs on a BACKGROUND
    a COLOUR house and a tree|two trees|three trees on COLOUR hills by day|at sunset|at night

A background is ``white background``, ``blue to white gradient background`` (from above), ``red and white striped background``
or ``green and yellow dotted background`` (yellow dots). The words, colours and plain backgrounds of the first model's grammar
are in it.

Where things stand, how large they are and how far they are turned is left to chance, or rounded: `Chance`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

SIZE_PX = 128
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
COLOURS = {
    "red": (220, 38, 38), "green": (34, 160, 70), "blue": (37, 99, 235), "yellow": (250, 204, 21), "purple": (147, 51, 234),
    "orange": (249, 115, 22), "pink": (244, 114, 182), "cyan": (6, 182, 212), "brown": (120, 72, 40), "black": (20, 20, 20),
    "white": (250, 250, 250), "gray": (140, 140, 140),
}  # fmt: skip
PLAIN = ("white", "black", "gray", "blue", "green", "yellow", "pink", "red")
# Pairs whose mixtures resemble no colour of the list.
GRADIENTS = (
    ("blue", "white"),
    ("green", "white"),
    ("black", "blue"),
    ("black", "green"),
    ("gray", "white"),
    ("yellow", "white"),
)
STRIPES = (("red", "white"), ("blue", "white"), ("black", "white"), ("green", "yellow"), ("blue", "black"), ("pink", "white"))
POSITIONS = {
    "on the left": (0.25, 0.5), "on the right": (0.75, 0.5), "at the top": (0.5, 0.25), "at the bottom": (0.5, 0.75),
    "in the center": (0.5, 0.5),
}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below", "and", "inside")
NUMBERS = {2: "two", 3: "three", 4: "four"}
SIZES_PX = {"small": (13, 16), None: (20, 26), "large": (34, 40)}  # radius
PAIR_PX, GROUP_PX, OUTER_PX, INNER_PX = (17, 24), (17, 23), (42, 48), (15, 18)
ROOMY = ("circle", "square", "diamond", "heart")  # shapes that another one fits into
LATTICE_PX = 8  # the side of what one latent covers
GAP_PX = 8  # at least this much background between two things
MARGIN_PX = 4
HOUSES, HILLS = ("red", "blue", "yellow", "white", "orange", "purple"), ("green", "yellow", "brown", "white")
TIMES = ("by day", "at sunset", "at night")
TREES = {1: "a tree", 2: "two trees", 3: "three trees"}
KINDS = {"one": 30, "pair": 36, "group": 20, "landscape": 14}  # per cent of the training scenes
SPLITS = ("train", "held-out", "unseen")
GRAMMARS: Mapping[str, tuple[str, ...]] = {"full": tuple(KINDS), "v0": ("one", "pair", "group"), "simple": ("one",)}
PARTS_SAY = {
    "v0": "no patterns, outlines, insides or landscapes: what the first embedded model was taught",
    "simple": "one thing on a plain background, without outline",
}


@dataclass(frozen=True)
class Thing:
    """A shape: its middle and radius in pixels, turned by some degrees."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float
    size: str | None = None  # small, large: where the caption says it
    outline: str | None = None


@dataclass(frozen=True)
class Background:
    """``plain`` of one colour; ``gradient`` from above, ``striped`` or ``dotted`` of two, ``phase`` in [0, 1)."""

    kind: str
    colours: tuple[str, ...]
    phase: float = 0.0


@dataclass(frozen=True)
class Landscape:
    """A house among trees on hills. ``seed`` decides where everything stands, on a lattice of so many pixels (0: anywhere)."""

    house: str
    trees: int
    hills: str
    time: str
    seed: int
    lattice_px: int = 0


@dataclass(frozen=True)
class Scene:
    """One picture as data. ``kind`` is a key of KINDS; a landscape has no things and no background of its own."""

    kind: str
    caption: str
    things: tuple[Thing, ...] = ()
    background: Background | None = None
    position: str | None = None
    relation: str | None = None
    landscape: Landscape | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Scene:
        """The inverse of ``as_dict``, also after JSON has made lists of tuples."""
        things = tuple(Thing(**thing) for thing in data["things"])
        background, landscape = data["background"], data["landscape"]
        if background is not None:
            background = Background(background["kind"], tuple(background["colours"]), background["phase"])
        landscape = None if landscape is None else Landscape(**landscape)
        return Scene(**{**data, "things": things, "background": background, "landscape": landscape})


class Chance(Random):
    """Random numbers, of which those that place things can be settled on a lattice.

    A VAE sees squares of 8 x 8 pixels. A shape that may stand at any pixel, in any size and a little turned, is thousands of
    patterns of latents; upright, in one size and with its middle between four squares it is one. And four things, each in one
    of nine places, are 6,561 arrangements; one that moves as a whole, by at most a square each way, is nine. What is settled
    was drawn by lot before, so a seed's captions are the same on every lattice.
    """

    def __init__(self, seed: object, lattice_px: int) -> None:
        super().__init__(seed)  # type: ignore[arg-type]
        self.lattice_px = lattice_px

    def place(self, low: float, high: float) -> float:
        """A number of pixels between two; on a lattice what is nearest to the middle of both, or one step to either side."""
        share, step = self.random(), self.lattice_px
        middle = self.rounded((low + high) / 2, step)
        return middle + (math.floor(3 * share) - 1) * step if step else low + share * (high - low)

    def size(self, low: float, high: float) -> float:
        """A radius: with a lattice always the same, the middle of both, in half steps of it."""
        free = self.uniform(low, high)
        return self.rounded((low + high) / 2, self.lattice_px / 2) if self.lattice_px else free

    def free(self, low: float, high: float, settled: float) -> float:
        """Something else, which has one value with a lattice."""
        drawn = self.uniform(low, high)
        return settled if self.lattice_px else drawn

    def within(self, middle: float, margin: float) -> float:
        """A place on the lattice, moved so far that at least ``margin`` pixels of the picture are on both sides."""
        least = math.ceil(margin / self.lattice_px) * self.lattice_px if self.lattice_px else margin
        return min(max(middle, least), SIZE_PX - least)

    @staticmethod
    def rounded(value: float, step: float) -> float:
        """To the nearest multiple; to none for a step of 0."""
        return round(value / step) * step if step else value


def is_unseen(colour: str, shape: str) -> bool:
    """Whether this combination never occurs in training: one colour of each shape."""
    return (list(COLOURS).index(colour) - 5 * SHAPES.index(shape)) % len(COLOURS) == 3


def is_hard(scene: Scene) -> bool:
    """Whether it has what is learnt last: dots, an outline, a thing inside another, two or three alike, a house with trees."""
    if scene.background is None:
        return True
    few = scene.kind == "group" and len(scene.things) < 4
    return few or scene.background.kind == "dotted" or scene.relation == "inside" or scene.things[0].outline is not None


def split_of(scene: Scene) -> str:
    """``unseen`` if a combination in it is; else one caption in 16 is ``held-out``, and the rest is for training."""
    if any(is_unseen(thing.colour, thing.shape) for thing in scene.things):
        return "unseen"
    caption = scene.caption.removeprefix("a picture of ")
    return "held-out" if zlib.crc32(caption.encode()) % 16 == 0 else "train"


def belongs(scene: Scene, grammar: str) -> bool:
    """Whether one of GRAMMARS has it; the parts are told by PARTS_SAY."""
    if grammar == "full" or scene.background is None:
        return scene.kind in GRAMMARS[grammar]
    is_plain = scene.background.kind == "plain" and not any(thing.outline for thing in scene.things)
    return is_plain and scene.kind in GRAMMARS[grammar] and scene.relation != "inside"


def scenes(
    seed: int, split: str, kinds: tuple[str, ...] | None = None, grammar: str = "full", lattice_px: int = 0
) -> Iterator[Scene]:
    """Endlessly many scenes of one split, always the same ones for a seed. No two processes need to agree on anything else.

    Of all ``kinds`` that the ``grammar`` has, or of some of them. Their captions are the same on every lattice (`Chance`).
    """
    kinds = GRAMMARS[grammar] if kinds is None else kinds
    if split not in SPLITS:
        raise ValueError(f"split '{split}' is not known; choose {', '.join(SPLITS)}")
    random = Chance(f"scenes {seed} {split}", lattice_px)
    weights = [KINDS[kind] for kind in kinds]
    while True:
        (kind,) = random.choices(kinds, weights)
        scene = _MAKERS[kind](random)
        if split_of(scene) == split and belongs(scene, grammar):
            yield scene


def _one(random: Chance) -> Scene:
    size = random.choice((None, None, "small", "large"))
    position = random.choice((None, *POSITIONS))
    background = _background(random)
    radius = random.size(*SIZES_PX[size])
    where = (0.5, 0.5) if position is None else POSITIONS[position]
    x, y = (random.within(SIZE_PX * share + random.place(-7, 7), MARGIN_PX + radius) for share in where)
    colour = _colour(random, background.colours)
    shape = random.choice(SHAPES)
    is_outlined = shape != "ring" and random.random() < 0.2
    outline = _colour(random, (*background.colours, colour)) if is_outlined else None
    thing = Thing(shape, colour, x, y, radius, random.free(-8, 8, 0), size, outline)
    words = [word for word in (size, colour, shape) if word]
    caption = _with_article(" ".join(words))
    caption += f" with {_with_article(outline)} outline" if outline else ""
    caption += f" {position}" if position else ""
    caption = f"{caption} on {describe(background)}"
    if random.random() < 0.1:
        caption = f"a picture of {caption}"
    return Scene("one", caption, (thing,), background, position)


def _pair(random: Chance) -> Scene:
    relation, background = random.choice(RELATIONS), _background(random)
    colours = [_colour(random, background.colours)]
    colours.append(_colour(random, (*background.colours, colours[0])))
    shapes = [random.choice(SHAPES), random.choice(ROOMY if relation == "inside" else SHAPES)]
    if relation == "inside":
        x, y, outer = 64 + random.place(-12, 12), 64 + random.place(-12, 12), random.size(*OUTER_PX)
        places = [(x, y, random.size(*INNER_PX)), (x, y, outer)]
    else:
        places = _side_by_side(random, relation)
    things = tuple(
        Thing(shape, colour, x, y, radius, random.free(-8, 8, 0))
        for shape, colour, (x, y, radius) in zip(shapes, colours, places)
    )
    names = [_with_article(f"{thing.colour} {thing.shape}") for thing in things]
    return Scene("pair", f"{names[0]} {relation} {names[1]} on {describe(background)}", things, background, relation=relation)


def _side_by_side(random: Chance, relation: str) -> list[tuple[float, float, float]]:
    """Two places with a gap between; the first is clearly on the side that the relation names, ``and`` leaves it open."""
    first, second = random.size(*PAIR_PX), random.size(*PAIR_PX)
    direction = random.choice(RELATIONS[:4]) if relation == "and" else relation
    apart = first + second + GAP_PX + random.free(0, 10, 0)
    start = MARGIN_PX + first + random.place(0, max(0.0, SIZE_PX - 2 * MARGIN_PX - first - second - apart))
    across = 64 + random.place(-16, 16)
    along = (start, start + apart)
    if direction in ("right of", "below"):
        along = (SIZE_PX - along[0], SIZE_PX - along[1])
    others = (across + random.free(-5, 5, 0), across + random.free(-5, 5, 0))
    if direction in ("left of", "right of"):
        return [(along[0], others[0], first), (along[1], others[1], second)]
    return [(others[0], along[0], first), (others[1], along[1], second)]


def _group(random: Chance) -> Scene:
    """Things alike, each somewhere in a quarter of the picture that is its own."""
    number, background = random.choice(list(NUMBERS)), _background(random)
    shape, colour, radius = random.choice(SHAPES), _colour(random, background.colours), random.size(*GROUP_PX)
    low, high = MARGIN_PX + radius, (SIZE_PX - GAP_PX) / 2 - radius  # of the first quarter
    quarters = random.sample(range(4), number)
    inside = [(random.place(low, high), random.place(low, high)) for _ in quarters]
    if random.lattice_px:  # all move alike, and two stand across the middle, as on a die
        (x, y), half = inside[0], SIZE_PX / 2
        quarters = [quarters[0], 3 - quarters[0]] if number == 2 else quarters
        places = [(x + half * (quarter % 2), y + half * (quarter // 2)) for quarter in quarters]
    else:
        places = [
            (SIZE_PX - x if quarter % 2 else x, SIZE_PX - y if quarter >= 2 else y) for quarter, (x, y) in zip(quarters, inside)
        ]
    things = tuple(Thing(shape, colour, x, y, radius, random.free(-8, 8, 0)) for x, y in places)
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    return Scene("group", f"{NUMBERS[number]} {colour} {plural} on {describe(background)}", things, background)


def _landscape(random: Chance) -> Scene:
    hills = random.choice(HILLS)
    house = random.choice([colour for colour in HOUSES if colour != hills])  # on its own colour it is hardly to be seen
    land = Landscape(house, random.choice(list(TREES)), hills, random.choice(TIMES), random.getrandbits(32), random.lattice_px)
    caption = f"{_with_article(land.house)} house and {TREES[land.trees]} on {land.hills} hills {land.time}"
    return Scene("landscape", caption, landscape=land)


_MAKERS = {"one": _one, "pair": _pair, "group": _group, "landscape": _landscape}


def describe(background: Background) -> str:
    """``a white background``, ``a blue to white gradient background`` ..."""
    words = {
        "plain": "{0}",
        "gradient": "{0} to {1} gradient",
        "striped": "{0} and {1} striped",
        "dotted": "{0} and {1} dotted",
    }
    return _with_article(words[background.kind].format(*background.colours)) + " background"


def _background(random: Chance) -> Background:
    (kind,) = random.choices(("plain", "gradient", "striped", "dotted"), (64, 16, 12, 8))
    if kind == "plain":
        return Background(kind, (random.choice(PLAIN),))
    colours = random.choice(GRADIENTS if kind == "gradient" else STRIPES)
    return Background(kind, colours if random.random() < 0.5 else colours[::-1], random.free(0, 1, 0))


def _colour(random: Chance, taken: tuple[str, ...]) -> str:
    return random.choice([colour for colour in COLOURS if colour not in taken])


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

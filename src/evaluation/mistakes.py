"""One thing wrong in a scene: what the proof of the checker holds against it.

Each change gives the scene that is shown instead, or what is done to its picture; None where there is nothing of the sort to
change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from src.evaluation.segmenting import distances, lab
from src.scenes import drawing, grammar
from src.scenes.grammar import COLOURS, GAP_PX, MARGIN_PX, POSITIONS, SHAPES, SIZE_PX, SIZES_PX, Background, Scene, Thing

PLACES = (0.16, 0.39, 0.61, 0.84)  # of house and trees, of the width
MIN_SEEN = 50.0  # CIELAB, of what is added from what it lies on: hills resemble some colours of houses and wood
Spoil = Callable[[Image.Image], Image.Image]


def _with_thing(scene: Scene, index: int, **changes: object) -> Scene:
    things = list(scene.things)
    things[index] = replace(things[index], **changes)
    return replace(scene, things=tuple(things))


def _taken(scene: Scene) -> set[str | None]:
    return {*scene.background.colours, *(thing.colour for thing in scene.things), *(thing.outline for thing in scene.things)}


def _colour(scene: Scene, random: Random) -> Scene | None:
    if not scene.things:
        return None
    colour = random.choice([name for name in COLOURS if name not in _taken(scene)])
    return _with_thing(scene, random.randrange(len(scene.things)), colour=colour)


def _shape(scene: Scene, random: Random) -> Scene | None:
    if not scene.things:
        return None
    index = random.randrange(len(scene.things))
    thing = scene.things[index]
    among = grammar.ROOMY if scene.relation == "inside" and index == 1 else SHAPES
    among = [s for s in among if s != thing.shape and (s != "ring" or thing.outline is None)]
    return _with_thing(scene, index, shape=random.choice(among))


def _count(scene: Scene, random: Random) -> Scene | None:
    """One too few, or one too many where there is room."""
    if not scene.things or scene.relation == "inside":
        return None
    things = list(scene.things)
    if len(things) > 1 and random.random() < 0.5:
        things.pop(random.randrange(len(things)))
        return replace(scene, things=tuple(things))
    like = random.choice(things)
    return _with_one_more(scene, replace(like, radius=min(like.radius, 13)), random)


def _with_one_more(scene: Scene, thing: Thing, random: Random) -> Scene | None:
    """The thing somewhere where there is room for it, if there is."""
    for _ in range(200):
        x, y = (random.uniform(MARGIN_PX + thing.radius, SIZE_PX - MARGIN_PX - thing.radius) for _ in range(2))
        if all(np.hypot(x - t.x, y - t.y) >= thing.radius + t.radius + GAP_PX for t in scene.things):
            return replace(scene, things=(*scene.things, replace(thing, x=x, y=y)))
    return None


def _in_backgrounds_colour(scene: Scene, random: Random) -> Scene | None:
    """One more thing in a colour of the pattern it lies on: on a gradient in that of the far end, on dots in theirs."""
    if scene.background is None or scene.background.kind == "plain":
        return None
    first, second = scene.background.colours
    thing = Thing(random.choice(("circle", "square", "diamond", "heart")), second, 0.0, 0.0, random.uniform(14, 20), 0.0)
    shown = _with_one_more(scene, thing, random)
    if shown is None or scene.background.kind == "dotted":
        return shown
    is_first = shown.things[-1].y > SIZE_PX / 2 if scene.background.kind == "gradient" else random.random() < 0.5
    return _with_thing(shown, len(scene.things), colour=first) if is_first else shown


def _position(scene: Scene, random: Random) -> Scene | None:
    if scene.position is None:
        return None
    x, y = POSITIONS[random.choice([name for name in POSITIONS if name != scene.position])]
    thing = scene.things[0]
    places = (min(max(share * SIZE_PX, MARGIN_PX + thing.radius), SIZE_PX - MARGIN_PX - thing.radius) for share in (x, y))
    return _with_thing(scene, 0, **dict(zip("xy", places)))


def _relation(scene: Scene, random: Random) -> Scene | None:
    """Mirrored or turned about; of a thing within another, the other within it."""
    if scene.relation in (None, "and"):
        return None
    first, second = scene.things
    if scene.relation == "inside":
        if first.shape not in grammar.ROOMY:
            return None
        return replace(scene, things=(replace(first, radius=second.radius), replace(second, radius=first.radius)))
    is_level = scene.relation in ("left of", "right of")

    def mirrored(thing: Thing) -> Thing:
        return replace(thing, x=SIZE_PX - thing.x) if is_level else replace(thing, y=SIZE_PX - thing.y)

    moved = random.choice([mirrored, lambda thing: replace(thing, x=thing.y, y=thing.x)])
    return replace(scene, things=tuple(moved(thing) for thing in scene.things))


def _background(scene: Scene, random: Random) -> Scene | None:
    if scene.background is None:
        return None
    plain = [("plain", (name,)) for name in grammar.PLAIN]
    ramps = [("gradient", pair[:: random.choice((1, -1))]) for pair in grammar.GRADIENTS]
    patterns = [(kind, pair) for kind in ("striped", "dotted") for pair in grammar.STRIPES]
    used = {thing.colour for thing in scene.things} | {thing.outline for thing in scene.things}
    own = (scene.background.kind, set(scene.background.colours))
    among = [
        [(kind, colours) for kind, colours in group if not used & set(colours) and (kind, set(colours)) != own]
        for group in (plain, ramps, patterns)
    ]
    kind, colours = random.choice(random.choice([group for group in among if group]))
    return replace(scene, background=Background(kind, colours, random.random()))


def _direction(scene: Scene, random: Random) -> Scene | None:
    """A gradient or dots of the same colours the other way round; stripes are the same."""
    if scene.background is None or scene.background.kind not in ("gradient", "dotted"):
        return None
    return replace(scene, background=replace(scene.background, colours=scene.background.colours[::-1]))


def _binding(scene: Scene, random: Random) -> Scene | None:
    if scene.kind != "pair" or scene.things[0].shape == scene.things[1].shape:
        return None
    first, second = scene.things
    return replace(scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))


def _size(scene: Scene, random: Random) -> Scene | None:
    if scene.kind != "one" or scene.things[0].size is None or scene.position not in (None, "in the center"):
        return None
    other = random.choice([size for size in SIZES_PX if size != scene.things[0].size])
    return _with_thing(scene, 0, radius=random.uniform(*SIZES_PX[other]))


def _outline(scene: Scene, random: Random) -> Scene | None:
    """Another colour around, or one where none should be, or none."""
    index = random.randrange(len(scene.things)) if scene.things else 0
    if not scene.things or scene.things[index].shape == "ring":
        return None
    others = [name for name in COLOURS if name not in _taken(scene)]
    has_none = scene.things[index].outline and random.random() < 0.5
    return _with_thing(scene, index, outline=None if has_none else random.choice(others))


def _of_land(name: str, among: tuple) -> Callable[[Scene, Random], Scene | None]:
    def change(scene: Scene, random: Random) -> Scene | None:
        if scene.landscape is None:
            return None
        other = random.choice([value for value in among if value != getattr(scene.landscape, name)])
        return replace(scene, landscape=replace(scene.landscape, **{name: other}))

    return change


def _within_a_ring(scene: Scene, random: Random) -> Scene | None:
    """A disc of a ring's colour in its hole."""
    large = [thing for thing in scene.things if thing.shape == "ring" and thing.radius >= 20]
    if not large or scene.relation == "inside":
        return None
    ring = random.choice(large)
    return replace(scene, things=(*scene.things, Thing("circle", ring.colour, ring.x, ring.y, 0.4 * ring.radius, 0.0)))


def _off_colour(scene: Scene, random: Random) -> Spoil | None:
    """A plain background in a colour that is not its own, though nearer to it than to any other, as far as the eye is asked."""
    if scene.background is None or scene.background.kind != "plain":
        return None
    own = np.array(COLOURS[scene.background.colours[0]], dtype=np.float32)
    towards = [np.array([random.choice((0, 255)) for _ in range(3)], dtype=np.float32) for _ in range(40)]
    shades = [own + (other - own) * share for other in towards for share in (0.2, 0.3, 0.4)]
    palette = lab(np.array([COLOURS[name] for name in COLOURS], dtype=np.float32))
    away = [distances(lab(shade), palette) for shade in shades]
    is_own = list(COLOURS).index(scene.background.colours[0])
    fit = [shade for shade, off in zip(shades, away) if off.argmin() == is_own and 22 <= off[is_own] <= 40]
    if not fit:
        return None
    shade = random.choice(fit)

    def spoil(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture, dtype=np.float32)
        is_open = abs(pixels - own).max(-1, keepdims=True) < 1
        return Image.fromarray(np.where(is_open, shade, pixels).round().astype(np.uint8))

    return spoil


def _free_places(scene: Scene) -> list[float]:
    """Where neither house nor tree of a landscape stands, of the width."""
    land = scene.landscape
    plain, other = (np.asarray(drawing.draw(replace(scene, landscape=replace(land, house=h)))) for h in ("red", "blue"))
    walls = np.nonzero((plain != other).any((0, 2)))[0].mean() / SIZE_PX
    leaves = abs(plain.astype(int) - np.array([21, 94, 60]) * drawing.DARKER[land.time]).max(-1) < 2
    trees = [place for place in PLACES if leaves[:, int(place * SIZE_PX) - 5 : int(place * SIZE_PX) + 6].sum() > 40]
    return [place for place in PLACES if place not in trees and abs(place - walls) > 0.1]


def _second_house(scene: Scene, random: Random) -> Spoil | None:
    """Another house, of any colour, where no tree stands."""
    if scene.landscape is None or scene.landscape.trees == 3:
        return None
    dark, foot = drawing.DARKER[scene.landscape.time], random.uniform(0.84, 0.9)
    colour, place = COLOURS[random.choice(grammar.HOUSES)], random.choice(_free_places(scene))

    def spoil(picture: Image.Image) -> Image.Image:
        size = SIZE_PX * drawing.FINER
        large = picture.resize((size, size), Image.Resampling.NEAREST)
        wall = tuple(round(part * max(dark, 0.75)) for part in colour)
        drawing.draw_house(ImageDraw.Draw(large), place * size, foot * size, size, wall, dark)
        return large.resize(picture.size, Image.Resampling.BOX)

    return spoil


def _on_the_hills(scene: Scene, random: Random) -> Spoil | None:
    """A disc on the hill in front, where nothing stands, of a colour that is not the hill's."""
    land = scene.landscape
    if land is None or land.trees == 3:
        return None
    hill = np.array(drawing.HILL_COLOURS[land.hills], dtype=np.float32) * drawing.DARKER[land.time]
    hills = lab(np.stack([hill, 0.82 * hill]))
    seen = [colour for colour in COLOURS.values() if distances(lab(np.array(colour, dtype=np.float32)), hills).min() > MIN_SEEN]
    x, y, radius = random.choice(_free_places(scene)) * SIZE_PX, random.uniform(98, 112), random.uniform(7, 12)
    return _disc(x, y, radius, random.choice(seen))


def _in_the_sky(scene: Scene, random: Random) -> Spoil | None:
    """A disc of a colour that no sky has."""
    if scene.landscape is None:
        return None
    x, y, radius = random.uniform(16, 112), random.uniform(16, 42), random.uniform(7, 12)
    return _disc(x, y, radius, COLOURS[random.choice(("red", "green", "pink", "purple"))])


def _disc(x: float, y: float, radius: float, colour: tuple[int, int, int]) -> Spoil:
    def spoil(picture: Image.Image) -> Image.Image:
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return picture

    return spoil


def _any_other(scene: Scene, random: Random) -> Scene | None:
    other = next(islice(grammar.scenes(random.getrandbits(32), "train"), 1))
    return None if _gist(other) == _gist(scene) else other


def _gist(scene: Scene) -> tuple:
    """Scenes of different gist cannot both be what one caption asks for."""
    if scene.landscape is not None:
        land = scene.landscape
        return land.house, land.trees, land.hills, land.time
    return sorted((t.colour, t.shape) for t in scene.things), scene.background.kind, sorted(scene.background.colours)


CHANGES: Mapping[str, Callable[[Scene, Random], Scene | Spoil | None]] = {
    "colour": _colour, "shape": _shape, "count": _count, "position": _position, "relation": _relation,
    "background": _background, "background's direction": _direction, "binding": _binding, "size": _size,
    "outline": _outline, "house": _of_land("house", grammar.HOUSES), "trees": _of_land("trees", tuple(grammar.TREES)),
    "hills": _of_land("hills", grammar.HILLS), "time": _of_land("time", grammar.TIMES), "second house": _second_house,
    "something in the sky": _in_the_sky, "something on the hills": _on_the_hills,
    "off-colour background": _off_colour, "within a ring": _within_a_ring,
    "background's colour": _in_backgrounds_colour,
    "another scene": _any_other,
}  # fmt: skip

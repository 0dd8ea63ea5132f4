"""Draws a scene: flat shapes with smooth edges on a background, or a small landscape. The same scene is the same picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from src.scenes.grammar import COLOURS, SHAPES, SIZE_PX, Background, Chance, Landscape, Scene, Thing

FINER = 4  # drawn so many times larger, then averaged
CELL_POINTS = 4  # squared: so many points of a cell say what it shows
STRIPE_PX, DOT_PX = 16, 16  # the period
OUTLINE_PX, OUTLINE = 3.0, 0.16  # at least so wide, or so much of the radius; half of it lies outside
RING = 0.44
Colour = tuple[int, int, int]
Ink = Colour | int  # what a canvas of its kind is drawn on with
SKIES = {  # from above to the horizon
    "by day": ((96, 165, 250), (219, 234, 254)), "at sunset": ((76, 29, 149), (251, 146, 60)),
    "at night": ((8, 12, 40), (30, 41, 90)),
}  # fmt: skip
LIGHTS = {"by day": (253, 224, 71), "at sunset": (254, 215, 120), "at night": (235, 235, 215)}
HILL_COLOURS = {"green": (74, 150, 60), "yellow": (222, 184, 60), "brown": (140, 96, 60), "white": (236, 240, 245)}
TOLD = (*SHAPES, "house", "tree")  # what `shapes_map` tells apart
DARKER = {"by day": 1.0, "at sunset": 0.86, "at night": 0.55}


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 128 by 128 pixels."""
    if scene.landscape is not None:
        return _landscape(scene.landscape)
    large = background(scene.background)
    canvas = ImageDraw.Draw(large)
    for thing in _from_below(scene):
        _draw_thing(canvas, thing, COLOURS[thing.colour], COLOURS.get(thing.outline or ""))
    return large.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def shapes_map(scene: Scene, side: int) -> np.ndarray:
    """What most of each cell shows: (side, side) uint8, 0 for background and n + 1 for the n-th of TOLD."""
    kinds = Image.new("L", (SIZE_PX * FINER, SIZE_PX * FINER))
    canvas = ImageDraw.Draw(kinds)
    for thing in _from_below(scene):
        kind = 1 + TOLD.index(thing.shape)
        _draw_thing(canvas, thing, kind, None if thing.outline is None else kind)
    if scene.landscape is not None:
        view = _view_of(scene.landscape)
        for kind, parts in [("house", _house(*view.house)), *(("tree", _tree(*tree)) for tree in view.trees)]:
            for corners in parts:
                canvas.polygon(corners, fill=1 + TOLD.index(kind))
    points = np.asarray(kinds.resize((side * CELL_POINTS,) * 2, Image.Resampling.NEAREST))
    points = points.reshape(side, CELL_POINTS, side, CELL_POINTS)
    shares = np.stack([(points == kind).sum(axis=(1, 3)) for kind in range(1 + len(TOLD))])
    return shares.argmax(axis=0).astype(np.uint8)


def _from_below(scene: Scene) -> list[Thing]:
    """What is inside another thing lies above it."""
    return sorted(scene.things, key=lambda thing: -thing.radius)


def background(of: Background) -> Image.Image:
    """It alone, before it is made smaller."""
    size = SIZE_PX * FINER
    colours = np.array([COLOURS[name] for name in of.colours], dtype=np.float32)
    if of.kind == "plain":
        return Image.new("RGB", (size, size), COLOURS[of.colours[0]])
    position = (np.arange(size, dtype=np.float32) + 0.5) / FINER
    if of.kind == "gradient":
        share = np.broadcast_to((position / SIZE_PX)[:, None], (size, size))
    elif of.kind == "striped":
        share = np.broadcast_to(((position / STRIPE_PX + of.phase) % 1 >= 0.5)[None, :], (size, size))
    else:
        offset = (position + of.phase * DOT_PX) % DOT_PX - DOT_PX / 2
        share = np.hypot(offset[:, None], offset[None, :]) < DOT_PX * 0.25
    share = share[..., None].astype(np.float32)
    return Image.fromarray((colours[0] * (1 - share) + colours[1] * share + 0.5).astype(np.uint8))


def outline_of(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around (0, 0), y downwards. Circles, rings and hearts have many."""
    if shape == "heart":
        turns = [2 * math.pi * i / 60 for i in range(60)]
        points = [
            (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
            for t in turns
        ]
        return [(x / 17, (y - 2) / 17) for x, y in points]
    if shape == "cross":
        wide, far = 0.34, 1.0
        quarter = [(wide, -far), (wide, -wide), (far, -wide)]
        points = []
        for _ in range(4):
            points += quarter
            quarter = [(-y, x) for x, y in quarter]
        return points
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "diamond":
        return [(0, -1.05), (0.72, 0), (0, 1.05), (-0.72, 0)]
    if shape == "triangle":
        return [(0, -0.95), (0.98, 0.75), (-0.98, 0.75)]
    if shape == "star":
        radii = [1.05 if i % 2 == 0 else 0.44 for i in range(10)]
        return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]
    return [(math.cos(2 * math.pi * i / 72), math.sin(2 * math.pi * i / 72)) for i in range(72)]  # circle, ring


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, fill: Ink, outline: Ink | None) -> None:
    if thing.shape == "ring":
        _draw_ring(canvas, thing, fill)
        return
    turn, radius = math.radians(thing.turn), thing.radius
    corners = [
        (
            (thing.x + radius * (x * math.cos(turn) - y * math.sin(turn))) * FINER,
            (thing.y + radius * (x * math.sin(turn) + y * math.cos(turn))) * FINER,
        )
        for x, y in outline_of(thing.shape)
    ]
    canvas.polygon(corners, fill=fill)
    if outline is not None:
        width = round(max(OUTLINE_PX, OUTLINE * radius) * FINER)
        canvas.line([*corners, *corners[:2]], fill=outline, width=width, joint="curve")


def _draw_ring(canvas: ImageDraw.ImageDraw, thing: Thing, fill: Ink) -> None:
    """A line along a circle: what is in its hole is not painted over."""
    box = [(middle + sign * thing.radius) * FINER for sign in (-1, 1) for middle in (thing.x, thing.y)]
    canvas.ellipse(box, outline=fill, width=round(RING * thing.radius * FINER))


@dataclass(frozen=True)
class View:
    """Where everything of a landscape is, in pixels of the large canvas."""

    horizon: float  # a share of the height
    light: tuple[float, float]
    stars: list[tuple[float, float, float]]  # x, y, radius
    hills: list[float]  # where their waves begin
    house: tuple[float, float, float]  # its middle, its foot, the side of a picture that it fits
    trees: list[tuple[float, float, float]]


def _view_of(land: Landscape) -> View:
    random, size = Chance(land.seed, land.lattice_px), SIZE_PX * FINER

    def place(low: float, high: float) -> float:
        """Between two shares of the picture's side, in pixels of the large canvas; on a lattice next to their middle."""
        settled = random.rounded((low + high) / 2 * SIZE_PX, land.lattice_px)
        return random.free(low * SIZE_PX, high * SIZE_PX, settled) * FINER

    horizon = place(0.5, 0.6)
    x = random.choice((0.2, 0.8))
    low = horizon - random.rounded(0.06 * SIZE_PX, land.lattice_px) * FINER
    light = (place(x - 0.05, x + 0.05), low if land.time == "at sunset" else place(0.15, 0.22))
    chance = Random(0) if land.lattice_px else random  # there, all nights have the same stars
    stars = [
        (
            chance.uniform(0, SIZE_PX) * FINER,
            chance.uniform(0, horizon / size * 0.9 * SIZE_PX) * FINER,
            random.free(1.5, 3.5, 2.5),
        )
        for _ in range(14 if land.time == "at night" else 0)
    ]
    hills = [random.free(0, 2 * math.pi, begin) for begin in (0, math.pi / 2)]
    places = [share * size for share in random.sample([0.125, 0.375, 0.625, 0.875], land.trees + 1)]
    house = (places[0], horizon + place(0.26, 0.32), size)
    trees = [(x, horizon + place(0.2, 0.34), size * random.free(0.9, 1.1, 1)) for x in places[1:]]
    return View(horizon / size, light, stars, hills, house, trees)


def _landscape(land: Landscape) -> Image.Image:
    view, size, dark = _view_of(land), SIZE_PX * FINER, DARKER[land.time]
    top, bottom = (np.array(colour, dtype=np.float32) for colour in SKIES[land.time])
    share = np.clip((np.arange(size) + 0.5) / (size * view.horizon), 0, 1)[:, None, None]
    sky = np.broadcast_to(top * (1 - share) + bottom * share, (size, size, 3))
    picture = Image.fromarray(sky.astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    for x, y, r in view.stars:
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=(240, 240, 220))
    (x, y), r = view.light, 0.09 * size  # the sun, low at sunset; at night the moon
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=LIGHTS[land.time])
    for depth, tone, begin in zip((0.0, 0.14), (0.82, 1.0), view.hills):
        height = [view.horizon + depth + 0.05 * math.sin(x / 7.0 + begin) for x in range(65)]
        corners = [(x * size / 64, y * size) for x, y in enumerate(height)]
        canvas.polygon([*corners, (size, size), (0, size)], fill=_shaded(HILL_COLOURS[land.hills], tone * dark))
    draw_house(canvas, *view.house, _shaded(COLOURS[land.house], max(dark, 0.75)), dark)
    for tree in view.trees:
        trunk, *crown = _tree(*tree)
        canvas.polygon(trunk, fill=_shaded((101, 67, 33), dark))
        for corners in crown:
            canvas.polygon(corners, fill=_shaded((21, 94, 60), dark))
    return picture.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def draw_house(canvas: ImageDraw.ImageDraw, x: float, base: float, size: float, colour: Colour, dark: float) -> None:
    """Its middle and foot in pixels of a canvas of ``size``; ``dark`` shades the roof and the door."""
    wide, high = 0.1 * size, 0.15 * size
    walls, roof = _house(x, base, size)
    canvas.polygon(walls, fill=colour)
    canvas.polygon(roof, fill=_shaded((88, 60, 50), dark))
    canvas.rectangle((x - wide * 0.65, base - high * 0.62, x - wide * 0.1, base), fill=_shaded((80, 55, 40), dark))
    window = (255, 236, 150) if dark < 1 else (200, 230, 245)
    canvas.rectangle((x + wide * 0.15, base - high * 0.72, x + wide * 0.72, base - high * 0.32), fill=window)


def _house(x: float, base: float, size: float) -> list[list[tuple[float, float]]]:
    """The corners of its walls and of its roof."""
    wide, high = 0.1 * size, 0.15 * size
    return [
        _box(x - wide, base - high, x + wide, base),
        [(x - wide * 1.2, base - high), (x, base - high * 1.75), (x + wide * 1.2, base - high)],
    ]


def _tree(x: float, base: float, size: float) -> list[list[tuple[float, float]]]:
    """The corners of its trunk and of three triangles."""
    wide, high = 0.012 * size, 0.09 * size
    parts = [_box(x - wide, base - high, x + wide, base)]
    for level in range(3):
        reach, foot = (0.075 - 0.017 * level) * size, base - high * (0.6 + 0.6 * level)
        parts.append([(x - reach, foot), (x, foot - high * 1.05), (x + reach, foot)])
    return parts


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _shaded(colour: Colour, by: float) -> Colour:
    return tuple(round(part * by) for part in colour)

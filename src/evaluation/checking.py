"""Checks a picture against its scene, without a network: what the caption says must be there, and nothing else.

What the caption leaves open is not asked: where exactly, how large, how far turned, the phase of stripes. Every tolerance was
chosen by measurement: rendered truth must pass, also blurred, noisy, shifted in colour and through a VAE, and pictures that
differ in one thing must not (``src/evaluation/proof.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image
from scipy import ndimage

from src.evaluation import landscapes
from src.evaluation.segmenting import NAMES, Piece, Segments, segment
from src.evaluation.shapes import Fit, recognise
from src.scenes import drawing
from src.scenes.drawing import OUTLINE_PX
from src.scenes.grammar import MARGIN_PX, POSITIONS, SIZE_PX, Scene, Thing

MAX_OFF_PX = 19.0  # from where a position word says
MIN_APART_PX = 8.0  # of two centres, along the direction that a relation names
SMALL_PX, LARGE_PX = 18.5, 29.0  # radii: a small thing is at most, a large one at least so large
MAX_INNER, MIN_INNER_WITHIN = 0.45, 0.9  # an inner thing's area, of the outer one's; how much of it lies within
MAX_HOLE = 0.1  # of a thing: a smaller hole is a flaw of the drawing, a ring's is 0.3
EDGE_PX, MIN_EDGE = 2.0, 0.03  # how deep a thing's edge is; share of it that an outline which is asked for covers at least
MIN_AROUND = 0.28  # share of the pixels next to a thing that make an outline which is not asked for


@dataclass(frozen=True)
class Verdict:
    """What is right of a picture; None where the caption does not ask. ``faults`` says what is wrong, in words.

    Of a landscape, background is time, sky and hills, count the trees, colours the house.
    """

    background: bool | None = None
    count: bool | None = None
    colours: bool | None = None
    shapes: bool | None = None
    binding: bool | None = None  # each colour on its own shape
    position: bool | None = None
    relation: bool | None = None
    size: bool | None = None
    outline: bool | None = None
    faults: tuple[str, ...] = ()

    @property
    def all(self) -> bool:
        """Whether everything that is asked for is right."""
        return all(getattr(self, name) is not False for name in CHECKS)


CHECKS = tuple(field.name for field in fields(Verdict) if field.name != "faults")


@dataclass(frozen=True)
class _Found:
    """A thing in a picture."""

    piece: Piece
    solid: np.ndarray  # (H, W) bool, with its outline, without the holes that other things or flaws make
    fit: Fit

    @property
    def colour(self) -> str | None:
        return self.piece.colour if self.piece.is_clear else None

    @property
    def shape(self) -> str | None:
        return self.fit.shape


def check(picture: Image.Image, scene: Scene) -> Verdict:
    """What of the scene's caption the picture shows. Pictures of another size than the scenes' are resized."""
    if scene.landscape is not None:
        is_right, count, colour, faults = landscapes.check(picture, scene.landscape)
        return Verdict(is_right, count, colour, faults=faults)
    segments = segment(picture, scene.background, {thing.outline: thing.colour for thing in scene.things if thing.outline})
    things = _things(segments)
    faults: list[str] = [] if segments.has_background else ["background: another one"]

    def same(what: str, found: Counter, asked: Counter) -> bool:
        if set(found) != set(asked):
            faults.append(f"{what}: {_listed(found)} instead of {_listed(asked)}")
        return set(found) == set(asked)

    count = len(things) == len(scene.things)
    if not count:
        faults.append(f"count: {len(things)} instead of {len(scene.things)}")
    first = scene.things[0]
    own = max(things, key=lambda found: found.solid.sum(), default=None)  # where there should be one, the largest
    return Verdict(
        segments.has_background,
        count,
        same("colours", Counter(f.colour for f in things), Counter(t.colour for t in scene.things)),
        same("shapes", Counter(f.shape for f in things), Counter(t.shape for t in scene.things)),
        same("binding", Counter((f.colour, f.shape) for f in things), Counter((t.colour, t.shape) for t in scene.things)),
        _position(own, scene, faults) if scene.position else None,
        _relation(things, scene, faults) if scene.relation not in (None, "and") else None,
        _size(own, first, faults) if first.size else None,
        _outline(own, things, scene, segments.labels, faults),
        tuple(faults),
    )


def _things(segments: Segments) -> list[_Found]:
    """The pieces that are things, without the holes that other things or flaws make.

    Specks may be a thing's tips, where its colour runs out, or stray: they count where they make its shape clearer.
    """
    pieces = segments.pieces
    specks, _ = ndimage.label(segments.specks)
    filled = {piece: ndimage.binary_fill_holes(piece.mask) for piece in pieces}

    def lie_in(outer: Piece, among: Sequence[Piece]) -> list[Piece]:
        return [inner for inner in among if inner is not outer and filled[outer][inner.mask].mean() >= MIN_INNER_WITHIN]

    # Through a ring that lies in another thing one sees that thing: no thing of its own. A thing in a ring is one.
    seen_through = {
        inner
        for outer in pieces
        for between in lie_in(outer, pieces)
        for inner in lie_in(between, pieces)
        if inner.colour == outer.colour != between.colour
    }
    things = [piece for piece in pieces if piece not in seen_through]
    found = []
    for piece in things:
        solid = filled[piece] if lie_in(piece, things) else piece.mask | _small_holes(piece.mask, filled[piece])
        touching = np.unique(specks[ndimage.binary_dilation(piece.mask) & (specks > 0)])
        fits = [(recognise(mask), mask) for mask in (solid, *([solid | np.isin(specks, touching)] if len(touching) else []))]
        fit, solid = max(fits, key=lambda fitted: fitted[0].overlap)
        found.append(_Found(piece, solid, fit))
    return found


def _small_holes(mask: np.ndarray, filled: np.ndarray) -> np.ndarray:
    holes, count = ndimage.label(filled & ~mask)
    sizes = np.bincount(holes.ravel(), minlength=count + 1)
    sizes[0] = filled.size
    return (sizes < MAX_HOLE * filled.sum())[holes]


def _position(found: _Found | None, scene: Scene, faults: list[str]) -> bool:
    """Whether the thing is nearest to the place that its caption names, and near it."""
    if found is None:
        return False
    radius = min(found.fit.radius, SIZE_PX / 2 - MARGIN_PX)

    def off(name: str) -> float:
        x, y = (min(max(share * SIZE_PX, MARGIN_PX + radius), SIZE_PX - MARGIN_PX - radius) for share in POSITIONS[name])
        return math.hypot(found.fit.x - x, found.fit.y - y)

    nearest = min(POSITIONS, key=off)
    if nearest != scene.position or off(nearest) > MAX_OFF_PX:
        faults.append(f"position: {nearest if off(nearest) <= MAX_OFF_PX else 'elsewhere'} instead of {scene.position}")
        return False
    return True


def _relation(things: list[_Found], scene: Scene, faults: list[str]) -> bool:
    """Whether the things of the two colours stand to each other as the caption says."""
    pair = [max((f for f in things if f.colour == t.colour), key=lambda f: f.solid.sum(), default=None) for t in scene.things]
    if None in pair:
        faults.append(f"relation: no two things of the colours for '{scene.relation}'")
        return False
    first, second = pair
    if scene.relation == "inside":
        share = first.solid.sum() / second.solid.sum()
        is_right = bool(second.solid[first.solid].mean() >= MIN_INNER_WITHIN and share <= MAX_INNER)
    else:
        right, down = first.fit.x - second.fit.x, first.fit.y - second.fit.y
        along, across = {"left of": (-right, down), "right of": (right, down), "above": (-down, right), "below": (down, right)}[
            scene.relation
        ]
        is_right = along >= MIN_APART_PX and along >= abs(across) and not (first.solid & second.solid).any()
    if not is_right:
        faults.append(f"relation: not {scene.relation}")
    return is_right


def _size(found: _Found | None, thing: Thing, faults: list[str]) -> bool:
    if found is None:
        return False
    outside = OUTLINE_PX / 2 if thing.outline else 0.0  # half of an outline lies outside
    is_right = found.fit.radius <= SMALL_PX + outside if thing.size == "small" else found.fit.radius >= LARGE_PX
    if not is_right:
        faults.append(f"size: radius {found.fit.radius:.0f} px is not {thing.size}")
    return is_right


def _outline(
    own: _Found | None, things: list[_Found], scene: Scene, labels: np.ndarray, faults: list[str]
) -> bool | None:  # fmt: skip
    """Whether the outline that is asked for goes all around, or no thing has one where none is asked for."""
    asked = scene.things[0].outline
    if asked is not None:
        # On a small star it is a pixel thin: half of what is seen in the drawing itself must be there.
        truth = segment(drawing.draw(scene), scene.background, {asked: scene.things[0].colour})
        least = max((_edge_share(thing.solid, truth.labels, asked) for thing in _things(truth)), default=0.0) / 2
        if own is not None and _edge_share(own.solid, labels, asked) >= max(least, MIN_EDGE):
            return True
        faults.append(f"outline: none instead of {asked}")
        return False
    can_have = [found for found in things if found.shape != "ring"]
    around = [_around(found, labels, {thing.colour for thing in scene.things} - {found.colour}) for found in can_have]
    outlines = [colour for colour in around if colour]
    if outlines:
        faults.append(f"outline: {outlines[0]} instead of none")
    return not outlines if can_have else None


def _around(found: _Found, labels: np.ndarray, others: set[str]) -> str | None:
    """The colour that goes around a thing, if one does; ``others`` are those of the things that it may lie in."""
    filled = ndimage.binary_fill_holes(found.piece.mask)  # specks may be that outline
    around = labels[ndimage.binary_dilation(filled) & ~filled]
    counts = np.bincount(around + 1, minlength=len(NAMES) + 1)  # the background first
    enough = MIN_AROUND * counts.sum()
    counts[[0, *(1 + NAMES.index(colour) for colour in others)]] = 0
    return NAMES[int(counts.argmax()) - 1] if counts.max() >= enough else None


def _edge_share(solid: np.ndarray, labels: np.ndarray, colour: str) -> float:
    """How much of a thing's edge has a colour."""
    edge = labels[solid & (ndimage.distance_transform_edt(solid) <= EDGE_PX)]
    return float((edge == NAMES.index(colour)).mean())


def _listed(found: Counter) -> str:
    """ "red circle, blue square"; what is unclear is a question mark."""
    names = [" ".join(part or "?" for part in (item if isinstance(item, tuple) else (item,))) for item in found]
    return ", ".join(sorted(names)) or "none"

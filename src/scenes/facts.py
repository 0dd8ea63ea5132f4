"""What a caption says, as numbers: to each question the place of its answer among all that the grammar knows."""

from __future__ import annotations

from collections.abc import Mapping

from src.scenes import grammar
from src.scenes.grammar import Scene

_SHAPE, _COLOUR = (None, *grammar.SHAPES), (None, *grammar.COLOURS)
QUESTIONS: Mapping[str, tuple[str | int | None, ...]] = {  # None: the caption says nothing of it
    "kind": tuple(grammar.KINDS),
    "number": (0, 1, *grammar.NUMBERS),
    "shape": _SHAPE,
    "colour": _COLOUR,
    "size": tuple(grammar.SIZES_PX),
    "outline": _COLOUR,
    "position": (None, *grammar.POSITIONS),
    "relation": (None, *grammar.RELATIONS),
    "second shape": _SHAPE,
    "second colour": _COLOUR,
    "background": (None, "plain", "gradient", "striped", "dotted"),
    "its colour": _COLOUR,
    "its second colour": _COLOUR,
    "house": (None, *grammar.HOUSES),
    "trees": (None, *grammar.TREES),
    "hills": (None, *grammar.HILLS),
    "time": (None, *grammar.TIMES),
}


def answers(scene: Scene) -> tuple[int, ...]:
    """One number for each of QUESTIONS, in their order."""
    said: dict[str, str | int | None] = {"kind": scene.kind, "number": len(scene.things)}
    if scene.things:
        first = scene.things[0]
        said |= {"shape": first.shape, "colour": first.colour, "size": first.size, "outline": first.outline}
        said |= {"position": scene.position, "relation": scene.relation}
    if scene.kind == "pair":
        said |= {"second shape": scene.things[1].shape, "second colour": scene.things[1].colour}
    if scene.background is not None:
        said |= {"background": scene.background.kind} | dict(zip(("its colour", "its second colour"), scene.background.colours))
    if scene.landscape is not None:
        land = scene.landscape
        said |= {"house": land.house, "trees": land.trees, "hills": land.hills, "time": land.time}
    return tuple(possible.index(said.get(question)) for question, possible in QUESTIONS.items())

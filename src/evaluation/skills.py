"""The skills that adherence reports, after GenEval (Ghosh et al. 2023, arXiv 2310.11513), and how sure a share is.

A picture is asked about every skill that its prompt needs, and counts for it only when it is right altogether.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from src.errors import usage_error
from src.scenes import grammar
from src.scenes.grammar import Scene

if TYPE_CHECKING:
    from src.evaluation.checking import Verdict

CONFIDENCE_95 = 1.959964
GRAMMARS = ("full", "v0")
SPLITS = ("both", *grammar.SPLITS)
TARGETS: Mapping[str, float] = {"overall": 0.95, "unseen combinations": 0.85}  # what the embedded model is to reach
TARGET = 0.9  # each other skill


@dataclass(frozen=True, slots=True)
class Share:
    """So many right of so many."""

    right: int
    count: int

    @property
    def value(self) -> float | None:
        return self.right / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true share lies with 95 %: Wilson's score interval (Wilson 1927), which holds near 0 and 1, too."""
        if not self.count:
            return None
        share, z2 = self.right / self.count, CONFIDENCE_95**2 / self.count
        middle = (share + z2 / 2) / (1 + z2)
        reach = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
        return max(0.0, middle - reach), min(1.0, middle + reach)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": self.value, "interval_95": self.interval}

    def __str__(self) -> str:
        """ "0.813 (0.71 to 0.89) of 80"."""
        if self.value is None or self.interval is None:
            return "–"
        return f"{self.value:.3f} ({self.interval[0]:.2f} to {self.interval[1]:.2f}) of {self.count}"


def _names_many_colours(scene: Scene) -> bool:
    """Whether a prompt names three colours or more for one thing and its background."""
    return scene.kind == "one" and 1 + (scene.things[0].outline is not None) + len(scene.background.colours) >= 3


def _attributes_colours(scene: Scene) -> bool:
    return scene.kind == "pair" and scene.things[0].shape != scene.things[1].shape


SKILLS: Mapping[str, tuple[str, Callable[[Scene], bool]]] = {
    "single object": ("one thing", lambda scene: scene.kind == "one"),
    "two objects": ("two things", lambda scene: scene.kind == "pair"),
    "counting": ("two to four alike", lambda scene: scene.kind == "group"),
    "colours": ("one thing, three colours or more named", _names_many_colours),
    "position": ("a place or a relation named", lambda scene: bool(scene.position or scene.relation not in (None, "and"))),
    "colour attribution": ("two things of two colours and two shapes", _attributes_colours),
    "backgrounds": (
        "a gradient, stripes or dots",
        lambda scene: scene.background is not None and scene.background.kind != "plain",
    ),
    "landscapes": ("a house among trees on hills", lambda scene: scene.kind == "landscape"),
    "unseen combinations": (
        "a colour on a shape that training never shows together",
        lambda scene: grammar.split_of(scene) == "unseen",
    ),
    "overall": ("every picture", lambda scene: True),
}


@dataclass(frozen=True)
class Judged:
    """A scene, the seed that its picture was drawn with, and what was found in it."""

    scene: Scene
    seed: int
    verdict: Verdict


@dataclass(frozen=True)
class Scores:
    """The outcome of one measurement."""

    judged: tuple[Judged, ...]

    @property
    def overall(self) -> Share:
        return self.skills["overall"]

    @property
    def skills(self) -> dict[str, Share]:
        """Of each skill's pictures those that are right altogether."""
        asked = {name: [item.verdict.all for item in self.judged if needs(item.scene)] for name, (_, needs) in SKILLS.items()}
        return {name: Share(sum(rights), len(rights)) for name, rights in asked.items()}

    @property
    def checks(self) -> dict[str, Share]:
        """Of each single check the pictures that pass, whatever else is wrong with them."""
        return _shares_of_checks([item.verdict for item in self.judged])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "skills": {name: share.as_dict() for name, share in self.skills.items()},
            "checks": {name: share.as_dict() for name, share in self.checks.items()},
        }

    def lines(self) -> Iterator[str]:
        """The table for a terminal."""
        yield f"{'skill':<22}{'share':>6}  {'95 % interval':<14}{'count':>6}   pictures with"
        for name, share in self.skills.items():
            yield _line(name, share) + f"   {SKILLS[name][0]}"
        yield ""
        yield f"{'check':<22}{'share':>6}  {'95 % interval':<14}{'count':>6}"
        yield from (_line(name, share) for name, share in self.checks.items())


def _shares_of_checks(verdicts: Sequence[Verdict]) -> dict[str, Share]:
    from src.evaluation.checking import CHECKS  # imports numpy

    found = {name: [getattr(verdict, name) for verdict in verdicts] for name in CHECKS}
    return {name: Share(values.count(True), len(values) - values.count(None)) for name, values in found.items()}


def _line(name: str, share: Share) -> str:
    if share.value is None or share.interval is None:
        return f"{name:<22}{'–':>6}  {'':<14}{0:>6}"
    return f"{name:<22}{share.value:>6.3f}  {f'{share.interval[0]:.3f} to {share.interval[1]:.3f}':<14}{share.count:>6}"


def is_of_first_grammar(scene: Scene) -> bool:
    """Whether the first embedded model's grammar has it: plain backgrounds, no outlines, nothing inside another thing."""
    return (
        scene.background is not None
        and scene.background.kind == "plain"
        and scene.relation != "inside"
        and not any(thing.outline for thing in scene.things)
    )


def choose(count: int, seed: int, split: str, among: str = "full") -> list[Scene]:
    """``count`` scenes, of each kind equally many, their captions as different as there are any.

    ``both``: half held-out, half unseen combinations. ``among`` is one of GRAMMARS. Raises UserError (usage).
    """
    if count < 1:
        raise usage_error(f"--count {count}: draw at least one picture")
    if split == "both":
        return [
            *choose(count - count // 2, seed, "held-out", among),
            *(choose(count // 2, seed, "unseen", among) if count > 1 else []),
        ]
    kinds = [k for k in grammar.KINDS if k != "landscape" or (split != "unseen" and among == "full")]
    found: list[Scene] = []
    for index, kind in enumerate(kinds):
        share = count // len(kinds) + (index < count % len(kinds))
        endless = _distinct(grammar.scenes(seed, split, (kind,)))
        found += islice((s for s in endless if among == "full" or is_of_first_grammar(s)), share)
    return found


MAX_REPEATS = 1000  # in a row: every caption of the kind has come


def _distinct(scenes: Iterator[Scene]) -> Iterator[Scene]:
    """Without captions that have come, until all have: then they come once more (there are few held-out landscapes)."""
    captions: set[str] = set()
    repeats = 0
    for scene in scenes:
        caption = scene.caption.removeprefix("a picture of ")
        repeats = repeats + 1 if caption in captions else 0
        if repeats > MAX_REPEATS:
            captions.clear()
            repeats = 0
        if not repeats:
            captions.add(caption)
            yield scene

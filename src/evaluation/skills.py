"""The skills that adherence reports, after GenEval (Ghosh et al. 2023, arXiv 2310.11513), and how sure a share is.

A picture is asked about every skill that its prompt needs, and counts for it only when it is right altogether. Unseen
combinations of colour and shape are a skill of their own, and enter no other.
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
SPLITS = ("both", *grammar.SPLITS)
UNSEEN = "unseen combinations"
TARGETS: Mapping[str, float] = {"overall": 0.95, UNSEEN: 0.85}  # what the embedded model is to reach
TARGET = 0.9  # each other skill


@dataclass(frozen=True, slots=True)
class Share:
    """So many right of so many; of fewer captions where they repeat."""

    right: int
    count: int
    captions: int | None = None  # distinct ones, None: each its own

    @property
    def value(self) -> float | None:
        return self.right / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true share lies with 95 %: Wilson's score interval (Wilson 1927), which holds near 0 and 1, too.

        Pictures of one caption resemble each other: the interval is that of so many captions, rather too wide than too narrow.
        """
        if not self.count:
            return None
        share, z2 = self.right / self.count, CONFIDENCE_95**2 / (self.captions or self.count)
        middle = (share + z2 / 2) / (1 + z2)
        reach = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
        return max(0.0, middle - reach), min(1.0, middle + reach)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = asdict(self) | {"captions": self.captions or self.count}
        return {**own, "share": self.value, "interval_95": self.interval}

    @property
    def pictures(self) -> str:
        """ "80", or "62 pictures of 15 captions"."""
        return f"{self.count}" if self.captions is None else f"{self.count} pictures of {self.captions} captions"

    def __str__(self) -> str:
        """ "0.813 (0.71 to 0.89) of 80"."""
        if self.value is None or self.interval is None:
            return "–"
        return f"{self.value:.3f} ({self.interval[0]:.2f} to {self.interval[1]:.2f}) of {self.pictures}"


def is_unseen(scene: Scene) -> bool:
    """Whether it has a colour on a shape that training never shows together."""
    return grammar.split_of(scene) == "unseen"


def _names_many_colours(scene: Scene) -> bool:
    """Whether a prompt names three colours or more for one thing and its background."""
    return scene.kind == "one" and 1 + (scene.things[0].outline is not None) + len(scene.background.colours) >= 3


def _attributes_colours(scene: Scene) -> bool:
    return scene.kind == "pair" and scene.things[0].shape != scene.things[1].shape


_SKILLS: Mapping[str, tuple[str, Callable[[Scene], bool]]] = {
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
    "overall": ("every prompt but those of the next row", lambda scene: True),
}


def _of_seen(needs: Callable[[Scene], bool]) -> Callable[[Scene], bool]:
    return lambda scene: needs(scene) and not is_unseen(scene)


SKILLS: Mapping[str, tuple[str, Callable[[Scene], bool]]] = {
    **{name: (what, _of_seen(needs)) for name, (what, needs) in _SKILLS.items()},
    UNSEEN: ("a colour on a shape that training never shows together", is_unseen),
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
        asked = {name: [item for item in self.judged if needs(item.scene)] for name, (_, needs) in SKILLS.items()}
        return {name: _share([(item.scene, item.verdict.all) for item in items]) for name, items in asked.items()}

    @property
    def checks(self) -> dict[str, Share]:
        """Of each single check the pictures that pass, whatever else is wrong with them, of all prompts."""
        from src.evaluation.checking import CHECKS  # imports numpy

        found = {name: [(item.scene, getattr(item.verdict, name)) for item in self.judged] for name in CHECKS}
        return {name: _share([pair for pair in pairs if pair[1] is not None]) for name, pairs in found.items()}

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
            yield _line(name, share) + f"   {SKILLS[name][0]}{_repeats(share)}"
        yield ""
        yield f"{'check':<22}{'share':>6}  {'95 % interval':<14}{'count':>6}   of all prompts"
        yield from (_line(name, share) + f"   {_repeats(share).removeprefix('; ')}" for name, share in self.checks.items())


def _share(rights: Sequence[tuple[Scene, bool]]) -> Share:
    captions = len({_words(scene) for scene, _ in rights})
    return Share(sum(right for _, right in rights), len(rights), captions if captions < len(rights) else None)


def _words(scene: Scene) -> str:
    return scene.caption.removeprefix("a picture of ")


def _repeats(share: Share) -> str:
    return "" if share.captions is None else f"; {share.pictures}"


def _line(name: str, share: Share) -> str:
    if share.value is None or share.interval is None:
        return f"{name:<22}{'–':>6}  {'':<14}{0:>6}"
    return f"{name:<22}{share.value:>6.3f}  {f'{share.interval[0]:.3f} to {share.interval[1]:.3f}':<14}{share.count:>6}"


def choose(count: int, seed: int, split: str, among: str = "full", lattice_px: int = 0) -> list[Scene]:
    """``count`` scenes, of each kind equally many, their captions as different as there are any.

    ``both``: half held-out, half unseen combinations. ``among`` is one of `grammar.GRAMMARS`, ``lattice_px`` as
    `grammar.scenes` has it: it changes no caption. Raises UserError (usage).
    """
    if count < 1:
        raise usage_error(f"--count {count}: draw at least one picture")
    if split == "both":
        return [
            *choose(count - count // 2, seed, "held-out", among, lattice_px),
            *(choose(count // 2, seed, "unseen", among, lattice_px) if count > 1 else []),
        ]
    kinds = [kind for kind in grammar.GRAMMARS[among] if kind != "landscape" or split != "unseen"]
    found: list[Scene] = []
    for index, kind in enumerate(kinds):
        share = count // len(kinds) + (index < count % len(kinds))
        found += islice(_distinct(grammar.scenes(seed, split, (kind,), among, lattice_px)), share)
    return found


MAX_REPEATS = 1000  # in a row: every caption of the kind has come


def _distinct(scenes: Iterator[Scene]) -> Iterator[Scene]:
    """Without captions that have come, until all have: then they come once more (there are few held-out landscapes)."""
    captions: set[str] = set()
    repeats = 0
    for scene in scenes:
        caption = _words(scene)
        repeats = repeats + 1 if caption in captions else 0
        if repeats > MAX_REPEATS:
            captions.clear()
            repeats = 0
        if not repeats:
            captions.add(caption)
            yield scene

"""The proof of the checker: rendered truth must pass, worn as a model's pictures are; what differs in one thing must not."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from src.evaluation.checking import check
from src.evaluation.mistakes import CHANGES, Spoil
from src.evaluation.skills import Share
from src.scenes import drawing, grammar
from src.scenes.grammar import SIZE_PX, Scene

MIN_RIGHT, MAX_ACCEPTED = 0.995, 0.01
MIN_RIGHT_WORN = 0.95  # of truth in each wear: pictures of a model are never as sharp as drawn ones
MAX_ACCEPTED_OF_KIND = 0.03  # of each change by itself
MIN_COUNT = 400  # less proves nothing of a kind: each change comes some twenty times
WORN = "blur 0.8 px, tint, noise 5"
COUNT = 2400  # of true scenes, and of wrong pairs
AS_RENDERED = "as rendered"
SHOWN = 40  # failures that are noted
Wear = Callable[[Image.Image, Random], Image.Image]


def prove(count: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Judge ``count`` true pictures, an eighth of them in each wear, and as many wrong pairs, a quarter of them worn, too.

    ``holds``: of MIN_COUNT at least, truth is within its bounds, as rendered and in each wear, and wrong pairs within theirs,
    in all, change by change, and worn.
    Lines of the table go to ``say``, as they are known; the result is for JSON.
    """
    scenes, rows = truth(count, seed), {}
    say(f"{'rendered truth, right':<28}{'all':>8}" + "".join(f"{kind:>11}" for kind in grammar.KINDS))
    failed: list[dict[str, Any]] = []
    for name, wear in WEARS.items():
        every, kinds, wrong = right_of_truth(scenes if name == AS_RENDERED else scenes[: max(1, count // 8)], seed, wear)
        rows[name] = {"all": every.as_dict(), **{kind: share.as_dict() for kind, share in kinds.items()}}
        shares = (f"{kinds[kind].value:>11.4f}" if kind in kinds else f"{'–':>11}" for kind in grammar.KINDS)
        say(f"{name:<28}{every.value:>8.4f}" + "".join(shares))
        failed += [{"wear": name, "caption": scene.caption, "faults": faults} for scene, faults in wrong[:SHOWN]]
    every, changes, passed = accepted_of_wrong(wrong_pairs(count, seed), seed, WEARS[AS_RENDERED])
    worn, _, passed_worn = accepted_of_wrong(wrong_pairs(max(1, count // 4), seed), seed, WEARS[WORN])
    passed += passed_worn
    say("")
    say(f"{'wrong pairs, accepted':<28}{'share':>8}{'count':>8}")
    table = {"all": every, **changes, WORN: worn}
    for name, share in table.items():
        say(f"{name:<28}{share.value:>8.4f}{share.count:>8}")
    right = {name: row["all"]["share"] for name, row in rows.items()}
    accepted = [{"what": pair.what, "caption": pair.scene.caption, "shown": pair.shown.as_dict()} for pair in passed[:SHOWN]]
    return {
        "holds": count >= MIN_COUNT and is_accepted(right) and is_refused(every, changes, worn), "min_count": MIN_COUNT,
        "count": count, "seed": seed, "truth": rows, "wrong": {name: share.as_dict() for name, share in table.items()},
        "failed": failed, "accepted": accepted,
    }  # fmt: skip


def examples(seed: int) -> tuple[list[tuple[str, Image.Image]], list[tuple[str, Image.Image]]]:
    """A picture as each wear leaves it, and one of each change, each with what it is held to be: for the report."""
    scene, random = truth(1, seed)[0], Random(seed)
    worn = [(f"{name}\n{scene.caption}", wear(drawing.draw(scene), random)) for name, wear in WEARS.items()]
    wrong = {pair.what: pair for pair in wrong_pairs(len(CHANGES), seed)}
    return worn, [(f"{what}\nheld to be: {pair.scene.caption}", pair.picture()) for what, pair in wrong.items()]


def is_accepted(right: Mapping[str, float]) -> bool:
    """Whether enough of truth passes, by wear: as rendered, and in each of the others."""
    return right[AS_RENDERED] >= MIN_RIGHT and min(right.values()) >= MIN_RIGHT_WORN


def is_refused(every: Share, changes: Mapping[str, Share], worn: Share) -> bool:
    """Whether few enough wrong pairs pass: in all, worn, and change by change, where a single one of few is within chance."""
    few = all(share.right <= max(1, MAX_ACCEPTED_OF_KIND * share.count) for share in changes.values())
    return few and every.value <= MAX_ACCEPTED and worn.value <= MAX_ACCEPTED


def truth(count: int, seed: int) -> list[Scene]:
    """Scenes of all splits and kinds, in turn."""
    endless = [grammar.scenes(seed, split) for split in grammar.SPLITS]
    return [next(endless[index % len(endless)]) for index in range(count)]


def _noise(picture: Image.Image, random: Random, deviation: float = 8.0) -> Image.Image:
    noise = np.random.default_rng(random.getrandbits(32)).normal(0, deviation, (*picture.size[::-1], 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def _jpeg(picture: Image.Image, random: Random) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def _shift(picture: Image.Image, random: Random) -> Image.Image:
    """The whole picture tinted, each channel by up to 12 levels."""
    shift = [random.uniform(-12, 12) for _ in range(3)]
    return Image.fromarray(np.clip(np.asarray(picture) + np.array(shift), 0, 255).astype(np.uint8))


def _soft_and_tinted(picture: Image.Image, random: Random) -> Image.Image:
    return _noise(_shift(picture.filter(ImageFilter.GaussianBlur(0.8)), random), random, 5.0)


WEARS: Mapping[str, Wear] = {
    AS_RENDERED: lambda picture, random: picture,
    "blur 0.7 px": lambda picture, random: picture.filter(ImageFilter.GaussianBlur(0.7)),
    "blur 1 px": lambda picture, random: picture.filter(ImageFilter.GaussianBlur(1.0)),
    "noise 8 levels": _noise,
    "JPEG at quality 50": _jpeg,
    "tint up to 12 levels": _shift,
    "blur 0.8 px, tint, noise 5": _soft_and_tinted,
    "half the size": lambda picture, random: picture.resize((SIZE_PX // 2,) * 2, Image.Resampling.BOX),
    "four times the size": lambda picture, random: picture.resize((SIZE_PX * 4,) * 2, Image.Resampling.LANCZOS),
}


def right_of_truth(scenes: list[Scene], seed: int, wear: Wear) -> tuple[Share, dict[str, Share], list[tuple[Scene, str]]]:
    """The share that passes, in all and by kind, and the scenes that do not with the reason."""
    random, rights, failed = Random(seed), {}, []
    for scene in scenes:
        verdict = check(wear(drawing.draw(scene), random), scene)
        rights.setdefault(scene.kind, []).append(verdict.all)
        if not verdict.all:
            failed.append((scene, "; ".join(verdict.faults)))
    every = [right for of_kind in rights.values() for right in of_kind]
    return Share(sum(every), len(every)), {kind: Share(sum(r), len(r)) for kind, r in rights.items()}, failed


@dataclass(frozen=True)
class Wrong:
    """A picture's scene, and the scene that it is held to be of: they differ in ``what``, or in what is added when drawn."""

    what: str
    scene: Scene
    shown: Scene
    added: Spoil | None = None

    def picture(self) -> Image.Image:
        """What is shown."""
        picture = drawing.draw(self.shown)
        return picture if self.added is None else self.added(picture)


def wrong_pairs(count: int, seed: int) -> Iterator[Wrong]:
    """Each change in turn, on scenes of all splits and kinds."""
    random, endless = Random(f"wrong {seed}"), [grammar.scenes(seed, split) for split in grammar.SPLITS]
    given = 0
    while given < count:
        for what, change in CHANGES.items():
            shown = None
            while shown is None:
                scene = next(random.choice(endless))
                shown = change(scene, random)
            yield Wrong(what, scene, shown) if isinstance(shown, Scene) else Wrong(what, scene, scene, shown)
            given += 1
            if given == count:
                return


def accepted_of_wrong(pairs: Iterator[Wrong], seed: int, wear: Wear) -> tuple[Share, dict[str, Share], list[Wrong]]:
    """The share of wrong pairs that pass, in all and by what differs, and which."""
    random, accepted, passed = Random(seed), {}, []
    for pair in pairs:
        verdict = check(wear(pair.picture(), random), pair.scene)
        accepted.setdefault(pair.what, []).append(verdict.all)
        if verdict.all:
            passed.append(pair)
    every = [a for of_kind in accepted.values() for a in of_kind]
    return Share(sum(every), len(every)), {what: Share(sum(a), len(a)) for what, a in accepted.items()}, passed

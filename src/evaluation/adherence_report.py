"""``report.html`` of adherence: the figures, and pictures that are right and wrong, each with what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image

from src import report
from src.evaluation.sheet import shrunk
from src.evaluation.skills import SKILLS, TARGET, TARGETS, Judged, Scores, Share
from src.version import VERSION

MAX_RIGHT, MAX_WRONG = 36, 72
Pairs = Sequence[tuple[str, Image.Image]]  # captions and pictures
_PICTURE_PX = 128
_ON_SKILLS = """\
After GenEval (Ghosh et al. 2023): a picture is asked about each skill that its prompt needs, and counts only when it is right \
altogether: background, number, colours, shapes, which colour on which shape, place, relation, size and outline, as far as the \
prompt names them. Unseen combinations of a colour and a shape enter no other row. Intervals are Wilson's, 95 %, for as many \
captions as there are: pictures of one caption resemble each other."""
_ON_CHECKS = """\
All pictures, unseen combinations too, check by check: what passes, whatever else is wrong with the picture. Of a landscape, \
background means time, sky and hills, count the trees, colours the house."""
_ON_PROOF = """\
It holds where at least 99.5 % of rendered truth is right, and 95 % in each wear, where at most 1 % of the wrong pictures are \
accepted, as drawn and worn, and at most 3 % of those that differ in any one thing. A wrong picture is drawn from its own \
scene and held to be of another."""
_ON_PICTURES = """\
The checker works by colours and shapes alone; a picture that looks right to you and is listed as wrong is worth reporting."""


def thumbnail(picture: Image.Image) -> Image.Image:
    """As large as the report shows it."""
    return shrunk(picture, _PICTURE_PX)


def page(scores: Scores, pictures: Sequence[Image.Image], facts: Mapping[str, Any]) -> bytes:
    """The finished file; ``pictures``, thumbnails will do, in the order of ``scores.judged``."""
    settings = dict(facts.get("settings", {}))
    head = {**settings, **{name: value for name, value in facts.items() if name != "settings"}, "version": VERSION}
    targets = {name: f"{TARGETS.get(name, TARGET):.2f}" for name in scores.skills}
    skills = [[name, SKILLS[name][0], *_cells(share), targets[name]] for name, share in scores.skills.items()]
    checks = [[name, *_cells(share)] for name, share in scores.checks.items()]
    pairs = list(zip(scores.judged, pictures, strict=True))
    parts = [
        report.section(
            "Skills",
            report.table(
                ["skill", "pictures with", "right", "95 % interval", "count", "target"],
                skills,
                marked=[list(scores.skills).index("overall")],
            ),
            report.text(_ON_SKILLS),
        ),
        report.section("Checks", report.table(["check", "right", "95 % interval", "count"], checks), report.text(_ON_CHECKS)),
        _gallery("Wrong", [pair for pair in pairs if not pair[0].verdict.all], MAX_WRONG),
        _gallery("Right", [pair for pair in pairs if pair[0].verdict.all], MAX_RIGHT),
        report.section("Settings", report.facts(head)),
    ]
    return report.page(f"Adherence of {settings.get('model', 'pictures')}", *parts)


def proof_page(result: Mapping[str, Any], worn: Pairs, wrong: Pairs) -> bytes:
    """The report of ``--prove``: its tables, an example of each wear and of each change, and the pictures that it misjudged.

    ``result`` is that of `src.evaluation.proof.prove`, ``worn`` and ``wrong`` are that room's `examples`.
    """
    kinds = list(next(iter(result["truth"].values())))
    shares = [[name, *(_share(row.get(kind)) for kind in kinds)] for name, row in result["truth"].items()]
    changes = [[name, _share(row), str(row["count"])] for name, row in result["wrong"].items()]
    failed = [[item["wear"], item["caption"], item["faults"]] for item in result["failed"]]
    accepted = [[item["what"], item["caption"], item["shown"]["caption"]] for item in result["accepted"]]
    facts = {name: result[name] for name in ("holds", "count", "seed", "min_count")}
    parts = [
        report.section("Bounds", report.facts(facts), report.text(_ON_PROOF)),
        report.section("Rendered truth, right", report.table(["as", *kinds], shares), _strip(worn)),
        report.section("Wrong pictures, accepted", report.table(["differs in", "share", "count"], changes), _strip(wrong)),
        report.section(f"Truth that was refused: {len(failed)}", report.table(["as", "caption", "faults"], failed)),
        report.section(
            f"Wrong pictures that were accepted: {len(accepted)}", report.table(["what", "caption", "drawn"], accepted)
        ),
    ]
    return report.page("The proof of the checker", *parts)


def _share(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None or row["share"] is None else f"{row['share']:.3f}"


def _strip(pairs: Pairs) -> str:
    return report.gallery([report.picture(picture, caption, _PICTURE_PX) for caption, picture in pairs])


def _cells(share: Share) -> tuple[str, str, str]:
    if share.value is None or share.interval is None:
        return "–", "–", "0"
    return f"{share.value:.3f}", f"{share.interval[0]:.3f} to {share.interval[1]:.3f}", share.pictures


def _gallery(title: str, pairs: list[tuple[Judged, Image.Image]], most: int) -> str:
    """Pictures of all kinds, in turn."""
    shown = _in_turn(pairs)[:most]
    figures = [
        report.picture(picture, "\n".join([f"{item.scene.caption}, seed {item.seed}", *item.verdict.faults]), _PICTURE_PX)
        for item, picture in shown
    ]
    return report.section(
        f"{title}: {len(shown)} of {len(pairs)}", report.text(_ON_PICTURES if title == "Wrong" else ""), report.gallery(figures)
    )


def _in_turn(pairs: list[tuple[Judged, Image.Image]]) -> list[tuple[Judged, Image.Image]]:
    kinds = dict.fromkeys(item.scene.kind for item, _ in pairs)
    rows = [[pair for pair in pairs if pair[0].scene.kind == kind] for kind in kinds]
    return [pair for row in zip_longest(*rows) for pair in row if pair is not None]

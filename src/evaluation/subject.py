"""``subject``: what a LoRA has learnt of its photos, what it still hears of the prompt, and whether it stays itself.

Fidelity and faithfulness pull against each other: an adapter that copies its photos draws nothing else. So both are measured,
with the adapter and without it, as in the evaluation of DreamBooth (Ruiz et al. 2023, section 4.2).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import ExitCode, UserError, usage_error
from src.evaluation import drawing
from src.evaluation.arms import SHEET, draw_arms, order_arms, pictures_table, sheet_of
from src.evaluation.axes import lora_label
from src.flags import Flag
from src.request import user_path

if TYPE_CHECKING:
    from torch import Tensor

    from src.evaluation.arms import Arm

SUMMARY = "a LoRA beside its photos: likeness (CLIP-I, DINO), faithfulness to the prompt (CLIP-T), consistency"
WITHOUT, WITH = "without", "with"
_PHOTO_PX, _SHOWN_PHOTOS = 160, 24

_ABOUT = """\
CLIP-I and DINO: mean cosine of features between the pictures of the subject and the photos. DINO sees the subject's own \
traits, CLIP more of its kind, and both take a copied background for likeness. CLIP-T: cosine between each picture and its \
prompt without the made-up word. Consistency: mean cosine over all pairs of the pictures of the subject, how much it is the \
same from picture to picture; it is high, too, where all pictures are alike in everything. Balance: the geometric mean of \
CLIP-I and CLIP-T relative to the model without the LoRA. The photos among themselves show how high likeness can be."""

FLAGS = (
    Flag(("--photos",), "the photos that it has learnt from, or others of the same subject", metavar="DIR"),
    Flag(("--lora",), "the adapter, with a weight", metavar="PATH[:W]"),
    Flag(("--trigger",), "its made-up word: prompts with it show the subject, and CLIP reads them without it", metavar="TEXT"),
    drawing.PROMPT,
    drawing.PROMPTS,
    drawing.SEED,
    drawing.NUM,
    Flag(("--clip",), "the CLIP that judges: a folder with both towers (default: the first on this disk)", metavar="FOLDER"),
    Flag(
        ("--dino",),
        "a DINO that judges, too: a folder, facebook/dino-vits16 in publications (default: the first on this disk)",
        metavar="FOLDER",
    ),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One arm in numbers, cosines; None where nothing could measure it."""

    clip_i: float | None
    clip_t: float | None
    dino: float | None
    consistency: float | None
    dino_consistency: float | None
    balance: float | None = None
    each: tuple[tuple[float | None, float | None], ...] = ()  # of each picture: CLIP-I (or DINO), CLIP-T


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    drawing.add_flags(parser, FLAGS)


def run(options: argparse.Namespace, say: drawing.Say) -> int:
    """Draw with and without the adapter, measure both, and write the sheet and the report. Returns the exit code."""
    folder, typed = drawing.read_typed(options, say)
    missing = [flag for flag in ("--photos", "--lora") if flag.lstrip("-") not in typed]
    if missing:
        raise usage_error(f"subject: {missing[0]} is missing; give --photos DIR, --lora FILE and --prompts FILE")
    lora, trigger = typed.pop("lora"), typed.pop("trigger", None)
    judges = {name: typed.pop(name, None) for name in ("clip", "dino")}
    prompts, seeds = drawing.read_prompts(typed), drawing.read_seeds(typed)
    from src.dataset import find_pictures
    from src.evaluation.inputs import plain_text
    from src.prompts import clean_prompt
    from src.training.scores import names_subject

    drawn = [plain_text(clean_prompt(prompt)) for prompt in prompts]
    if trigger is not None and not any(names_subject(text, trigger) or "__" in text or "{" in text for text in drawn):
        raise usage_error(f"--trigger '{trigger}': no prompt has it; write it as the prompts do, or leave it out")
    photos = find_pictures(user_path(typed.pop("photos")))
    wanted = {f"{WITHOUT} {lora_label(lora)}": typed, f"{WITH} {lora_label(lora)}": {**typed, "lora": [lora]}}
    orders = order_arms(wanted, prompts, seeds, say)
    jury = _Jury(judges, typed, trigger, say)
    jury.look_at(photos)  # before anything is drawn: without judges and photos all would be in vain
    arms = draw_arms(orders, folder, say)
    for line in _write(folder, arms, jury.judge(arms), jury, photos):
        print(line)
    return ExitCode.OK


class _Jury:
    """CLIP and DINO, as far as they are on the disk, and what they saw of the photos."""

    def __init__(self, named: dict[str, str | None], typed: dict[str, Any], trigger: str | None, say: drawing.Say) -> None:
        """Raises UserError for a judge that was named and cannot be had, and where there is none."""
        from src.arguments import build_config
        from src.evaluation import dino, features, likeness

        config = build_config(typed)
        cache = config.paths.folder("cache")
        self.trigger, self._say = trigger, say
        self._folders: list[Path | None] = [None, user_path(named["dino"]) if named["dino"] else dino.find(cache)]
        if self._folders[1] is not None:
            dino.check(self._folders[1])
        try:
            self._folders[0] = likeness.clip_folder(named["clip"], [config.model.model_id], cache)
        except UserError as error:
            if named["clip"] is not None or self._folders[1] is None:
                raise
            say(f"scores  by DINO alone: {error}")
        self.names = [features.public_name(folder) for folder in self._folders if folder is not None]

    def look_at(self, photos: Sequence[Path]) -> None:
        """Load the judges, show them the photos, and let go of them: drawing needs the memory. Raises UserError."""
        from src.training.scores import some_photos

        chosen = some_photos(photos)
        self._photos = [None if judge is None else self._see(chosen, judge.picture_features) for judge in self._load()]
        self.looked_at = len(chosen)

    def _load(self) -> list[Any]:
        from src.evaluation import dino, likeness

        openers = likeness.open_clip, dino.Dino
        return [None if folder is None else opener(folder) for opener, folder in zip(openers, self._folders)]

    def of_photos(self) -> Figures:
        """The photos among themselves: each pair of two."""
        from src.evaluation.likeness import consistency

        clip, dino = (None if seen is None else consistency(seen) for seen in self._photos)
        return Figures(clip, None, dino, clip, dino)

    def judge(self, arms: Sequence[Arm]) -> list[Figures]:
        """Both judges' figures of the arm without the adapter, and of the one with it. Raises UserError."""
        judges = self._load()
        base = self._judge(judges, arms[0], None)
        return [base, self._judge(judges, arms[1], base)]

    def _judge(self, judges: Sequence[Any], arm: Arm, base: Figures | None) -> Figures:
        """``base`` is the other arm, to which the balance is relative; it has the same prompts."""
        from src.evaluation.likeness import consistency, say_cut
        from src.training.scores import Score, balance, faithfulness, fidelity, shows_subject, without_trigger

        texts = [shot.text for shot in arm.shots]
        shown = shows_subject(texts, self.trigger)
        read = [without_trigger(text, self.trigger) for text in texts]
        likeness: list[list[float] | None] = []
        spread: list[float | None] = []
        clip_t = None
        for judge, photos in zip(judges, self._photos):
            if judge is None:
                likeness.append(None)
                spread.append(None)
                continue
            seen = self._see(arm.paths, judge.picture_features)
            likeness.append(fidelity(seen, photos).tolist())
            spread.append(consistency(seen[shown]))
            if judge is judges[0]:  # CLIP: DINO reads nothing
                clip_t = faithfulness(seen, judge.text_features(read)).tolist()
                if base is None:
                    say_cut(judge, read, self._say)
        clip_i, dino = (_mean(values, shown) for values in likeness)
        score = Score(clip_i, _mean(clip_t))
        relative = None if base is None else balance(score, Score(base.clip_i, base.clip_t))
        each = zip(likeness[0] or likeness[1], clip_t or [None] * len(texts))
        return Figures(clip_i, score.clip_t, dino, *spread, relative, tuple(each))

    def _see(self, paths: Sequence[Path], see: Callable[..., Tensor]) -> Tensor:
        from src.evaluation.likeness import features_of

        return features_of(paths, see)


def _mean(values: Sequence[float] | None, chosen: Sequence[bool] | None = None) -> float | None:
    kept = [value for index, value in enumerate(values or []) if chosen is None or chosen[index]]
    return sum(kept) / len(kept) if kept else None


def _write(folder: Path, arms: Sequence[Arm], figures: Sequence[Figures], jury: _Jury, photos: Sequence[Path]) -> list[str]:
    """The sheet, the figures and the report; returns the lines to print."""
    from src import files, report
    from src.evaluation import results
    from src.evaluation.listing import text_table
    from src.images import read_image

    names = {
        "clip_i": "CLIP-I", "dino": "DINO", "clip_t": "CLIP-T", "consistency": "consistency (CLIP)",
        "dino_consistency": "consistency (DINO)", "balance": "balance",
    }  # fmt: skip
    labelled = {**{arm.label: own for arm, own in zip(arms, figures)}, "the photos among themselves": jury.of_photos()}
    shown = [name for name in names if any(getattr(own, name) is not None for own in labelled.values())]
    columns = ["", *(names[name] for name in shown)]
    rows = [[label, *(getattr(own, name) for name in shown)] for label, own in labelled.items()]
    captions = [["  ".join(_caption(*pair)) for pair in own.each] for own in figures]
    result = {
        "pictures": len(arms[0].shots), "photos": len(photos), "photos_looked_at": jury.looked_at, "judges": jury.names,
        "trigger": jury.trigger,
        "figures": {label: {name: getattr(own, name) for name in names} for label, own in labelled.items()},
        "arms": [
            [
                shot.facts | {"file": str(shot.path.relative_to(folder)), "likeness": pair[0], "clip_t": pair[1]}
                for shot, pair in zip(arm.shots, own.each)
            ]
            for arm, own in zip(arms, figures)
        ],
    }  # fmt: skip
    pictures = f"{len(arms[0].shots)} pictures an arm, the same prompts and seeds"
    head = f"{pictures}; {jury.looked_at} of {len(photos)} photos; judged by {' and '.join(jury.names)}"
    gallery = [report.picture(read_image(path), max_px=_PHOTO_PX) for path in photos[:_SHOWN_PHOTOS]]
    page = report.page(
        f"Subject: {arms[1].label.removeprefix(WITH).strip()}",
        report.text(head),
        report.section("Figures", report.table(columns, rows), report.text(_ABOUT)),
        report.section("Photos", report.gallery(gallery)),
        report.section("Pictures", pictures_table(arms, captions)),
    )
    files.check_writable_folder(folder)
    sheet = files.publish_bytes(folder / SHEET, sheet_of(arms, captions))
    return [*text_table(columns, rows), str(sheet), str(results.publish(folder, "subject", result, page))]


def _caption(likeness: float | None, clip_t: float | None) -> list[str]:
    named = {"likeness": likeness, "prompt": clip_t}
    return [f"{name} {value:.3f}" for name, value in named.items() if value is not None]

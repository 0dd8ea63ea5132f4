"""``compare A B``: two models, two LoRAs, or a model with and without one, on the same prompts and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import preset_names
from src.errors import ExitCode, UserError, usage_error
from src.evaluation import drawing
from src.evaluation.arms import SHEET, draw_arms, order_arms, pictures_table, sheet_of
from src.evaluation.axes import NO_LORA, lora_label
from src.flags import Flag
from src.model_files import family_of_header
from src.named_files import adapter_files
from src.recipe import public_name
from src.request import LoraChoice
from src.tensor_files import read_header
from src.terminal import counted

if TYPE_CHECKING:
    from src.evaluation.arms import Arm
    from src.evaluation.likeness import Mean

SUMMARY = "two models or LoRAs on the same prompts and seeds, side by side, with figures"

_ABOUT = """\
CLIP score: 100 times the cosine of CLIP's features of a picture and of its prompt, mean and standard error over the \
prompts, each with the mean of its pictures; over the pictures where there is one prompt, and then it holds for that prompt \
alone. The difference is of pairs of one prompt and seed, B less A: it means something where it is several times its error. \
Pixel difference: the mean of all levels, 0 to 255, between the pictures of a pair. Seconds: the median of a picture, \
without loading."""

FLAGS = (
    drawing.PROMPT,
    drawing.PROMPTS,
    drawing.SEED,
    drawing.NUM,
    Flag(("--clip",), "the CLIP that judges: a folder with both towers (default: the first on this disk)", metavar="FOLDER"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    each = f"a model as --model takes it, an adapter (PATH[:W], on --model), or {NO_LORA}: --model without one"
    parser.add_argument("a", metavar="A", help=each)
    parser.add_argument("b", metavar="B", help="the same")
    drawing.add_flags(parser, FLAGS)


def run(options: argparse.Namespace, say: drawing.Say) -> int:
    """Draw both sides, measure them, and write the sheet and the report. Returns the exit code."""
    folder, typed = drawing.read_typed(options, say)
    clip_name = typed.pop("clip", None)
    wanted = _sides(typed, [typed.pop("a"), typed.pop("b")])
    orders = order_arms(wanted, drawing.read_prompts(typed), drawing.read_seeds(typed), say)
    judge = _find_judge(clip_name, [order for own in orders.values() for order in own], say)
    arms = draw_arms(orders, folder, say)
    scores = _clip_scores(arms, judge, say) if judge else None
    for line in _write(folder, arms, scores, judge):
        print(line)
    return ExitCode.OK


def _sides(typed: dict[str, Any], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Both sides by their labels, each as what was typed for it. Raises UserError (usage)."""
    kinds = ["none" if text == NO_LORA else "lora" if _is_adapter(text) else "model" for text in texts]
    if kinds == ["model", "model"] and "model" in typed:
        raise usage_error("compare: both sides are models, so --model has nothing to say; leave it out")
    if texts[0] == texts[1]:
        raise usage_error(f"compare: A and B are both {texts[0]}; name two that differ")
    base = {name: value for name, value in typed.items() if name not in ("prompt", "prompts", "num")}
    sides = {}
    for letter, text, kind in zip("AB", texts, kinds):
        label = {"none": "no LoRA", "lora": lora_label(text) if kind == "lora" else "", "model": public_name(text)}[kind]
        own = {"none": {}, "lora": {"lora": [*base.get("lora", []), text]}, "model": {"model": text}}[kind]
        sides[f"{letter}: {label}"] = {**base, **own}
    return sides


def _is_adapter(text: str) -> bool:
    """Whether A or B is an adapter on the disk; what is no file or folder is a model's name."""
    path = LoraChoice.parse(text).path
    if text in ("embedded", *preset_names()) or not path.exists():
        return False
    if path.is_dir():
        return not (path / "model_index.json").is_file() and bool(adapter_files(path))
    if path.suffix != ".safetensors":
        return False
    try:
        family_of_header(read_header(path), path)
    except UserError:
        return True  # what it is instead, and that it is no adapter either, is said when it is read
    return False


def _find_judge(named: str | None, orders: Sequence[drawing.Order], say: drawing.Say) -> Path | None:
    """The folder of the CLIP, proven to load before anything is drawn; None, said, where there is none and none was named."""
    from src.evaluation import likeness

    models = list({order.config.model.model_id for order in orders})
    try:
        place = likeness.clip_folder(named, models, orders[0].config.paths.folder("cache"))
        likeness.open_clip(place)  # and let go: drawing needs the memory
    except UserError as error:
        if named is not None:
            raise
        say(f"scores  none: {error}")
        return None
    return place


def _clip_scores(arms: Sequence[Arm], judge: Path, say: drawing.Say) -> list[list[float]]:
    """Each picture's score, arm by arm. Raises UserError."""
    from src.evaluation import likeness
    from src.training.scores import faithfulness

    clip, scores = likeness.open_clip(judge), []
    likeness.say_cut(clip, [shot.text for arm in arms for shot in arm.shots], say)
    for arm in arms:
        pictures = likeness.features_of(arm.paths, clip.picture_features)
        scores.append((100 * faithfulness(pictures, clip.text_features([shot.text for shot in arm.shots]))).tolist())
    return scores


def _write(folder: Path, arms: Sequence[Arm], scores: list[list[float]] | None, place: Path | None) -> list[str]:
    """The sheet, the figures and the report; returns the lines to print."""
    from src import files, report
    from src.evaluation import features, results
    from src.evaluation.likeness import Mean, pixel_difference
    from src.evaluation.listing import text_table
    from src.images import read_image

    differences = [pixel_difference(*map(read_image, pair)) for pair in zip(*(arm.paths for arm in arms))]
    prompts = [shot.facts["prompt"] for shot in arms[0].shots]
    pixels = Mean.over_prompts(differences, prompts)
    means = [Mean.over_prompts(own, prompts) for own in scores] if scores else [None, None]
    gain = Mean.over_prompts([b - a for a, b in zip(*scores)], prompts) if scores else None
    judge = features.public_name(place) if place else None
    captions = [[f"CLIP {value:.1f}" for value in own] for own in scores] if scores else [[""] * len(arm.shots) for arm in arms]
    rows = [[arm.label, _text(mean), arm.seconds, None] for arm, mean in zip(arms, means)]
    rows.append(["B less A", _text(gain), arms[1].seconds - arms[0].seconds, _text(pixels)])
    columns = ["", "CLIP score", "seconds a picture", "pixel difference"]
    result = {
        "pictures": len(prompts), "prompts": len(set(prompts)), "clip": judge,
        "clip_score_difference": gain and gain.as_json(), "pixel_difference": pixels and pixels.as_json(),
        "sides": [
            {
                "label": arm.label, "clip_score": mean and mean.as_json(), "seconds": arm.seconds,
                "pictures": [
                    shot.facts | {"file": str(shot.path.relative_to(folder)), "clip_score": scores and scores[number][index]}
                    for index, shot in enumerate(arm.shots)
                ],
            }
            for number, (arm, mean) in enumerate(zip(arms, means))
        ],
    }  # fmt: skip
    count = f"{counted(len(prompts), 'picture')} of {counted(len(set(prompts)), 'prompt')} a side, the same prompts and seeds"
    count += f"; judged by {judge}" if judge else ""
    page = report.page(
        " | ".join(arm.label for arm in arms),
        report.text(count),
        report.section("Figures", report.table(columns, rows), report.text(_ABOUT)),
        report.section("Pictures", pictures_table(arms, captions)),
    )
    files.check_writable_folder(folder)
    sheet = files.publish_bytes(folder / SHEET, sheet_of(arms, captions))
    return [*text_table(columns, rows), str(sheet), str(results.publish(folder, "compare", result, page))]


def _text(mean: Mean | None) -> str | None:
    return None if mean is None else str(mean)

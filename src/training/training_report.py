"""``report.html`` of a training: settings, curves, sample pictures step by step, scores, photos, and how to read them.

Made of what is on the disk, the log and the sample pictures, so it can be made again after any interruption.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from src import report
from src.dataset import Example, load_picture
from src.errors import UserError
from src.files import publish_bytes
from src.images import read_image
from src.train_config import LoopConfig, TrainRun
from src.training.history import History
from src.training.samples import saved_samples
from src.training.scores import Best, balance, scores_of

NAME = "report.html"
MAX_PHOTOS = 24
MAX_COLUMNS = 13  # of the sample grid: the base model and twelve steps, evenly chosen
_PHOTO_PX, _SAMPLE_PX = 160, 256
_HALF_LIVES = 30  # in a smoothed curve: a thirtieth of the run is forgotten by half

_ON_CURVES = """\
The loss of training says little by itself: each step draws other noise levels, whose losses differ a hundredfold, so it \
jumps, and its level hardly falls while the pictures change. A loss that climbs, or is no number, does mean something: the \
learning rate is too high.
The validation loss is measured on pictures that are not learnt, always at the same noise levels with the same noise. It \
falls while it learns what the pictures have in common, and rises when it learns them by heart. Near its minimum \
the likeness is usually best; later checkpoints are often usable, but vary less. \
Where the curve and the pictures disagree, believe the pictures."""
_ON_SAMPLES = """\
Each row is one prompt, always with the same seed, drawn by what was learnt up to that step; step 0 is the model as it \
was before. Look for the step at which the subject is right and the rest of the prompt is still there. When backgrounds of the \
photos appear in every picture, or colours harden, it has trained too long."""
_ON_SCORES = """\
CLIP-I: mean cosine of CLIP features between the pictures and the photos, fidelity to the subject. CLIP-T: between each \
picture and its prompt without the made-up word, faithfulness to the prompt. Balance: their geometric mean relative to the \
model before. CLIP also takes a copied background for likeness, and a few pictures are a small sample: \
differences of a hundredth mean nothing."""


def write(
    folder: Path,
    run: TrainRun,
    history: History,
    *,
    photos: Sequence[Example],
    facts: Mapping[str, Any],
    seconds: Mapping[str, float],
    best: Best | None,
) -> Path:
    """Write ``FOLDER/report.html`` and return its path. Raises UserError when the disk says no.

    ``facts`` go to the head of the page; ``seconds`` say where the time went; a photo that is gone is left out.
    """
    name = run.train.name or facts.get("trigger") or folder.resolve().name
    head = {**facts, "best checkpoint": f"step {best.step:,}: {best.reason}" if best else None}
    parts = [
        report.facts({key: value for key, value in head.items() if value is not None}),
        _curves(history, best),
        _samples(folder, history, best),
        _scores(history, best),
        _time(seconds),
        _photos(photos),
        _settings(run),
        _events(history),
    ]
    page = report.page(f"Training of {name}", *[part for part in parts if part])
    return publish_bytes(folder / NAME, page)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of a curve's points around each, whose weights fall by half within a thirtieth of the points, to both sides.

    A moving average of the past alone would lie above a falling curve. Near the ends there is less on one side.
    """
    decay = 0.5 ** (_HALF_LIVES / max(len(points), _HALF_LIVES))
    past, future = _decaying(points, decay), _decaying(points[::-1], decay)[::-1]
    return [
        (x, (before + after - y) / (weight + rest - 1))  # a point itself is in both sums
        for (x, y), (before, weight), (after, rest) in zip(points, past, future)
    ]


def _decaying(points: Sequence[tuple[float, float]], decay: float) -> list[tuple[float, float]]:
    """Of each point the sum of all up to it, older ones with less weight, and the sum of these weights."""
    total = weight = 0.0
    found = []
    for _, y in points:
        total, weight = decay * total + y, decay * weight + 1
        found.append((total, weight))
    return found


def _curves(history: History, best: Best | None) -> str:
    marks = {"best": best.step} if best else {}
    loss = history.curve("train", "loss")
    validation = history.curve("validation", "loss")
    series = {"raw": loss, "smoothed": smoothed(loss)}
    charts = [report.curves("Training loss", series, "step", "loss", points=("raw",), marks=marks)]
    if validation:
        charts.append(report.curves("Validation loss", {"validation": validation}, "step", "loss", marks=marks))
    charts.append(report.curves("Learning rate", {"learning rate": history.curve("train", "lr")}, "step", "learning rate"))
    norms = history.curve("train", "grad_norm")
    if norms:
        series = {"raw": norms, "smoothed": smoothed(norms)}
        charts.append(report.curves("Gradient norm before clipping", series, "step", "norm", points=("raw",), log_y=True))
    without = "" if validation else "\nNo pictures were held out (--validation_every), so there is no validation curve."
    return report.section("Curves", report.gallery(charts), report.text(_ON_CURVES + without))


def _samples(folder: Path, history: History, best: Best | None) -> str | None:
    """A table with a row for each prompt and a column for each step."""
    noted = {record.step: record.values for record in history.read("samples")}
    saved = {step: files for step, files in saved_samples(folder).items() if step in noted}
    saved = {step: files for step, files in saved.items() if _are_alike(noted[step], noted[max(saved)])}
    if not saved:
        return None
    steps = _spread(list(saved), MAX_COLUMNS, always=best.step if best else None)
    prompts = noted[max(saved)].get("prompts", [])
    rows = [[prompt, *[_sample(saved[step].get(index)) for step in steps]] for index, prompt in enumerate(prompts)]
    names = ["base model" if step == 0 else f"step {step:,}" for step in steps]
    names = [f"{name}, best" if best and step == best.step else name for name, step in zip(names, steps)]
    left_out = (
        "" if len(steps) == len(saved) else f"\n{len(steps)} of {len(saved)} steps are shown; all are in {folder.name}/samples."
    )
    return report.section("Samples", report.table(["prompt", *names], rows), report.text(_ON_SAMPLES + left_out))


def _are_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether samples were drawn of the same prompts in the same way, as far as both say."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def _sample(path: Path | None) -> str:
    try:
        return "–" if path is None else _figure(path, path.stat().st_mtime_ns)
    except (OSError, UserError):
        return "damaged"


# The report is made anew at each checkpoint; pictures are most of its work.
@functools.lru_cache(maxsize=512)
def _figure(path: Path, changed_ns: int) -> str:
    return report.picture(read_image(path), max_px=_SAMPLE_PX)


@functools.lru_cache(maxsize=MAX_PHOTOS)
def _photo(example: Example) -> str | None:
    """A photo as it is learnt, cut to its size, with its first caption; None where it is gone."""
    try:
        return report.picture(load_picture(example), example.captions[0] if example.captions else "", _PHOTO_PX)
    except UserError:
        return None


def _scores(history: History, best: Best | None) -> str | None:
    scores = scores_of(history)
    losses = dict(history.curve("validation", "loss"))
    steps = sorted({*scores, *losses})
    if not steps:
        return None
    base = scores.get(0)
    rows = []
    for step in steps:
        score = scores.get(step)
        measured = (score.clip_i, score.clip_t, balance(score, base)) if score else (None, None, None)
        name = "base model" if step == 0 else f"{step:,}"
        rows.append([f"{name}, best" if best and step == best.step else name, losses.get(step), *measured])
    marked = [index for index, step in enumerate(steps) if best and step == best.step]
    columns = ["step", "validation loss", "CLIP-I", "CLIP-T", "balance"]
    if not scores:
        columns, rows = columns[:2], [row[:2] for row in rows]
    return report.section("Scores", report.table(columns, rows, marked=marked), report.text(_ON_SCORES) if scores else "")


def _time(seconds: Mapping[str, float]) -> str | None:
    if not seconds:
        return None
    total = sum(seconds.values())
    shown = {f"{name} ({value / total:.0%})": value for name, value in seconds.items() if value >= 0.001 * total}
    return report.section("Where the time went", report.bars(f"{_duration(total)} in all", shown, "seconds"))


def _photos(photos: Sequence[Example]) -> str | None:
    figures = [figure for example in _spread(photos, MAX_PHOTOS) if (figure := _photo(example)) is not None]
    heading = "Pictures" if len(figures) == len(photos) else f"Pictures ({len(figures)} of {len(photos)})"
    return report.section(heading, report.gallery(figures)) if figures else None


def _settings(run: TrainRun) -> str:
    """All settings of the training, those of its kind first; those that were chosen are marked."""
    usual = asdict(type(run.train)())
    shared = {item.name for item in fields(LoopConfig)}
    rows = sorted(asdict(run.train).items(), key=lambda row: row[0] in shared)
    chosen = [index for index, (name, value) in enumerate(rows) if value != usual[name]]
    about = report.text("Marked: not the default. The settings are also in config.yaml of each checkpoint.")
    return report.section(
        "Settings", report.table(["setting", "value"], [[name, _plain(value)] for name, value in rows], marked=chosen), about
    )


def _events(history: History) -> str | None:
    rows = [[record.step, str(record.values.get("text", ""))] for record in history.read("event")]
    return report.section("Events", report.table(["step", "what happened"], rows[-100:])) if rows else None


def _plain(value: Any) -> str | None:
    """A setting as it would be typed: to the left and without thousands' commas."""
    if value is None or value == () or value == "":
        return None
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _spread(items: Sequence[Any], most: int, always: Any = None) -> list[Any]:
    """At most ``most`` items, evenly chosen, the first and the last among them, and ``always`` if it is one of them."""
    if len(items) <= most:
        return list(items)
    chosen = {round(index * (len(items) - 1) / (most - 1)) for index in range(most)}
    if always in items and (wanted := items.index(always)) not in chosen:
        nearest = min(chosen - {0, len(items) - 1}, key=lambda index: abs(index - wanted))
        chosen = chosen - {nearest} | {wanted}
    return [items[index] for index in sorted(chosen)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""``report.html`` of a phase: its curves, what it drew on the way, its figures and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from src import report
from src.errors import UserError
from src.files import publish_bytes
from src.images import read_image
from src.training.history import History
from src.training.training_report import smoothed

NAME = "report.html"
SHOWN = 6  # of the sample pictures, evenly over the steps
_NOT_CURVES = ("lr", "seconds")
NOTES = {
    "vae": "Above: pictures that it never saw; below: what came back through the latents. PSNR counts on those; 'accepted' is "
    "the share of them that the checker of `evaluate adherence` still finds right, which a U-Net cannot surpass. The "
    "Kullback-Leibler term is small on purpose: enough to keep the latents together, not so much that detail is lost.",
    "clip": "top1: how many captions find their own picture first among 128 that were never seen. Captions that are the same "
    "word for word cannot all: 'possible' is the most that is. The scale is the learned temperature's inverse. Each row of "
    "samples begins with a caption and its own picture; then come those that the towers find, with cosine and own caption.",
    "unet": "The loss of a step jumps: each draws other noise levels. The held-out loss is measured on other pictures, with "
    "the same noise each time. The pictures are drawn from held-out captions, always from the same noise.",
}


def write(name: str, folder: Path, settings: Any, history: History, figures: Mapping[str, float]) -> Path:
    """Write ``FOLDER/report.html`` and return its path. Raises UserError when the disk says no."""
    records = history.read("train")
    noted = [key for key in (records[-1].values if records else {}) if key not in _NOT_CURVES]
    charts = []
    for key in noted:
        curve = history.curve("train", key)
        series = {"raw": curve, "smoothed": smoothed(curve)}
        charts.append(report.curves(key, series, "step", key, points=("raw",), log_y=all(y > 0 for _, y in curve)))
    judged = history.read("validation")
    for key in (key for key in (judged[-1].values if judged else {}) if key not in _NOT_CURVES):
        charts.append(report.curves(key, {key: history.curve("validation", key)}, "step", key))
    minutes = records[-1].values["seconds"] / 60 if records else 0.0
    parts = [
        report.facts({"step": records[-1].step if records else 0, "minutes of learning": round(minutes, 1), **figures}),
        report.section("Curves", report.gallery(charts), report.text(NOTES.get(name, ""))),
        report.section("Samples", report.gallery(_samples(folder / "samples"))),
        report.section("Settings", report.facts({key: str(value) for key, value in asdict(settings).items()})),
    ]
    return publish_bytes(folder / NAME, report.page(f"From nothing: {name}", *parts))


def write_scenes(folder: Path, settings: Any, figures: Mapping[str, Any], samples: Image.Image) -> Path:
    """The same of the scenes, which learn nothing: what was drawn. Raises UserError when the disk says no."""
    parts = [
        report.facts(figures),
        report.section("Samples", report.gallery([report.picture(samples, "held-out scenes", max_px=1600)])),
        report.section("Settings", report.facts({key: str(value) for key, value in asdict(settings).items()})),
    ]
    return publish_bytes(folder / NAME, report.page("From nothing: scenes", *parts))


def _samples(folder: Path) -> list[str]:
    """The first, the last and some between."""
    paths = sorted(path for path in folder.glob("step-*.png") if path.stem[5:].isdecimal()) if folder.is_dir() else []
    chosen = sorted({round(i * (len(paths) - 1) / max(1, SHOWN - 1)) for i in range(SHOWN)}) if paths else []
    figures = []
    for index in chosen:
        try:
            figures.append(report.picture(read_image(paths[index]), f"step {int(paths[index].stem[5:]):,}", max_px=1056))
        except (UserError, OSError):
            continue
    return figures

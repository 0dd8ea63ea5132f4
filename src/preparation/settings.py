"""The settings of a preparation, their defaults and what they may be. Imports nothing that takes time: ``--help`` needs it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from src.errors import usage_error
from src.terminal import shell_word

CROPS = ("center", "smart")
CAPTIONERS = ("blip",)
DEFAULT_TEMPLATE = "a photo of {trigger}"
BUCKET_STEP_PX = 64  # what every trainer's buckets are multiples of


@dataclass(slots=True)
class PrepareConfig:
    """What ``python -m src.prepare_dataset`` is told."""

    src: str | None = None
    dst: str | None = None

    # pictures
    size: int = 512  # pixels: the sides of a square, or with buckets the root of the area
    crop: str = "center"  # center | smart (around detail, saturated colours and skin)
    buckets: bool = False  # keep the aspect ratio roughly: sides are multiples of 64, the area is at most size x size
    background: str = "white"  # what is laid behind transparency: a CSS colour name or #rrggbb
    allow_upscale: bool = False

    # what is left out
    blur_threshold: float = 40.0  # see src/preparation/examining.py
    keep_blurred: bool = False
    duplicate_distance: int = 4  # differing bits of 64
    keep_duplicates: bool = False
    keep_uncaptioned: bool = False

    # captions
    trigger: str | None = None
    caption_template: str = DEFAULT_TEMPLATE  # for pictures without a caption; with {caption}: for all
    caption_prefix: tuple[str, ...] = ()
    caption_suffix: tuple[str, ...] = ()
    caption: str | None = None  # blip: describe pictures that have no caption
    captioner: str | None = None  # model folder or hub id; None: the base model of caption

    # the run
    workers: int | None = None  # processes; None: one a core, at most four
    overwrite: bool = False  # also what was changed in dst by hand
    dry_run: bool = False

    def pixel_settings(self) -> dict[str, Any]:
        """What decides over the pixels: a picture that was made with the same need not be made again."""
        names = ("size", "crop", "buckets", "background", "allow_upscale")
        return {name: getattr(self, name) for name in names}

    def recorded(self) -> dict[str, Any]:
        """What dataset.json keeps: all that decides over the result."""
        of_the_run = ("src", "dst", "workers", "overwrite", "dry_run")
        return {name: value for name, value in asdict(self).items() if name not in of_the_run}

    def next_command(self) -> str:
        """What to type to train on the result."""
        square = "" if self.buckets or self.size % BUCKET_STEP_PX == 0 else " --no-buckets"
        return f"python -m src.train_lora --dataset_dir {shell_word(str(self.dst))} --resolution {self.size}{square}"


@dataclass(slots=True)
class PrepareRun:
    """The one section of settings, named as the sections of other commands are."""

    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return asdict(self)


def check(config: PrepareConfig) -> None:
    """Refuse values that cannot work. Raises UserError (usage)."""
    for name in ("src", "dst"):
        if not (getattr(config, name) or "").strip():
            what = "the folder with your pictures" if name == "src" else "the folder to make"
            raise usage_error(f"--{name} is missing; name {what}")
    for name, known in {"crop": CROPS, "caption": CAPTIONERS}.items():
        if getattr(config, name) not in (None, *known):
            raise usage_error(f"--{name} {getattr(config, name)}: choose {' or '.join(known)}")
    ranges = {"size": (64, 8192), "blur_threshold": (0, 1e6), "duplicate_distance": (0, 32), "workers": (1, 256)}
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise usage_error(f"--{name.replace('_', '-')} {value:g} is outside {low:g} to {high:g}")
    step = BUCKET_STEP_PX if config.buckets else 8
    if config.size % step:
        low = config.size // step * step
        raise usage_error(f"--size {config.size} is not a multiple of {step}; nearest: {low or step} or {low + step}")
    if config.trigger is not None and not config.trigger.strip():
        raise usage_error('--trigger is empty; give the words that shall mean your subject, e.g. "sks dog"')
    _check_template(config)


def _check_template(config: PrepareConfig) -> None:
    template = config.caption_template
    rest = template.replace("{trigger}", "").replace("{caption}", "")
    if "{" in rest or "}" in rest:
        raise usage_error(f"--caption-template '{template}': it may hold {{trigger}} and {{caption}} and no other braces")
    if "{trigger}" in template and config.trigger is None and template != DEFAULT_TEMPLATE:
        raise usage_error(f"--caption-template '{template}' needs a trigger; give --trigger")
    if not template.strip():
        raise usage_error('--caption-template is empty; write e.g. "a photo of {trigger}"')

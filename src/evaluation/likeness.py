"""How alike pictures are, to a network's eye and to the pixel: pure functions, and the networks they are given.

The cosines with photos and prompts are those by which a training names its best checkpoint (``src/training/scores.py``).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from src.errors import not_found, refused
from src.images import read_image
from src.model_source import is_embedded
from src.request import user_path
from src.terminal import counted
from src.training.scores import KNOWN_CLIPS, Clip, find_clip, has_both_towers

BATCH = 16  # pictures read at once


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over ``count`` values, pictures or prompts, and its standard error: None for a single one."""

    value: float
    error: float | None
    count: int
    unit: str = "pictures"

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """None for no values."""
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    @classmethod
    def over_prompts(cls, values: Sequence[float | None], prompts: Sequence[str]) -> Mean | None:
        """Of pictures and the prompt of each: every prompt's own mean first, since seeds of one prompt are not independent.

        The error is then that of the prompts; where all have one prompt, of its pictures. None is passed over.
        """
        by_prompt: defaultdict[str, list[float]] = defaultdict(list)
        for value, prompt in zip(values, prompts, strict=True):
            if value is not None:
                by_prompt[prompt].append(value)
        if len(by_prompt) < 2:
            return cls.of([value for own in by_prompt.values() for value in own])
        return replace(cls.of([statistics.fmean(own) for own in by_prompt.values()]), unit="prompts")

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")

    def as_json(self) -> dict[str, float | int | str | None]:
        return {"mean": self.value, "standard_error": self.error, "count": self.count, "of": self.unit}


def consistency(features: Tensor) -> float | None:
    """Mean cosine over all pairs of a series: unit vectors (N, D); None for fewer than two.

    The sum of all N x N cosines is the squared length of the sum, N of them are of a picture with itself.
    """
    count = len(features)
    if count < 2:
        return None
    total = features.double().sum(dim=0).square().sum().item()
    return (total - count) / (count * (count - 1))


def pixel_difference(one: Image.Image, other: Image.Image) -> float | None:
    """Mean difference of all levels, 0 to 255; None for pictures of different sizes."""
    if one.size != other.size:
        return None
    first, second = (numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) for picture in (one, other))
    return float(numpy.abs(first - second).mean())


def features_of(paths: Sequence[Path], see: Callable[[Sequence[Image.Image]], Tensor]) -> Tensor:
    """What a network sees in the files of pictures, (N, D); a few are in memory at a time."""
    parts = [see([read_image(path) for path in paths[start : start + BATCH]]) for start in range(0, len(paths), BATCH)]
    return torch.cat(parts)


def clip_folder(named: str | None, models: Sequence[str], cache: Path) -> Path:
    """The CLIP that judges pictures of these models, names or folders: the folder that was named, or the first on this disk.

    Only where all are the embedded model its own CLIP judges: that one knows no photographs. Raises UserError: not found;
    refused for a folder that was named and has not both towers.
    """
    judged = "embedded" if models and all(map(is_embedded, models)) else ""
    folder = find_clip(judged, cache) if named is None else user_path(named)
    if folder is None:
        where = "models/embedded/clip" if judged else f"{cache / 'clip'} (such as {KNOWN_CLIPS[0]})"
        raise not_found(f"no CLIP with an image tower is on this disk; name one with --clip FOLDER, or put one into {where}")
    if not folder.is_dir():
        raise not_found(f"--clip {folder}: no such folder; name one that transformers' CLIPModel loads")
    if not has_both_towers(folder):
        raise refused(f"--clip {folder}: is no CLIPModel with both towers in .safetensors; name such a folder")
    return folder


def say_cut(clip: Clip, texts: Sequence[str], say: Callable[[str], None]) -> None:
    """Say how many prompts CLIP reads by their beginning alone."""
    if cut := sum(map(clip.is_cut, dict.fromkeys(texts))):
        say(f"prompts {counted(cut, 'prompt')} longer than CLIP's window: compared by their beginning")


def open_clip(folder: Path) -> Clip:
    """Load it. Raises UserError (refused)."""
    try:
        return Clip(folder)
    except Exception as error:  # what loaders raise has no class in common
        cause = " ".join(str(error).split())[:120]
        raise refused(f"{folder}: is no CLIP that can be loaded ({cause}); take another") from None

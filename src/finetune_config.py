"""The settings of a fine-tuning of the U-Net itself: which part learns what, from which captions, and where the model goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from src.errors import usage_error
from src.train_config import LoopConfig, TrainRun, check_loop

PARTS = ("all", "cross-attention", "last-blocks", "mid")
CAPTIONS = ("random", "all")
USUAL_VERSIONS = 4
USUAL_WARMUP = 20  # a twentieth of the steps


@dataclass(slots=True)
class FinetuneConfig(LoopConfig):
    """How the weights themselves are trained. ``None`` means: chosen by the model, the machine or the other settings."""

    part: str = "all"  # all | cross-attention (attn2) | last-blocks (the last two on the way up, and the output) | mid

    # data
    captions_file: str | None = None  # a table, image,caption or image_name| comment_number| comment; None: found
    captions: str = "random"  # of several: random (one a visit) | all (a visit for each)
    caption_dropout: float = 0.1
    crop: float = 0.0  # up to this share of each side is cut off, at random places
    colour: float = 0.0  # brightness, contrast and saturation change by up to this share; never the hue, which captions name
    versions: int | None = None  # random cuts and colours of a picture, kept in the cache; None: 4 where there are any
    validation_pictures: int = 64  # at most so many are held out

    # loop
    gradient_accumulation_steps: int = 4
    learning_rate: float | None = None  # None: 1e-5; for prodigy, which finds its own, 1
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int | None = None  # None: a twentieth of the steps
    ema_decay: float | None = 0.999  # what is saved, judged and drawn is the moving average; None: the last step

    # checkpoints
    output_dir: str = "models/finetuned"
    keep: int | None = 2
    score: bool = False


@dataclass(slots=True)
class FinetuneRun(TrainRun):
    """Everything that a fine-tuning needs to know."""

    door: ClassVar[str] = "src.finetune"
    train: FinetuneConfig = field(default_factory=FinetuneConfig)  # type: ignore[assignment]


def check_finetune(run: FinetuneRun) -> None:
    """Refuse what cannot work or would have no effect, before anything is loaded. Raises UserError (usage)."""
    train = run.train
    check_loop(run, {"part": PARTS, "captions": CAPTIONS}, _RANGES)
    if (train.versions or 1) > 1 and not (train.crop or train.colour):
        raise usage_error(
            f"versions {train.versions} has no effect without --crop or --colour; give one of them, or leave it out"
        )
    precisions = {run.model.precision, {"no": "fp32"}.get(train.mixed_precision, train.mixed_precision)} - {"auto"}
    if len(precisions) > 1:
        raise usage_error(
            f"model.precision {run.model.precision} has no effect with mixed_precision {train.mixed_precision}: weights that "
            "learn are float32, the others are in what is computed in; leave it out"
        )


_RANGES: dict[str, tuple[float, float]] = {
    "crop": (0, 0.5),
    "colour": (0, 0.9),
    "versions": (1, 1000),
    "validation_pictures": (1, 1_000_000),
}

"""The settings of a training: which model learns what, from which pictures, how, and where the result goes.

Precedence: default < ``--config`` (YAML) < ``--set`` < flag. A default lives here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from src.config import QUANTIZATIONS, AppConfig, ModelConfig, OptimizationConfig, PathsConfig, check_machine
from src.errors import UserError, usage_error

TARGETS = ("attention", "kohya", "conv")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy")
LR_SCHEDULERS = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
MIXED_PRECISIONS = ("auto", "no", "fp16", "bf16")
FORMATS = ("diffusers", "kohya")
DEFAULT_STEPS = 1000
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
TRACKERS = ("tensorboard", "wandb")
PRIOR_TARGETS = ("model", "noise")


@dataclass(slots=True)
class LoopConfig:
    """What every training has. ``None`` means: chosen by the model, the machine or the other settings.

    A constant (ClassVar) is what only one kind of training has as a setting, and the others never do.
    """

    masked_loss: ClassVar[bool] = False
    class_prompt: ClassVar[str | None] = None
    train_text_encoder: ClassVar[bool] = False
    quantize: ClassVar[str | None] = None
    use_dora: ClassVar[bool] = False
    part: ClassVar[str | None] = None
    captions: ClassVar[str] = "random"
    versions: ClassVar[int | None] = 1

    # data
    dataset_dir: str = "data/train"  # made by prepare_dataset, or any folder of pictures with captions
    resolution: int | None = None  # px, a multiple of 8; None: the model's own size
    buckets: bool = True  # keep aspect ratios, in sizes of about resolution^2; False: crop all to a square
    flip: bool = False  # mirror half of the pictures; not for faces, text, or anything with a left and right
    caption_dropout: float = 0.05  # share of examples that are trained without their caption

    # loss
    snr_gamma: float | None = 5.0  # min-SNR weighting; None: all timesteps alike
    noise_offset: float = 0.0  # lets the model learn very dark and very bright pictures
    zero_terminal_snr: bool = False  # rescale the noise schedule so that its last step is pure noise

    # loop
    max_steps: int | None = None  # optimizer steps; None: num_epochs, or 1000
    num_epochs: int | None = None
    batch_size: int = 1  # pictures per process and micro-step
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None  # None: 1e-4; for prodigy, which finds its own, 1
    optimizer: str = "adamw"  # adamw | adamw8bit | adafactor | prodigy
    weight_decay: float = 1e-2
    lr_scheduler: str = "constant"  # constant | linear | cosine | cosine_with_restarts | polynomial
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    ema_decay: float | None = None  # such as 0.999: save a moving average of what learns
    seed: int = 0

    # memory
    mixed_precision: str = "auto"  # auto | no | fp16 | bf16
    gradient_checkpointing: bool | None = None  # None: where the plan needs it
    max_vram_gb: float | None = None  # plan as if the card had this much, in GiB

    # checkpoints
    output_dir: str = "models/lora"
    name: str | None = None  # of the result; None: the trigger or the output folder
    checkpoint_steps: int = 250
    keep: int | None = None  # newest checkpoints to keep, the best beside them; None: all

    # judging
    validation_every: int | None = None  # hold out every n-th picture; None: 10 if there are 10 or more; 0: none
    validation_steps: int | None = None  # steps between validations; None: checkpoint_steps
    samples: bool = True  # draw pictures at each validation
    sample_prompts: tuple[str, ...] = ()  # prompts, or the name of a text file with one a line; (): one with the trigger
    sample_inference_steps: int = 20
    sample_guidance_scale: float = 7.5
    sample_seed: int = 0
    score: bool = True  # judge each checkpoint's samples by CLIP features, where a CLIP is on disk
    tracker: str | None = None  # tensorboard | wandb


@dataclass(slots=True)
class TrainConfig(LoopConfig):
    """How an adapter is trained."""

    masked_loss: bool = False  # weigh the loss by masks (NAME-masklabel.png beside NAME.png, white counts)
    unmasked_weight: float = 0.1  # weight of the loss where the mask is black
    # prior preservation: keep what the class of the subject looked like before
    class_prompt: str | None = None  # such as "a photo of a dog"; turns prior preservation on
    class_dir: str | None = None  # pictures of the class; missing ones are drawn; None: beside the output
    num_class_images: int = 50
    prior_loss_weight: float = 1.0
    prior_target: str = "model"  # what they teach: model (what it predicted before it learnt) | noise (as all other pictures)

    # what learns
    targets: str = "attention"  # attention | kohya (and feed-forward, projections) | conv (and convolutions)
    rank: int = 4
    alpha: float | None = None  # None: the rank, so that the scale is 1
    dropout: float = 0.0  # of the adapter's input
    use_rslora: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank
    use_dora: bool = False  # learn the length of each weight's rows apart from its direction
    train_text_encoder: bool = False
    text_encoder_learning_rate: float = 1e-5
    text_encoder_2_learning_rate: float | None = None  # None: that of the first
    quantize: str | None = None  # int8 | nf4: the frozen U-Net in fewer bits (bitsandbytes)
    format: str = "diffusers"  # diffusers (and PEFT folders) | kohya (beside those)


@dataclass(slots=True)
class TrainRun:
    """Everything that a training needs to know."""

    door: ClassVar[str] = "src.train_lora"  # the module that such a run is started by

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return asdict(self)

    def app_config(self) -> AppConfig:
        """The generator's configuration of the same model, without a safety checker: nothing is shown to a stranger."""
        limits = OptimizationConfig(disable_safety_checker=True, max_vram_gb=self.train.max_vram_gb)
        return AppConfig(replace(self.model), limits, paths=self.paths)  # a copy: what loading wants is no setting of the run


def learning_rates(train: TrainConfig) -> dict[str, float]:
    """The learning rate of each component at its full height. Prodigy has one for all."""
    if train.optimizer == "prodigy":
        return dict.fromkeys(COMPONENTS, train.learning_rate or 1.0)
    text = train.text_encoder_learning_rate
    rates = (train.learning_rate or 1e-4, text, train.text_encoder_2_learning_rate or text)
    return dict(zip(COMPONENTS, rates))


def check(run: TrainRun) -> None:
    """Refuse values that cannot work or contradict each other, before anything is loaded. Raises UserError (usage)."""
    train = run.train
    check_loop(run, {"targets": TARGETS, "quantize": QUANTIZATIONS, "format": FORMATS, "prior_target": PRIOR_TARGETS}, _RANGES)
    if train.quantize is not None and train.use_dora:
        raise usage_error("--dora needs the model's weights as they are, and --quantize rounds them; leave one out")
    if train.class_prompt is not None and not train.class_prompt.strip():
        raise usage_error('--class_prompt is empty; write what the subject is, e.g. "a photo of a dog"')


def check_loop(run: Any, choices: Mapping[str, Sequence[str]], ranges: Mapping[str, tuple[float, float]]) -> None:
    """The same for the settings of every training; ``choices`` and ``ranges`` (from, to) are those of one kind."""
    train = run.train
    check_machine(run.model)
    for name, known in (_CHOICES | dict(choices)).items():
        value = getattr(train, name)
        if value is not None and value not in known:
            raise usage_error(f"{name} '{value}' is not known; choose {', '.join(known)}")
    for name, (low, high) in (_LOOP_RANGES | dict(ranges)).items():
        value = getattr(train, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            most = f"{high:,.0f}" if high > 1e5 else f"{high:g}"
            raise usage_error(f"{name} {value:g} is outside {low:g} to {most}")
    if train.resolution is not None and train.resolution % 8:
        low = train.resolution // 8 * 8
        raise usage_error(f"resolution {train.resolution} is not a multiple of 8; nearest: {low} or {low + 8}")
    if train.max_steps is not None and train.num_epochs is not None:
        raise usage_error("--max_steps and --num_epochs exclude each other; give one")
    if train.num_epochs is None:
        check_warmup(train, train.max_steps or DEFAULT_STEPS)
    if not train.dataset_dir.strip():
        raise usage_error("--dataset_dir is empty; name the folder that prepare_dataset made")


def other_adapter(name: str) -> UserError:
    """The error of a sample prompt that asks for an adapter beside the one that learns."""
    return usage_error(f"--sample_prompts: <lora:{name}> is not drawn with while another learns; take it out")


def check_warmup(train: LoopConfig, steps: int) -> None:
    """Refuse a warm-up as long as the training of so many steps. Raises UserError (usage)."""
    if train.lr_warmup_steps and train.lr_warmup_steps >= steps:
        raise usage_error(
            f"lr_warmup_steps {train.lr_warmup_steps} is no less than the training's {steps} steps, so the full learning rate "
            "would never be reached; give fewer, or leave it out"
        )


_CHOICES: dict[str, Sequence[str]] = {
    "optimizer": OPTIMIZERS, "lr_scheduler": LR_SCHEDULERS, "mixed_precision": MIXED_PRECISIONS, "tracker": TRACKERS,
}  # fmt: skip
_RANGES: dict[str, tuple[float, float]] = {
    "unmasked_weight": (0, 1),
    "num_class_images": (1, 100_000),
    "prior_loss_weight": (0, 1000),
    "rank": (1, 1024),
    "alpha": (1e-6, 1e6),
    "dropout": (0, 0.99),
    "text_encoder_learning_rate": (1e-12, 10),
    "text_encoder_2_learning_rate": (1e-12, 10),
}
_LOOP_RANGES: dict[str, tuple[float, float]] = {
    "resolution": (64, 8192),
    "caption_dropout": (0, 1),
    "snr_gamma": (1e-3, 1e6),
    "noise_offset": (0, 1),
    "max_steps": (1, 10_000_000),
    "num_epochs": (1, 1_000_000),
    "batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 4096),
    "learning_rate": (1e-12, 10),
    "weight_decay": (0, 10),
    "lr_warmup_steps": (0, 10_000_000),
    "max_grad_norm": (1e-6, 1e6),
    "ema_decay": (0, 0.999999),
    "seed": (0, 2**63 - 1),
    "max_vram_gb": (0.1, 10_000),
    "checkpoint_steps": (1, 10_000_000),
    "keep": (2, 1_000_000),
    "validation_every": (0, 1_000_000),
    "validation_steps": (1, 10_000_000),
    "sample_inference_steps": (1, 1000),
    "sample_guidance_scale": (0, 100),
    "sample_seed": (0, 2**32 - 1),
}

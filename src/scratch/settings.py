"""The settings of the phases. The defaults are the recipe of the model that ships, ``configs/scratch/quick.yaml`` the lesson's.

Precedence: default < ``--config`` (YAML) < ``--set``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from src.config import ModelConfig, check_machine
from src.errors import usage_error
from src.model_files import EMBEDDED
from src.scenes.grammar import GRAMMARS, LATTICE_PX

PHASES = ("scenes", "tokenizer", "vae", "clip", "unet", "assemble")
PRECISIONS = ("auto", "fp32", "bf16")
SWITCHES = ("auto", "on", "off")
# Settings of later versions, and what stood for them before.
ADDED = {
    "grammar": "full", "lattice_px": 0, "transformer_layers": 1, "caption_dropout_clear": 0.1, "told": 8, "hard_scenes": 1.0,
}  # fmt: skip
NOT_LEARNT = ("validation_steps", "checkpoint_steps", "examined")  # settings that change nothing of what is learnt
MAX_SCENES = 400_000  # a manifest lists a thousand files


@dataclass(slots=True)
class ScenesSettings:
    """The pictures that all phases learn from."""

    grammar: str = "full"  # full | v0 | simple: `src.scenes.grammar.belongs`
    lattice_px: int = LATTICE_PX  # that things stand on, upright and in few sizes; 0: anywhere, any size, turned
    count: int = 60_000
    held_out: int = 512  # of those that only judge
    seed: int = 0


@dataclass(slots=True)
class TokenizerSettings:
    """Byte-level BPE: 512 symbols for the bytes, then one token for each frequent word."""

    merges: int = 400
    length: int = 32  # tokens of a caption, begin and end included


@dataclass(slots=True)
class VaeSettings:
    """AutoencoderKL: a picture of 128 x 128 becomes 16 x 16 latents of 12 channels."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    layers: int = 1
    latent_channels: int = 12
    crop_px: int = 64
    l1_weight: float = 0.2  # beside the squared error: sharper edges
    kl_weight: float = 2e-5
    thumbnail_weight: float = 1.0  # of the first three channels, to be a small picture
    steps: int = 5000
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    validation_steps: int = 1000
    checkpoint_steps: int = 500
    seed: int = 1


@dataclass(slots=True)
class ClipSettings:
    """A transformer for captions and one for pictures, brought to the same space."""

    width: int = 192
    layers: int = 4
    heads: int = 6
    patch_px: int = 16
    projection: int = 128
    naming_weight: float = 1.0  # of the second task, to name what a caption says
    steps: int = 900
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    validation_steps: int = 250
    checkpoint_steps: int = 250
    seed: int = 2


@dataclass(slots=True)
class UnetSettings:
    """UNet2DConditionModel: tells noise from picture in latents, told the timestep and the caption."""

    begin_from: str | None = None  # a model's folder, whose U-Net goes on learning; else random weights
    channels: tuple[int, ...] = (64, 128)
    layers: int = 1  # of each level downwards, one more upwards
    attention_levels: int = 1  # the innermost so many attend to pixels and caption
    transformer_layers: int = 1  # of each block that attends; more than begin_from has begin as copies that add nothing
    head_width: int = 32
    caption_dropout: float = 0.1  # what guidance needs: some captions are empty where nearly all is noise ...
    caption_dropout_clear: float = 0.5  # ... and some where the picture is nearly clear
    snr_gamma: float = 5.0
    snr_floor: float = 0.25  # what is added to min(SNR, gamma)
    shapes_weight: float = 0.3  # of the second task, to tell which shape lies where
    hard_scenes: float = 1.0  # so many times as often as they occur, those that are learnt last: `src.scenes.grammar.is_hard`
    examined: int = 500  # prompts that the result is checked on
    steps: int = 19_000
    batch_size: int = 16
    learning_rate: float = 4e-3
    warmup_steps: int = 400
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    validation_steps: int = 2000
    checkpoint_steps: int = 1000
    seed: int = 3


@dataclass(slots=True)
class MachineSettings:
    """What changes how long it takes, not what is learnt."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: str = "auto"  # auto | fp32 | bf16
    compile: str = "auto"  # auto | on | off: torch.compile of the U-Net, a minute and a half, then a quarter more steps in bf16


@dataclass(slots=True)
class ScratchSettings:
    """All phases, and the machine."""

    scenes: ScenesSettings = field(default_factory=ScenesSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    unet: UnetSettings = field(default_factory=UnetSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)


def model_folder(name: str | None) -> Path:
    """What ``--model`` names: a folder, or the model that ships."""
    return EMBEDDED if name in (None, "embedded") else Path(str(name)).expanduser()


def check(settings: ScratchSettings) -> None:
    """Refuse numbers that cannot work, before anything is drawn or loaded. Raises UserError (usage)."""
    for section in fields(settings):
        part = getattr(settings, section.name)
        for item in fields(part):
            value, name = getattr(part, item.name), f"{section.name}.{item.name}"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                low, high = _range(item.name)
                if not (math.isfinite(value) and low <= value <= high):
                    raise usage_error(f"{name} {value:g} is outside {low:g} to {high:g}")
    check_machine(ModelConfig(device=settings.machine.device))
    if settings.machine.precision not in PRECISIONS:
        raise usage_error(f"machine.precision '{settings.machine.precision}' is not known; choose {', '.join(PRECISIONS)}")
    if settings.machine.compile not in SWITCHES:
        raise usage_error(f"machine.compile '{settings.machine.compile}' is not known; choose {', '.join(SWITCHES)}")
    if settings.scenes.grammar not in GRAMMARS:
        raise usage_error(f"scenes.grammar '{settings.scenes.grammar}' is not known; choose {', '.join(GRAMMARS)}")
    if settings.scenes.lattice_px not in (0, LATTICE_PX):
        raise usage_error(f"scenes.lattice_px {settings.scenes.lattice_px} is not known; choose 0 or {LATTICE_PX}")
    for name in ("vae", "clip", "unet"):
        part = getattr(settings, name)
        if part.warmup_steps >= part.steps:
            raise usage_error(
                f"{name}.warmup_steps {part.warmup_steps} of {part.steps} steps would never let the rate fall; add --set "
                f"{name}.warmup_steps={part.steps // 10}"
            )
    scale = 2 ** (len(settings.vae.channels) - 1)
    if settings.vae.crop_px % scale or not scale <= settings.vae.crop_px <= 128:
        raise usage_error(f"vae.crop_px {settings.vae.crop_px} is no multiple of {scale} up to 128")
    if settings.clip.width % settings.clip.heads:
        raise usage_error(f"clip.width {settings.clip.width} is no multiple of clip.heads {settings.clip.heads}")
    if 128 % settings.clip.patch_px:
        raise usage_error(f"clip.patch_px {settings.clip.patch_px} does not divide 128")
    levels = len(settings.unet.channels)
    if settings.unet.attention_levels > levels:
        raise usage_error(f"unet.attention_levels {settings.unet.attention_levels} is more than the {levels} levels")
    for name in ("vae", "unet"):
        channels = getattr(settings, name).channels
        if not channels or any(width < 16 or width % 16 for width in channels):
            raise usage_error(f"{name}.channels {list(channels)}: each is a multiple of 16")
    if any(width % settings.unet.head_width for width in settings.unet.channels):
        raise usage_error(
            f"unet.head_width {settings.unet.head_width} does not divide unet.channels {list(settings.unet.channels)}"
        )
    side = 128 // 2 ** (len(settings.vae.channels) - 1)
    if side % 2 ** (levels - 1):
        raise usage_error(f"unet.channels: {levels} levels do not fit into latents of {side} x {side}")


def _range(name: str) -> tuple[float, float]:
    special: dict[str, tuple[float, float]] = {
        "caption_dropout": (0, 0.9), "caption_dropout_clear": (0, 0.9), "ema_decay": (0, 0.99999),
        "learning_rate": (1e-7, 1), "seed": (0, 2**31),
        "l1_weight": (0, 100), "naming_weight": (0, 100), "thumbnail_weight": (0, 100), "shapes_weight": (0, 100),
        "latent_channels": (3, 64),
        "kl_weight": (0, 10), "weight_decay": (0, 10), "max_grad_norm": (1e-3, 1e6),
        "warmup_steps": (0, 1e6), "snr_gamma": (1e-3, 1e6), "snr_floor": (0, 1e6),
        "merges": (0, 40_000), "length": (8, 77), "held_out": (32, 90_000), "lattice_px": (0, 128),
        "count": (1, MAX_SCENES),
    }  # fmt: skip
    return special.get(name, (1, 10_000_000))

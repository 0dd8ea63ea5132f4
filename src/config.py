"""The program's settings: four small dataclasses, strict YAML, and the order in which they are overridden.

Precedence: default < preset or YAML file < command-line flag. A default lives here and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from src.errors import UserError, not_found, usage_error

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
PRESETS_FOLDER = PROJECT_FOLDER / "configs"

PRECISIONS = ("auto", "fp16", "bf16", "fp32")
DEVICES = ("auto", "cuda", "cuda:N", "mps", "cpu")
MEMORY_MODES = ("auto", "fast", "balanced", "low", "minimal")
QUANTIZATIONS = ("int8", "nf4")


@dataclass(slots=True)
class ModelConfig:
    """Which model to load, and in which form."""

    model_id: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub id, diffusers folder, .safetensors file or "embedded"
    revision: str | None = None  # branch, tag or commit of a hub model
    vae: str | None = None  # another VAE: hub id, folder or .safetensors file
    architecture: str | None = None  # folder with the component configs of a single file that is not a standard model
    device: str = "auto"  # auto | cuda | cuda:N | mps | cpu
    precision: str = "auto"  # auto | fp16 | bf16 | fp32
    offline: bool = False  # never touch the network


@dataclass(slots=True)
class OptimizationConfig:
    """Memory and speed. With no switch set, a plan that fits the card is chosen; a switch is honoured over the plan."""

    memory: str = "auto"  # the fastest that fits, or what lies on the card: fast all, balanced a component, low a block ...
    quantize: str | None = None  # int8 | nf4: the U-Net's matrices in fewer bits (bitsandbytes); the pictures change
    max_vram_gb: float | None = None  # plan for this much of the card, in GiB, and keep to it
    enable_model_cpu_offload: bool = False  # one component on the card at a time
    enable_sequential_cpu_offload: bool = False  # one layer on the card at a time: smallest and slowest
    enable_attention_slicing: bool = False  # only for cards without an efficient attention kernel; slower elsewhere
    enable_vae_slicing: bool = False  # without effect: pictures are encoded and decoded one at a time in any case
    enable_vae_tiling: bool = False  # decode in tiles: for large pictures
    enable_xformers: bool = False  # xformers attention, where it is installed
    enable_torch_compile: bool = False  # minutes to compile, pays for many pictures of one size
    enable_channels_last: bool = False  # memory layout of convolutions
    disable_safety_checker: bool = False  # draw without the safety checker that a model ships


@dataclass(slots=True)
class GenerationConfig:
    """One picture's settings. Sizes are pixels, multiples of 8; None means the model's own size."""

    width: int | None = None
    height: int | None = None
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    scheduler: str = "dpm++_2m_karras"

    seed: int | None = None  # None or -1: random, and printed
    num_images: int = 1
    batch_size: int = 1
    clip_skip: int = 1  # A1111's count: 1 is the last layer, 2 the one before
    prompt_weights: bool = True  # A1111 grammar: (a:1.3), [a], BREAK
    strength: float = 0.6  # image to image: near 0 keeps the picture, 1 hardly anything of it

    # Faster, for a price in likeness to what would have been drawn without.
    deep_cache: int = 1  # one call of the U-Net in so many is whole, the others run its outermost layers
    token_merging: float = 0.0  # share of tokens merged in self-attention at the highest resolution, 0 to 0.75
    guidance_start: float = 0.0  # guidance from here ...
    guidance_end: float = 1.0  # ... to there, shares of the noise schedule; outside, half the U-Net's work


@dataclass(slots=True)
class PathsConfig:
    """Where things lie, relative to the folder the program is run in."""

    cache: str = "models/cache"
    lora: str = "models/lora"
    wildcards: str = "wildcards"
    outputs: str = "outputs"
    prefix: str = "gen"  # pictures are named PREFIX_YYYYMMDD_HHMMSS_NNN.png

    def folder(self, name: str) -> Path:
        """The folder called "cache", "lora", "wildcards" or "outputs", with ~ filled in."""
        return Path(os.path.expanduser(getattr(self, name)))


@dataclass(slots=True)
class AppConfig:
    """Everything that the generator needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return asdict(self)


# Names that people type for a setting -> the field that holds it.
SETTING_ALIASES = {
    "generation.steps": "generation.num_inference_steps",
    "generation.cfg": "generation.guidance_scale",
    "generation.cfg_scale": "generation.guidance_scale",
    "generation.guidance": "generation.guidance_scale",
    "generation.sampler": "generation.scheduler",
    "generation.num": "generation.num_images",
    "model.id": "model.model_id",
    "train.lr": "train.learning_rate",
    "train.text_encoder_lr": "train.text_encoder_learning_rate",
    "train.steps": "train.max_steps",
    "train.epochs": "train.num_epochs",
    "train.gradient_accumulation": "train.gradient_accumulation_steps",
}


def preset_names() -> list[str]:
    """The presets in ``configs/``, by name: base models and card sizes."""
    return sorted(path.stem for path in PRESETS_FOLDER.glob("*.yaml"))


def model_of_preset(name: str) -> str | None:
    """The model that a preset is about; None for a card size, even one that proposes a model."""
    settings = read_settings(PRESETS_FOLDER / f"{name}.yaml")
    return None if "optimization.max_vram_gb" in settings else settings.get("model.model_id")


def load_config(*sources: str | Path) -> AppConfig:
    """Build a configuration from presets (by name, e.g. ``"sdxl"``) and YAML files, the later over the earlier.

    Raises UserError (usage) for an unknown or ill-typed setting, UserError (not found) for a missing file.
    """
    config = AppConfig()
    set_from(config, *sources)
    return config


def set_from(config: Any, *sources: str | Path) -> None:
    """Put presets and YAML files over a configuration, the later over the earlier. Raises as ``load_config`` does."""
    for source in sources:
        for name, value in read_settings(source).items():
            try:
                set_value(config, name, value)
            except UserError as error:
                raise UserError(f"{Path(source).name}: {error}", error.exit_code) from None


def set_value(config: Any, name: str, value: Any) -> None:
    """Set ``"generation.width"`` and the like, converted to the field's type. Text such as ``"30"`` is read as YAML.

    ``config`` is a dataclass of sections, which are dataclasses: AppConfig or the like.
    """
    name = full_name(name)
    section_name, _, key = name.partition(".")
    section = getattr(config, section_name, None) if section_name in {item.name for item in fields(config)} else None
    known = {item.name for item in fields(section)} if section is not None else set()
    if key not in known:
        raise usage_error(f"unknown setting '{name}'{_did_you_mean(config, name)}")
    kind = typing.get_type_hints(type(section))[key]
    setattr(section, key, _convert(value, kind, name))


def full_name(name: str) -> str:
    """The setting that a name means: ``"generation.steps"`` is ``"generation.num_inference_steps"``."""
    return SETTING_ALIASES.get(name.strip(), name.strip())


def check_types(config: Any) -> None:
    """Bring every setting to its type, paths to text, or refuse it: in Python the fields can be set to anything."""
    for name in setting_names(config):
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section), key)
        set_value(config, name, os.fspath(value) if isinstance(value, os.PathLike) else value)


def check_machine(model: ModelConfig) -> None:
    """Refuse names of devices and precisions that exist on no machine, before torch is asked. Raises UserError (usage)."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", model.device):
        raise usage_error(f"device '{model.device}' is not known; choose auto, cuda, cuda:N, mps or cpu")
    if model.precision not in PRECISIONS:
        raise usage_error(f"precision '{model.precision}' is not known; choose {', '.join(PRECISIONS)}")


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``"generation.steps=30"`` as typed after ``--set``."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise usage_error(f"--set {text}: write it as section.name=value, e.g. --set generation.steps=30")
    return name.strip(), value.strip()


def setting_names(config: Any = None) -> list[str]:
    """Every setting as ``section.name``; of AppConfig unless another configuration is given."""
    config = config or AppConfig()
    return [f"{part.name}.{item.name}" for part in fields(config) for item in fields(getattr(config, part.name))]


def _did_you_mean(config: Any, name: str) -> str:
    known = setting_names(config)
    aliases = [alias for alias, meant in SETTING_ALIASES.items() if meant in known]
    close = difflib.get_close_matches(name, [*known, *aliases], n=1, cutoff=0.6)
    same_key = [item for item in known if item.partition(".")[2] == name.rpartition(".")[2]]
    if close or same_key:
        return f"; did you mean '{(same_key or close)[0]}'?"
    return "; the sections are " + ", ".join(item.name for item in fields(config))


def _find_source(source: str | Path) -> Path:
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return path
    preset = PRESETS_FOLDER / f"{source}.yaml"
    if str(source) in preset_names() or (re.fullmatch(r"(train|scratch)/[\w-]+", str(source)) and preset.is_file()):
        return preset
    names = [*preset_names(), *(f"train/{path.stem}" for path in sorted(PRESETS_FOLDER.glob("train/*.yaml")))]
    close = difflib.get_close_matches(str(source), names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; presets: {', '.join(names)}"
    raise not_found(f"configuration '{source}' is neither a file nor a preset{hint}")


def read_settings(source: str | Path) -> dict[str, Any]:
    """What a preset or YAML file sets, ``{section: {key: value}}`` flattened to ``{"section.key": value}``; unchecked.

    Raises UserError: not found, or usage for a file without sections.
    """
    from src.strict_yaml import read_yaml  # here, because --help must not pay for PyYAML

    path = _find_source(source)
    sections = read_yaml(path)
    if not isinstance(sections, dict):
        raise usage_error(f"{path}: expected sections such as 'model:' and 'generation:', found {type(sections).__name__}")
    settings: dict[str, Any] = {}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise usage_error(f"{path}: section '{section}' must hold settings, found {values!r}")
        settings |= {full_name(f"{section}.{key}"): value for key, value in values.items()}
    return settings


def _convert(value: Any, kind: Any, name: str) -> Any:
    """Return ``value`` as ``kind`` (a plain type or ``type | None``), or refuse: nothing is bent silently."""
    if kind == tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise usage_error(f"{name}: expected text or a list of texts, got {value!r}")
        return tuple(items)
    if kind == tuple[int, ...]:
        items = value.strip("[]() ").split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise usage_error(f"{name}: expected a list of whole numbers, got {value!r}")
        items = [_convert(item.strip() if isinstance(item, str) else item, int, name) for item in items]
        return tuple(items)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    target = next(option for option in options if option is not types.NoneType)
    if isinstance(value, str) and target is not str:
        from src.strict_yaml import parse_scalar

        value = parse_scalar(value)
    if isinstance(value, str) and types.NoneType in options and value.lower() in {"none", "null", "~", ""}:
        value = None
    if value is None and types.NoneType in options:
        return None
    if target in (int, float) and isinstance(value, int) and abs(value) > sys.float_info.max:  # no range could be compared
        raise usage_error(f"{name}: the number has hundreds of digits; give a smaller one")
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if target is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type(value) is not target:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[target]
        raise usage_error(f"{name}: expected {wanted}, got {value!r}")
    return value

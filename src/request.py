"""One request for pictures: what the command line, a job line and ``TextToImageGenerator.generate`` all build and check."""

from __future__ import annotations

import difflib
import math
import operator
import os
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import GenerationConfig
from src.errors import not_found, usage_error
from src.schedulers import find_sampler

if TYPE_CHECKING:
    from PIL import Image

SIZE_STEP_PX = 8
MIN_SIZE_PX = 64
MAX_SIZE_PX = 8192
MAX_SEED = 2**32 - 1  # the range that every program of the field can store
RANDOM_SEED = -1  # A1111's spelling of "any"; None to us
_WHOLE = {  # setting -> what people call it, its least and its greatest value
    "num_inference_steps": ("steps", 1, 1000),
    "num_images": ("number of pictures", 1, 100_000),
    "batch_size": ("batch size", 1, 256),
    "clip_skip": ("clip skip", 1, 32),
    "deep_cache": ("deep cache", 1, 50),
}
MAX_TOKEN_MERGING = 0.75  # three tokens of each 2x2 cell


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """An adapter to load: a file or folder, and its weight."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Take a path as text, too; raise UserError (usage) for a weight that is no finite number."""
        _of_type("LoRA path", self.path, (str, os.PathLike), "a path")
        object.__setattr__(self, "path", user_path(self.path))
        object.__setattr__(self, "weight", _number("LoRA weight", self.weight))

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Read ``PATH`` or ``PATH:WEIGHT`` as typed after ``--lora``; a drive letter is no weight."""
        if not text.strip():
            raise usage_error("--lora is empty; give an adapter, e.g. --lora models/lora/final.safetensors:0.8")
        path, colon, weight = text.rpartition(":")
        if colon and path:
            try:
                return cls(Path(path), float(weight))
            except ValueError:
                if os.path.exists(user_path(path)) and not os.path.exists(user_path(text)):  # too long a name is no error
                    raise usage_error(f"--lora {text}: the weight '{weight}' is no number; write {path}:0.8") from None
        return cls(Path(text))

    @staticmethod
    def all_named(folder: Path, name: str) -> list[Path]:
        """Every file or folder of that name in ``folder``, at any depth, in the order of their paths."""
        return sorted(path for path in folder.rglob("*") if path.name in (name, f"{name}.safetensors"))

    @classmethod
    def named(cls, folder: Path, name: str, weight: float = 1.0) -> LoraChoice:
        """The adapter that a prompt calls ``<lora:name:weight>``: a file or folder of that name in ``folder``, at any depth."""
        found = cls.all_named(folder, name)
        if found:
            return cls(found[0], weight)
        names = {path.stem if path.is_file() else path.name for path in folder.rglob("*")}
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "put the file there, or name it with --lora PATH"
        raise not_found(f"<lora:{name}> is not in {folder}; {hint}")


@dataclass(slots=True)
class PictureRequest(GenerationConfig):
    """``GenerationConfig`` with a prompt, and what else one job may ask for. Pictures are paths or PIL images."""

    prompt: str = ""
    loras: tuple[LoraChoice, ...] = ()
    init_image: Path | Image.Image | None = None
    mask_image: Path | Image.Image | None = None
    wildcards: bool = True  # fill in {a|b} and __name__; a prompt out of a recipe has been filled in

    @classmethod
    def from_config(cls, generation: GenerationConfig, prompt: str, **overrides: Any) -> PictureRequest:
        """The configured settings, overridden by those that are given and not None; checked."""
        settings = {item.name: getattr(generation, item.name) for item in fields(GenerationConfig)}
        settings |= {name: value for name, value in overrides.items() if value is not None}
        request = cls(prompt=prompt, **settings)
        request.check()
        return request

    @property
    def mode(self) -> str:
        """txt2img, img2img or inpaint."""
        if self.mask_image is not None:
            return "inpaint"
        return "img2img" if self.init_image is not None else "txt2img"

    def seed_of(self, index: int) -> int:
        """The seed of the index-th picture: seed + index, within 32 bits."""
        if self.seed is None:
            raise ValueError("the request's seed is not drawn yet")
        return (self.seed + index) % (MAX_SEED + 1)

    @property
    def idle_settings(self) -> list[str]:
        """A line for each setting that was chosen and has nothing to act on, whatever the model."""
        lines = []
        if self.guidance_scale <= 1:
            why = f"guidance {self.guidance_scale:g} draws without guidance"
            lines += [f"{name} does nothing: {why}" for name in self.needing_guidance]
        if self.deep_cache > 1 and self.num_inference_steps == 1:
            lines.append("deep cache does nothing: there is one step, and the first is always whole")
        return lines

    @property
    def needing_guidance(self) -> list[str]:
        """What was chosen that acts by guidance alone, in words."""
        chosen = {
            "the negative prompt": self.negative_prompt.strip(),
            "the guidance interval": self.guidance_start > 0 or self.guidance_end < 1,
        }
        return [name for name, is_chosen in chosen.items() if is_chosen]

    def check(self) -> None:
        """Bring every setting to its type; raise UserError (usage) for what cannot be drawn, before anything is loaded.

        Other whole numbers than ``int`` (numpy's) and paths as text are taken; a seed of -1 becomes None.
        """
        self._settle_types()
        if not self.prompt.strip() and self.init_image is None and not self.loras:
            raise usage_error('the prompt is empty; say what to draw, e.g. python main.py "a red circle"')
        for name in ("width", "height"):
            _check_size(name, getattr(self, name))
        for name, (label, low, high) in _WHOLE.items():
            _check_whole(label, getattr(self, name), low, high)
        self.seed = None if self.seed == RANDOM_SEED else self.seed
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, MAX_SEED)
        if not 0 <= self.guidance_scale <= 100:
            raise usage_error(
                f"guidance scale {self.guidance_scale:g} is outside 0 to 100; 5 to 9 is usual, 1 is without guidance"
            )
        if not 0 <= self.token_merging <= MAX_TOKEN_MERGING:
            raise usage_error(
                f"token merging {self.token_merging:g} is outside 0 to {MAX_TOKEN_MERGING}; use 0.5, or 0 for none"
            )
        if not 0 <= self.guidance_start < self.guidance_end <= 1:
            interval = f"{self.guidance_start:g}:{self.guidance_end:g}"
            raise usage_error(f"guidance interval {interval} is no part of 0:1; 0.2:0.8 is usual, --cfg 1 is without guidance")
        self._check_sampler()
        self._check_pictures()

    def _settle_types(self) -> None:
        for name in ("prompt", "negative_prompt", "scheduler"):
            _of_type(name.replace("_", " "), getattr(self, name), str, "text")
        for name in ("prompt_weights", "wildcards"):
            _of_type(name.replace("_", " "), getattr(self, name), bool, "true or false")
        for name, (label, _, _) in _WHOLE.items():
            setattr(self, name, _whole(label, getattr(self, name)))
        for name in ("width", "height", "seed"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else _whole(name, value))
        for name in ("guidance_scale", "strength", "token_merging", "guidance_start", "guidance_end"):
            setattr(self, name, _number(name.replace("_", " "), getattr(self, name)))
        self.loras = tuple(_of_type("loras", self.loras, (tuple, list), "a sequence of LoraChoice"))
        for choice in self.loras:
            _of_type("loras", choice, LoraChoice, "LoraChoice(path, weight)")
        for name in ("init_image", "mask_image"):
            setattr(self, name, _picture(name.replace("_", " "), getattr(self, name)))

    def _check_sampler(self) -> None:
        sampler = find_sampler(self.scheduler).sampler
        if sampler.max_steps is not None and self.num_inference_steps > sampler.max_steps:
            raise usage_error(
                f"{self.num_inference_steps} steps: {sampler.label} takes {sampler.max_steps} at most, 4 to 8 are usual; "
                "use --steps 8, or another sampler"
            )

    def _check_pictures(self) -> None:
        if self.mask_image is not None and self.init_image is None:
            raise usage_error("--mask says what to repaint of a picture; give the picture with --init-image FILE")
        if self.init_image is None:
            return
        if not 0 < self.strength <= 1:
            raise usage_error(f"strength {self.strength:g} is outside 0 to 1; 0.6 keeps the layout, 1 hardly anything")
        if int(self.num_inference_steps * self.strength) < 1:
            needed = math.ceil(1 / self.strength)
            raise usage_error(
                f"{self.num_inference_steps} steps at strength {self.strength:g} is no step at all; use --steps {needed}"
            )


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a person types it: ~ is the home folder."""
    return Path(os.path.expanduser(text))


def _check_size(name: str, size_px: int | None) -> None:
    if size_px is None:
        return
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise usage_error(f"{name} {size_px} is outside {MIN_SIZE_PX} to {MAX_SIZE_PX} pixels; use one in between, e.g. 512")
    if size_px % SIZE_STEP_PX:
        below = size_px // SIZE_STEP_PX * SIZE_STEP_PX
        raise usage_error(f"{name} {size_px} is not a multiple of {SIZE_STEP_PX}; nearest: {below} or {below + SIZE_STEP_PX}")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise usage_error(f"{name} {value} is out of range; use {low} to {high:,}")


def _of_type(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
    if not isinstance(value, kind):
        raise usage_error(f"{name}: expected {wanted}, got {_shown(value)}")
    return value


def _whole(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise usage_error(f"{name}: expected a whole number, got {_shown(value)}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise usage_error(f"{name}: expected a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise usage_error(f"{name}: {_shown(value)} is not a number that can be used; use one such as 0.8")
    return number


def _picture(name: str, value: Any) -> Path | Image.Image | None:
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)):
        return user_path(value)
    from PIL import Image  # here, because reading the command line must not pay for it

    return _of_type(name, value, Image.Image, "a path or a PIL image")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, list, tuple, type(None))) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."

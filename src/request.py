"""One request for pictures: what the command line, a job line and ``TextToImageGenerator.generate`` all build and check."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
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


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """An adapter to load: a file or folder, and its weight."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Read ``PATH`` or ``PATH:WEIGHT`` as typed after ``--lora``; a drive letter is no weight."""
        path, colon, weight = text.rpartition(":")
        if colon and path:
            try:
                return cls(Path(path).expanduser(), _finite(float(weight), "--lora weight"))
            except ValueError:
                pass
        return cls(Path(text).expanduser())

    @classmethod
    def named(cls, folder: Path, name: str, weight: float = 1.0) -> LoraChoice:
        """The adapter that a prompt calls ``<lora:name:weight>``: a file or folder of that name in ``folder``, at any depth."""
        found = sorted(path for path in folder.rglob("*") if path.name in (name, f"{name}.safetensors"))
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

    def check(self) -> None:
        """Raise UserError (usage) for what cannot be drawn: refused here, before anything is loaded."""
        if not self.prompt.strip() and self.init_image is None:
            raise usage_error('the prompt is empty; say what to draw, e.g. python main.py "a red circle"')
        for name in ("width", "height"):
            _check_size(name, getattr(self, name))
        _check_whole("steps", self.num_inference_steps, 1, 1000)
        _check_whole("number of pictures", self.num_images, 1, 100_000)
        _check_whole("batch size", self.batch_size, 1, 256)
        _check_whole("clip skip", self.clip_skip, 1, 32)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, MAX_SEED)
        if not 0 <= _finite(self.guidance_scale, "guidance scale") <= 100:
            raise usage_error(
                f"guidance scale {self.guidance_scale:g} is outside 0 to 100; 5 to 9 is usual, 1 is without guidance"
            )
        find_sampler(self.scheduler)
        self._check_pictures()

    def _check_pictures(self) -> None:
        if self.mask_image is not None and self.init_image is None:
            raise usage_error("--mask says what to repaint of a picture; give the picture with --init-image FILE")
        if self.init_image is None:
            return
        if not 0 < _finite(self.strength, "strength") <= 1:
            raise usage_error(f"strength {self.strength:g} is outside 0 to 1; 0.6 keeps the layout, 1 ignores the picture")
        if int(self.num_inference_steps * self.strength) < 1:
            needed = math.ceil(1 / self.strength)
            raise usage_error(
                f"{self.num_inference_steps} steps at strength {self.strength:g} is no step at all; use --steps {needed}"
            )


def _check_size(name: str, size_px: int | None) -> None:
    if size_px is None:
        return
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise usage_error(f"{name} {size_px} is outside {MIN_SIZE_PX} to {MAX_SIZE_PX} pixels")
    if size_px % SIZE_STEP_PX:
        below = size_px // SIZE_STEP_PX * SIZE_STEP_PX
        raise usage_error(f"{name} {size_px} is not a multiple of {SIZE_STEP_PX}; nearest: {below} or {below + SIZE_STEP_PX}")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise usage_error(f"{name} {value} is outside {low} to {high:,}")


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise usage_error(f"{name} {value} is not a number that can be used")
    return value

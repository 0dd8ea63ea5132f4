"""What each of the options that draw faster for a price saves, and what it costs: time, difference, prompts still followed.

Fewer steps stand beside them: an option that gives less for its time than drawing fewer steps is not worth having. A machine
has faster and slower minutes, so pictures are timed in turn with plain ones: the share is the median of such pairs (of one
pair, with a model of full size).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from src.bench import random_models
from src.bench.report import Row
from src.config import AppConfig
from src.example_subject import COLOURS, follows_prompt
from src.generator import TextToImageGenerator
from src.model_files import EMBEDDED

STEPS, GUIDANCE_SCALE = 20, 5.0
TIMED = 12  # prompts whose pictures are also drawn plainly, just before
FULL_STEPS = 10  # of SD v1.5's shapes: half as many, for the time it takes
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "three quarters of the steps": {"num_inference_steps": 0.75},
    "half of the steps": {"num_inference_steps": 0.5},
    "--deep-cache 2": {"deep_cache": 2},
    "--deep-cache 3": {"deep_cache": 3},
    "--deep-cache 5": {"deep_cache": 5},
    "--token-merging 0.25": {"token_merging": 0.25},
    "--token-merging 0.5": {"token_merging": 0.5},
    "--token-merging 0.75": {"token_merging": 0.75},
    "--guidance-interval 0.2:0.8": {"guidance_start": 0.2, "guidance_end": 0.8},
    "--guidance-interval 0:0.6": {"guidance_end": 0.6},
    "--deep-cache 2, interval 0:0.6": {"deep_cache": 2, "guidance_end": 0.6},
}
_BACKGROUNDS = ("white", "black", "blue", "green", "yellow", "pink")
_PAIRS = ("circle left of", "square"), ("star above", "heart"), ("ring right of", "diamond")


def prompts() -> list[str]:
    """Thirty-six of the embedded model's grammar: on each background six pairs of shapes, the colours in turn."""
    found = []
    for number, (background, (first, second)) in enumerate((b, s) for b in _BACKGROUNDS for s in _PAIRS * 2):
        colours = [name for name in COLOURS if name != background]
        one, other = (colours[(number * 3 + step) % len(colours)] for step in (0, 5))
        found.append(f"a {one} {first} a {other} {second} on a {background} background")
    return found


def run(folder: Path, *, full: bool) -> Iterator[str | Row]:
    """Draw with each option and give the lines of the report. ``full``: a model of SD v1.5's shapes, for its times alone."""
    config, texts, steps = AppConfig(), prompts(), STEPS
    config.model.model_id, config.model.device = str(EMBEDDED), "cpu"
    if full:
        config.model.model_id, texts, steps = str(random_models.write(folder / "model", "sd15", "bf16")), texts[:1], FULL_STEPS
    generator = TextToImageGenerator(config)
    generator.load_model()
    model = generator.model
    name = "SD v1.5's shapes" if full else "embedded"
    yield f"{name}, {model.native_size_px} px, {model.precision}, {steps} steps, guidance on, {len(texts)} prompts"
    plain = [] if full else [_draw(generator, text, seed, steps, {}) for seed, text in enumerate(texts)]
    for label, settings in OPTIONS.items():
        pictures, pairs = [], []
        for seed, text in enumerate(texts):
            beside_s = _time_s(_draw(generator, text, seed, steps, {})) if seed < TIMED else None
            pictures.append(_draw(generator, text, seed, steps, settings))
            pairs += [] if beside_s is None else [_time_s(pictures[-1]) / beside_s]
        row = {"": label, "picture s": min(map(_time_s, pictures)), "of plain": f"{statistics.median(pairs):.0%}"}
        if not full:
            followed = sum(follows_prompt(picture, text) for picture, text in zip(pictures, texts))
            row |= {"difference": _difference(pictures, plain), "followed": f"{followed} of {len(texts)}"}
        yield row


def _draw(generator: TextToImageGenerator, text: str, seed: int, steps: int, settings: Mapping[str, Any]) -> Image.Image:
    """A picture, after two steps of the same, which pack the weights."""
    settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE} | settings
    if settings["num_inference_steps"] < 1:
        settings["num_inference_steps"] = round(steps * settings["num_inference_steps"])
    generator.generate(text, seed=seed, **(settings | {"num_inference_steps": 2}))
    return generator.generate(text, seed=seed, **settings)[0]


def _time_s(picture: Image.Image) -> float:
    return picture.info["drawn"].time_s


def _difference(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Mean absolute difference of their levels, 0 to 255."""
    pairs = ((numpy.asarray(one, dtype=float), numpy.asarray(other, dtype=float)) for one, other in zip(pictures, others))
    return statistics.mean(float(abs(one - other).mean()) for one, other in pairs)

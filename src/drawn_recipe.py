"""Collect what a picture was drawn from and on into its recipe, as the text chunks that the picture carries."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from src import files, optimizations
from src.recipe import LoraRef, ModelRef, PictureRef, Recipe, to_text_chunks
from src.request import PictureRequest
from src.schedulers import find_sampler
from src.version import VERSION

if TYPE_CHECKING:
    from PIL import Image

    from src.base_models import LoadedModel
    from src.config import AppConfig
    from src.lora import Adapter, LoraReport
    from src.memory_plan import Plan

STACK = ("torch", "diffusers", "transformers", "safetensors")


def describe_picture(
    model: LoadedModel,
    weights_sha256: str,
    request: PictureRequest,
    seed: int,
    prompt: str,
    loras: Sequence[tuple[Adapter, float, LoraReport]],
    plan: Plan,
    config: AppConfig,
    seconds: float,
) -> dict[str, str]:
    """The text chunks of one picture; ``loras`` are the adapters in use, their weights and what they matched."""
    choice = find_sampler(request.scheduler)
    drawn = Recipe(
        mode=request.mode,
        prompt=prompt,
        negative_prompt=request.negative_prompt,
        seed=seed,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=choice.key,
        clip_skip=request.clip_skip,
        prompt_weights=request.prompt_weights,
        strength=None if request.init_image is None else request.strength,
        init_image=_picture_ref(request.init_image),
        mask=_picture_ref(request.mask_image),
        model=ModelRef(model.name, model.family, weights_sha256),
        vae=ModelRef(model.vae_name, model.family, None) if model.vae_name else None,
        loras=tuple(LoraRef(item.name, weight, item.sha256, report.matched, report.total) for item, weight, report in loras),
        precision=model.precision,
        device=model.device_name,
        memory_plan=plan.placement.name,
        peak_bytes=optimizations.peak_bytes(model.device),
        predicted_bytes=plan.estimate.peak_bytes,
        time_s=round(seconds, 3),
        stack={name: version(name) for name in STACK},
        config={name: section for name, section in config.to_dict().items() if name != "paths"},
        version=VERSION,
    )
    return to_text_chunks(drawn, choice.sampler.label, choice.schedule_label)


def _picture_ref(picture: Path | Image.Image | None) -> PictureRef | None:
    if picture is None:
        return None
    return (
        PictureRef(picture.name, files.sha256_of(picture))
        if isinstance(picture, Path)
        else PictureRef("picture in memory", None)
    )

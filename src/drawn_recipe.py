"""Collect what a picture was drawn from and on into its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from src import files, optimizations
from src.config import GenerationConfig
from src.named_files import tensors_sha256
from src.recipe import LoraRef, ModelRef, PictureRef, Recipe
from src.request import PictureRequest
from src.schedulers import find_sampler
from src.version import VERSION

if TYPE_CHECKING:
    from PIL import Image

    from src.base_models import LoadedModel
    from src.config import AppConfig
    from src.lora.shelf import Attached
    from src.memory_plan import Plan

STACK = ("torch", "diffusers", "transformers", "safetensors")


def describe_picture(
    model: LoadedModel,
    weights_sha256: str,
    request: PictureRequest,
    attached: Sequence[Attached],
    plan: Plan,
    config: AppConfig,
    time_s: float,
) -> Recipe:
    """The recipe of one picture; ``request`` is that picture's own: its seed, its prompt with wildcards filled in."""
    configured = {name: section for name, section in config.to_dict().items() if name != "paths"}
    configured["generation"] = {item.name: getattr(request, item.name) for item in fields(GenerationConfig)}
    configured["generation"]["num_images"] = 1  # with how many others it was drawn depends on who shares the work
    return Recipe(
        mode=request.mode,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=find_sampler(request.scheduler).key,
        clip_skip=request.clip_skip,
        prompt_weights=request.prompt_weights,
        deep_cache=request.deep_cache,
        token_merging=request.token_merging,
        guidance_start=request.guidance_start,
        guidance_end=request.guidance_end,
        strength=None if request.init_image is None else request.strength,
        init_image=_picture_ref(request.init_image),
        mask=_picture_ref(request.mask_image),
        model=ModelRef(model.name, model.family, weights_sha256),
        vae=ModelRef(model.vae_name, model.family, None) if model.vae_name else None,
        loras=tuple(_lora_ref(item) for item in attached),
        precision=model.precision,
        quantize=plan.quantize,
        device=model.device_name,
        memory_plan=plan.placement.name,
        peak_bytes=optimizations.peak_bytes(model.device),
        predicted_bytes=plan.estimate.peak_bytes,
        time_s=round(time_s, 3),
        stack={name: version(name) for name in STACK},
        config=configured,
        version=VERSION,
    )


def _lora_ref(item: Attached) -> LoraRef:
    adapter, report = item.adapter, item.report
    # A1111 knows a LoRA by the hash of its tensors; a folder of several files has none.
    tensors = tensors_sha256(adapter.files[0]) if len(adapter.files) == 1 else None
    return LoraRef(adapter.name, item.choice.weight, adapter.sha256, report.matched, report.total, tensors)


def _picture_ref(picture: Path | Image.Image | None) -> PictureRef | None:
    if picture is None:
        return None
    return (
        PictureRef(picture.name, files.sha256_of(picture))
        if isinstance(picture, Path)
        else PictureRef("picture in memory", None)
    )

"""Collect what a picture was drawn from and on into its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from src import files, optimizations
from src.config import GenerationConfig
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
    refs: Mapping[str, PictureRef],
) -> Recipe:
    """The recipe of one picture; ``request`` is that picture's own: its seed, its prompt with wildcards filled in.

    Nothing is read for it but what `refs` (init_image, mask) and ``attached`` hold: a file may be gone or another by now.
    """
    configured = {name: section for name, section in config.to_dict().items() if name != "paths"}
    configured["generation"] = {item.name: getattr(request, item.name) for item in fields(GenerationConfig)}
    configured["generation"]["num_images"] = 1  # with how many others it was drawn depends on who shares the work
    # Names in place of what was typed: a folder "client/project" reads like a hub id, and would be kept as one.
    architecture = config.model.architecture and Path(config.model.architecture).name
    configured["model"] |= {"model_id": model.name, "vae": model.vae_name, "architecture": architecture}
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
        init_image=refs.get("init_image"),
        mask=refs.get("mask"),
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
    return LoraRef(adapter.name, item.choice.weight, adapter.sha256, report.matched, report.total, adapter.tensors_sha256)


def picture_ref(picture: Path | Image.Image) -> PictureRef:
    """A picture or mask as a recipe names it, by its content now. Raises UserError: not found, refused."""
    if isinstance(picture, Path):
        return PictureRef(picture.name, files.sha256_of(picture))
    return PictureRef("picture in memory", None)

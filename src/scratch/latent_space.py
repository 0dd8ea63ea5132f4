"""Tools of the same lesson: what lies between two pictures or two prompts, through the latents and back, around a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from src import base_models, files
from src.config import AppConfig, ModelConfig, OptimizationConfig
from src.errors import ExitCode, not_found, usage_error
from src.images import contact_sheet, fit_to, read_image, save_picture
from src.model_shapes import read_shapes
from src.scratch.settings import model_folder
from src.scratch.vae import psnr
from src.terminal import Terminal

MAX_COUNT = 64
DISTANCES = (0.5, 1.0, 2.0, 4.0)  # deviations that samples lie away from the point
STEPS, GUIDANCE = 20, 5.0


def run(tool: str, typed: dict[str, Any], terminal: Terminal) -> int:
    """Do what was asked, and say where the picture is. Raises UserError."""
    count = typed.get("count", 8)
    if not 2 <= count <= MAX_COUNT:
        raise usage_error(f"--count {count} is outside 2 to {MAX_COUNT}")
    prompts, pictures, folder = typed.get("prompt", []), typed.get("picture", []), model_folder(typed.get("model"))
    if not (folder / "model_index.json").is_file():
        raise not_found(f"{folder}: is no model's folder; give one with --model")
    seed = typed.get("seed", 0)
    if tool == "interpolate" and len(prompts) == 2 and not pictures:
        sheet = between_prompts(folder, prompts, count, seed, terminal)
    elif tool == "interpolate" and len(pictures) == 2 and not prompts:
        sheet = between_pictures(read_vae(folder), *_read(pictures, folder), count)
    elif tool == "interpolate":
        raise usage_error("interpolate takes two --prompt or two --picture")
    elif not pictures or (tool == "around" and len(pictures) > 1):
        raise usage_error(f"{tool} takes {'one ' if tool == 'around' else ''}--picture FILE")
    elif tool == "reconstruct":
        sheet = reconstructions(read_vae(folder), _read(pictures, folder), terminal)
    else:
        sheet = around(read_vae(folder), _read(pictures, folder)[0], count, seed)
    print(save_picture(sheet, files.check_writable_folder(Path(typed.get("out", "outputs")).expanduser()), tool))
    return ExitCode.OK


def _read(paths: Sequence[str], folder: Path) -> list[Tensor]:
    """Pictures as (3, side, side) in [-1, 1], cut to the size that the model draws."""
    side_px = read_shapes(folder).native_px
    pictures = [fit_to(read_image(Path(path).expanduser()), side_px, side_px) for path in paths]
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1 for picture in pictures]


def read_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a model's folder, in fp32."""
    return base_models.load_component(folder / "vae", "vae", "AutoencoderKL", torch.float32)


@torch.no_grad()
def between_pictures(vae: AutoencoderKL, first: Tensor, second: Tensor, count: int) -> Image.Image:
    """A row from one picture (3, h, w) to the other, in equal steps through the latents."""
    ends = vae.encode(torch.stack([first, second])).latent_dist.mean
    shares = [i / (count - 1) for i in range(count)]
    pictures = [vae.decode(slerp(ends[:1], ends[1:], share)).sample[0] for share in shares]
    return contact_sheet([to_image(picture) for picture in pictures], [f"{share:.0%}" for share in shares], columns=count)


@torch.no_grad()
def between_prompts(folder: Path, prompts: Sequence[str], count: int, seed: int, terminal: Terminal) -> Image.Image:
    """A row of pictures from the same noise, whose embedding goes from one prompt to the other in equal steps."""
    if read_shapes(folder).family == "SDXL":
        raise usage_error(f"{folder}: interpolate walks between prompts of SD 1.x and 2.x; take such a model")
    model = ModelConfig(model_id=str(folder), device="cpu", precision="fp32")
    pipeline = base_models.load(AppConfig(model, optimization=OptimizationConfig(disable_safety_checker=True))).pipeline
    pipeline.set_progress_bar_config(disable=True)
    ends = [pipeline.encode_prompt(prompt, pipeline.device, 1, True) for prompt in prompts]
    shares, pictures = [i / (count - 1) for i in range(count)], []
    terminal.start_progress(count)
    try:
        for number, share in enumerate(shares):
            told = torch.lerp(ends[0][0], ends[1][0], share)
            pictures += pipeline(
                prompt_embeds=told, negative_prompt_embeds=ends[0][1], num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(seed),
            ).images  # fmt: skip
            terminal.progress(number + 1, "interpolate")
    finally:
        terminal.end_progress()
    return contact_sheet(pictures, [f"{share:.0%}" for share in shares], columns=count)


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, pictures: Sequence[Tensor], terminal: Terminal) -> Image.Image:
    """Each picture above what comes back through the latents."""
    back = [vae.decode(vae.encode(picture[None]).latent_dist.mean).sample[0].clamp(-1, 1) for picture in pictures]
    labels = [f"{psnr(one, other):.1f} dB" for one, other in zip(back, pictures)]
    terminal.say(f"reconstruct: {', '.join(labels)}")
    return contact_sheet(
        [to_image(one) for one in (*pictures, *back)], [*("" for _ in pictures), *labels], columns=len(pictures)
    )


@torch.no_grad()
def around(vae: AutoencoderKL, picture: Tensor, count: int, seed: int) -> Image.Image:
    """Rows of samples that lie farther and farther from a picture's latents, in units of the posterior's deviation."""
    posterior, random = vae.encode(picture[None]).latent_dist, torch.Generator().manual_seed(seed)
    pictures, labels = [], []
    for distance in DISTANCES:
        noise = torch.randn((count, *posterior.mean.shape[1:]), generator=random)
        pictures += [  # one at a time: a full-size decoder takes gigabytes for each
            to_image(vae.decode(posterior.mean + distance * posterior.std * one[None]).sample[0]) for one in noise
        ]
        labels += [f"{distance:g} deviations"] * count
    return contact_sheet(pictures, labels, columns=count)


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Between two points along the arc, so that what lies between is as long (Shoemake 1985); straight if parallel."""
    cosine = float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-12))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if angle < 1e-3:
        return torch.lerp(one, other, share)
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)


def to_image(picture: Tensor) -> Image.Image:
    """(3, h, w) in [-1, 1]."""
    return Image.fromarray(((picture.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())

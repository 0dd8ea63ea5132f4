"""Every bundled folder builds the real networks, without memory for weights, with the published number of parameters."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from src.model_files import ARCHITECTURES
from src.model_shapes import BUNDLED

VAE = 83_653_863
CLIP_L, OPENCLIP_H, OPENCLIP_BIG_G = 123_060_480, 340_387_840, 694_659_840
PUBLISHED = {  # name: (U-Net, text encoders)
    "sd15": (859_520_964, [CLIP_L]),
    "sd21": (865_910_724, [OPENCLIP_H]),
    "sd21-base": (865_910_724, [OPENCLIP_H]),
    "sdxl": (2_567_463_684, [CLIP_L, OPENCLIP_BIG_G]),
    "small-sd": (579_384_964, [CLIP_L]),  # "0.58B" in the BK-SDM paper
    "ofa-small": (579_384_964, [CLIP_L]),
}
SAMPLING = {  # name: (native side of a latent, prediction type, scheduler)
    "sd15": (64, "epsilon", "PNDMScheduler"),
    "sd21": (96, "v_prediction", "DDIMScheduler"),
    "sd21-base": (64, "epsilon", "PNDMScheduler"),
    "sdxl": (128, "epsilon", "EulerDiscreteScheduler"),
    "small-sd": (64, "epsilon", "PNDMScheduler"),
    "ofa-small": (64, "epsilon", "PNDMScheduler"),
}


def config(name: str, path: str) -> dict:
    return json.loads((ARCHITECTURES / name / path).read_text())


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_folder_is_checked_here():
    assert {path.name for path in ARCHITECTURES.iterdir() if path.is_dir()} == set(PUBLISHED) == set(BUNDLED.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_number_of_parameters(name):
    classes = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    index = config(name, "model_index.json")
    with torch.device("meta"):
        unet = count(UNet2DConditionModel.from_config(config(name, "unet/config.json")))
        vae = count(AutoencoderKL.from_config(config(name, "vae/config.json")))
        texts = [
            count(classes[index[part][1]](CLIPTextConfig(**config(name, f"{part}/config.json"))))
            for part in ("text_encoder", "text_encoder_2")
            if part in index
        ]
    assert (unet, texts) == PUBLISHED[name]
    assert vae == VAE


@pytest.mark.parametrize("name", SAMPLING)
def test_schedule_is_the_one_that_the_model_was_trained_with(name):
    scheduler = config(name, "scheduler/scheduler_config.json")
    found = (
        config(name, "unet/config.json")["sample_size"],
        scheduler.get("prediction_type", "epsilon"),
        scheduler["_class_name"],
    )
    assert found == SAMPLING[name]
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert (scheduler["steps_offset"], scheduler["clip_sample"]) == (1, False)
    assert scheduler.get("timestep_spacing") == ("leading" if name == "sdxl" else None)


def test_latents_are_scaled_as_published():
    scales = {name: config(name, "vae/config.json").get("scaling_factor", 0.18215) for name in PUBLISHED}
    assert scales == {name: 0.13025 if name == "sdxl" else 0.18215 for name in PUBLISHED}

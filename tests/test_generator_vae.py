"""A VAE whose half precision does not suffice while a picture is being drawn."""

from __future__ import annotations

import torch
from PIL import Image

from src.generator import TextToImageGenerator
from tests.test_generator import PROMPT, SEED, config_for, gradient, pixels
from tests.tiny import pipelines


def test_an_inpainting_unet_of_nine_channels_goes_on_when_its_vae_overflows(tmp_path, monkeypatch) -> None:
    """As SD's does in fp16: what diffusers encodes for it is encoded once more in fp32, and so it is from then on."""
    folder = pipelines.save(pipelines.sd1(in_channels=9), tmp_path / "inpaint")
    config, lines = config_for(folder, tmp_path), []
    config.model.precision = "bf16"
    generator = TextToImageGenerator(config, lines.append)
    vae = generator.model.pipeline.vae
    encode = vae.encode

    def overflowing(pixels: torch.Tensor) -> object:
        assert pixels.dtype == vae.dtype
        found = encode(pixels)
        if vae.dtype == torch.bfloat16:
            found.latent_dist.mean[:] = found.latent_dist.parameters[:] = torch.inf
        return found

    monkeypatch.setattr(vae, "encode", overflowing)
    mask = Image.new("L", (64, 64), 255)
    for _ in range(2):
        (picture,) = generator.generate(PROMPT, init_image=gradient(64, 64), mask_image=mask, strength=0.8, seed=SEED)
        assert pixels(picture).std() > 0
    assert sum(line.startswith("vae     its output held no numbers") for line in lines) == 1

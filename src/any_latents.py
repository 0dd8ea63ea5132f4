"""Image to image and inpainting where latents have any number of channels.

diffusers' pipelines know latents by their four channels: any other number is taken for pixels, or refused by inpainting. The
model that ships has more. Imported only for such a model: a picture from text does not need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

StepEnd = Callable[..., dict[str, Any]]


class AnyLatentsPipeline(StableDiffusionImg2ImgPipeline):
    """Its ``image`` is latents (B, C, h, w). With a mask it inpaints as `StableDiffusionInpaintPipeline` does with four."""

    mask: torch.Tensor | None = None  # (1, 1, h, w), 1 is repainted
    begins_as_noise = False  # what is repainted altogether does not show through

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, mask: Image.Image | None, strength: float) -> AnyLatentsPipeline:
        """The same components; nothing is copied. ``mask`` is as large as the picture, white is repainted."""
        made = cls(**pipeline.components, requires_safety_checker=False)
        scale = made.vae_scale_factor
        made.image_processor = VaeImageProcessor(scale, vae_latent_channels=made.vae.config.latent_channels)
        if mask is not None:
            reader = VaeImageProcessor(scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
            size = mask.height // scale, mask.width // scale
            made.mask = torch.nn.functional.interpolate(reader.preprocess(mask, mask.height, mask.width), size=size)
            made.begins_as_noise = strength == 1
        return made

    def prepare_latents(
        self, image: torch.Tensor, timestep: torch.Tensor, batch_size: int, num_images_per_prompt: int, dtype: torch.dtype,
        device: torch.device, generator: list[torch.Generator] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The picture's latents with noise of ``timestep``; both are kept for `keep_known`."""
        self._known = image.to(device, dtype)
        self._noise = randn_tensor(self._known.shape, generator=generator, device=device, dtype=dtype)
        if self.begins_as_noise:
            return self._noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(self._known, self._noise, timestep)

    def keep_known(self, then: StepEnd | None) -> StepEnd:
        """A callback that puts back what the mask leaves alone, as noisy as the next step expects; then calls another."""
        mask = self.mask

        def on_step_end(
            pipeline: AnyLatentsPipeline, index: int, timestep: Any, tensors: dict[str, torch.Tensor]
        ) -> dict[str, Any]:
            known, latents = pipeline._known, tensors["latents"]
            following = pipeline.scheduler.timesteps[-pipeline.num_timesteps :][index + 1 : index + 2]
            if len(following):
                known = pipeline.scheduler.add_noise(known, pipeline._noise, following)
            kept = mask.to(latents.device, latents.dtype)
            latents = (1 - kept) * known + kept * latents
            more = then(pipeline, index, timestep, {**tensors, "latents": latents}) if then is not None else {}
            return {"latents": latents, **more}

        return on_step_end

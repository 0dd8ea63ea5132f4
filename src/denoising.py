"""From noise to a picture: the one place where our request becomes a call of a diffusers pipeline.

Pictures are encoded and decoded here and not inside the pipeline, one at a time: the peak of a batch is then that of a
single picture, a picture does not depend on its neighbours, and what is not finite is noticed. Letters: B images,
h and w latent size (an eighth of the pixels).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import numpy
import torch
from PIL import Image

from src import cpu_memory
from src.conditioning import Conditioning, stack
from src.errors import UserError
from src.guidance_interval import limit_guidance
from src.step_cache import reuse_deep_features
from src.token_merging import merge_tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin

    from src.recipe import PictureRef
    from src.request import PictureRequest

_PIPELINES = {
    ("txt2img", False): "StableDiffusionPipeline",
    ("img2img", False): "StableDiffusionImg2ImgPipeline",
    ("inpaint", False): "StableDiffusionInpaintPipeline",
    ("txt2img", True): "StableDiffusionXLPipeline",
    ("img2img", True): "StableDiffusionXLImg2ImgPipeline",
    ("inpaint", True): "StableDiffusionXLInpaintPipeline",
}

# Calls of the U-Net done, calls in all, and how to get the latents (B, 4, h, w) as they will about be.
StepCallback = Callable[[int, int, Callable[[], torch.Tensor]], None]
PREVIEW_LATENTS = 32  # a side: 256 pixels


@dataclass(frozen=True, slots=True)
class Start:
    """What an image-to-image run starts from: the picture and the mask, in the size that is drawn."""

    image: Image.Image  # RGB
    mask: Image.Image | None = None  # L, white is repainted
    refs: Mapping[str, PictureRef] = field(default_factory=dict)  # both as they were read, by their names in a recipe


class NotFinite(ArithmeticError):
    """A tensor holds NaN or infinity: the precision was too small for the model."""


class VaeNotFinite(NotFinite):
    """The same, and it was the VAE: a larger precision for it alone will do."""


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image; it draws the first noise and whatever an ancestral or SDE sampler adds."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def noise(sources: Sequence[torch.Generator], channels: int, height: int, width: int) -> torch.Tensor:
    """Each image's own float32 noise, (B, channels, height, width): the same on every device and at any batch size."""
    return torch.stack([torch.randn(channels, height, width, generator=source) for source in sources])


def denoise(
    pipeline: DiffusionPipeline,
    request: PictureRequest,
    conditionings: Sequence[Conditioning],
    sources: Sequence[torch.Generator],
    start: Start | None = None,
    on_step: StepCallback | None = None,
) -> torch.Tensor:
    """Run the sampler and return the latents (B, 4, h, w) of one batch; the request's size is set. Raises NotFinite."""
    width_px, height_px = request.width, request.height
    arguments = {
        **stack(conditionings),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": list(sources),
        "output_type": "latent",
        "callback_on_step_end": _report_to(on_step, pipeline.scheduler),
    }
    if start is None:
        scale = pipeline.vae_scale_factor
        latents = noise(sources, pipeline.vae.config.latent_channels, height_px // scale, width_px // scale)
        dtype = arguments["prompt_embeds"].dtype
        arguments |= {"latents": latents.to(pipeline._execution_device, dtype), "height": height_px, "width": width_px}
    else:
        arguments |= _start_arguments(pipeline, request, sources, start)
    with torch.no_grad(), _shortcuts(pipeline, request):
        if start is not None and _has_other_latents(pipeline):
            from src.any_latents import AnyLatentsPipeline

            sampler = AnyLatentsPipeline.of(pipeline, start.mask, request.strength)
            if start.mask is not None:
                arguments["callback_on_step_end"] = sampler.keep_known(arguments["callback_on_step_end"])
        else:
            sampler = _as_mode(pipeline, request.mode)
        sampler.set_progress_bar_config(disable=True)  # ours spans all pictures
        latents = sampler(**arguments).images
    cpu_memory.give_back()  # the decoder needs other sizes
    if not torch.isfinite(latents).all():
        raise NotFinite("the U-Net's output")
    return latents


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """An RGB picture -> (1, 3, H, W), float32 in [-1, 1]."""
    return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1


def encode(vae: AutoencoderKL, pixels: torch.Tensor, device: torch.device, source: torch.Generator) -> torch.Tensor:
    """Pixels (1, 3, H, W) in [-1, 1] -> a sample of their latents (1, 4, h, w), in the VAE's precision."""
    with torch.no_grad():
        posterior = vae.encode(pixels.to(device, vae.dtype)).latent_dist
    return _normalise(vae, posterior.sample(source))


def encode_distribution(vae: AutoencoderKL, pixels: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, H, W) in [-1, 1] -> mean and deviation (B, 4, h, w) of their latents, float32, in the U-Net's scale."""
    with torch.no_grad():
        posterior = vae.encode(pixels.to(device, vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    _, deviation = _channel_statistics(vae, std)
    return _normalise(vae, mean), std * vae.config.scaling_factor / deviation


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents (1, 4, h, w) -> pixels (1, 3, H, W), float32 in [0, 1] on the CPU. Raises NotFinite."""
    latents = latents.to(vae.dtype)
    mean, deviation = _channel_statistics(vae, latents)
    latents = latents * deviation / vae.config.scaling_factor + mean
    with torch.no_grad():
        pixels = vae.decode(latents, return_dict=False)[0]
    if not torch.isfinite(pixels).all():
        raise VaeNotFinite("the VAE's output")
    return (pixels / 2 + 0.5).clamp(0, 1).float().cpu()


def _normalise(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The VAE's latents -> the U-Net's, of about unit variance."""
    mean, deviation = _channel_statistics(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / deviation


def _channel_statistics(vae: AutoencoderKL, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and deviation of each latent channel; 0 and 1 but for some SDXL VAEs."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return 0.0, 1.0
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(deviation).view(1, -1, 1, 1)


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """Pixels (1, 3, H, W) in [0, 1] -> an RGB picture, rounded to 8 bits."""
    array = (pixels[0].permute(1, 2, 0).detach().numpy() * 255).round().astype("uint8")
    return Image.fromarray(array)


def is_flagged(pipeline: DiffusionPipeline, pixels: torch.Tensor) -> bool:
    """Whether the safety checker that the model ships, if it was loaded, objects to pixels (1, 3, H, W) in [0, 1]."""
    if getattr(pipeline, "safety_checker", None) is None:
        return False
    _, flags = pipeline.run_safety_checker(pixels * 2 - 1, pipeline._execution_device, pipeline.unet.dtype)
    return any(flags)


def keep_outside_mask(drawn: Image.Image, start: Start) -> Image.Image:
    """Put the original's pixels back where the mask is black: the VAE's round trip would change them."""
    return Image.composite(drawn, start.image, start.mask)


def preview(vae: AutoencoderKL, latents: torch.Tensor, device: torch.device) -> list[Image.Image]:
    """Latents (B, 4, h, w) -> small pictures; averaged down to 32 latents a side first, so that a preview stays cheap."""
    factor = max(1, round(max(latents.shape[-2:]) / PREVIEW_LATENTS))
    small = torch.nn.functional.avg_pool2d(latents.float(), factor).to(device)
    return [to_picture(decode(vae, item[None])) for item in small]


def estimate_clean(scheduler: SchedulerMixin, prediction: torch.Tensor, timestep: float, sample: torch.Tensor) -> torch.Tensor:
    """The finished latents as the U-Net sees them at this step, for any sampler: x0 from its prediction.

    With a = alphas_cumprod at the timestep and x the sample scaled to unit variance: epsilon gives
    (x - sqrt(1-a) eps) / sqrt(a), v gives sqrt(a) x - sqrt(1-a) v (Salimans and Ho 2022, appendix D).
    """
    table = scheduler.alphas_cumprod.cpu().double().numpy()
    a = float(numpy.interp(float(timestep), range(len(table)), table))
    if scheduler.init_noise_sigma > 1.5:  # Euler and its kin: the sample is x0 + sigma * noise, of variance 1 / a
        sample = sample * a**0.5
    if scheduler.config.prediction_type == "v_prediction":
        return a**0.5 * sample - (1 - a) ** 0.5 * prediction
    return (sample - (1 - a) ** 0.5 * prediction) / a**0.5


def is_guided(pipeline: DiffusionPipeline, request: PictureRequest) -> bool:
    """Whether the U-Net draws the negative prompt's half beside the prompt's; it is diffusers' condition."""
    return request.guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None


def idle_settings(pipeline: DiffusionPipeline, request: PictureRequest) -> list[str]:
    """A line for each setting that this model has no use for; of those that none has, the request itself knows."""
    if request.guidance_scale <= 1 or is_guided(pipeline, request):
        return []
    why = "this U-Net is told the guidance scale, and draws the prompt alone"
    return [f"{name} does nothing: {why}" for name in request.needing_guidance]


@contextlib.contextmanager
def _shortcuts(pipeline: DiffusionPipeline, request: PictureRequest) -> Iterator[None]:
    """What the request saves of the U-Net's work, for one batch. Each is hooks, which go around offloading and adapters."""
    unet, handles = pipeline.unet, []
    try:
        if is_guided(pipeline, request):
            timesteps = pipeline.scheduler.config.num_train_timesteps
            handles += limit_guidance(unet, request.guidance_start, request.guidance_end, timesteps)
        handles += merge_tokens(unet, request.token_merging)
        handles += reuse_deep_features(unet, request.deep_cache)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(scheduler: SchedulerMixin, seen: dict[str, torch.Tensor]) -> None:
    """Note at each step what the sampler was given: diffusers' callback does not hand it out."""
    step = scheduler.step

    @functools.wraps(step)  # diffusers looks at the signature
    def watched_step(prediction: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.update(prediction=prediction, timestep=timestep, sample=sample)
        return step(prediction, timestep, sample, *rest, **named)

    scheduler.step = watched_step


def _has_other_latents(pipeline: DiffusionPipeline) -> bool:
    """Whether its latents have another number of channels than the four that diffusers takes them to have."""
    channels = pipeline.vae.config.latent_channels
    return channels != 4 and pipeline.unet.config.in_channels == channels and not hasattr(pipeline, "text_encoder_2")


def _as_mode(pipeline: DiffusionPipeline, mode: str) -> DiffusionPipeline:
    """The same components in the pipeline class of the mode; nothing is copied."""
    is_sdxl = hasattr(pipeline, "text_encoder_2")
    kind = getattr(diffusers, _PIPELINES[mode, is_sdxl])
    if type(pipeline) is kind:
        return pipeline
    extra = {} if is_sdxl else {"requires_safety_checker": False}
    made = kind(**pipeline.components, **extra)
    if mode == "inpaint":
        _mend_encoding(made)
    return made


def _mend_encoding(pipeline: DiffusionPipeline) -> None:
    """What diffusers encodes for a U-Net of 9 channels, in the VAE's own precision, and noticed where it holds no numbers."""
    encode_image = pipeline._encode_vae_image

    def mended(image: torch.Tensor, generator: Any) -> torch.Tensor:
        latents = encode_image(image.to(pipeline.vae.dtype), generator).to(image.dtype)
        if not torch.isfinite(latents).all():
            raise VaeNotFinite("the VAE's encoding")
        return latents

    pipeline._encode_vae_image = mended


def _start_arguments(
    pipeline: DiffusionPipeline, request: PictureRequest, sources: Sequence[torch.Generator], start: Start
) -> dict[str, Any]:
    """The arguments of image to image and inpainting. Latents are handed over in place of pixels: see the module's head."""
    arguments: dict[str, Any] = {"strength": request.strength}
    is_told = start.mask is not None and not _has_other_latents(pipeline)
    if is_told:
        arguments |= {"mask_image": start.mask, "width": request.width, "height": request.height}
    if pipeline.unet.config.in_channels == 9:  # it is shown the picture with a hole, which diffusers makes of the pixels
        return arguments | {"image": start.image}
    pixels = to_pixels(start.image)
    latents = torch.cat([encode(pipeline.vae, pixels, pipeline._execution_device, source) for source in sources])
    pipeline.maybe_free_model_hooks()  # under model offload the VAE would stay beside the U-Net
    latents = latents.to(pipeline.unet.dtype)
    if not torch.isfinite(latents).all():
        raise VaeNotFinite("the VAE's encoding")
    if is_told:
        arguments["masked_image_latents"] = latents  # not looked at by a U-Net of 4 channels, but encoded when absent
    return arguments | {"image": latents}


def _report_to(on_step: StepCallback | None, scheduler: SchedulerMixin) -> Callable[..., dict[str, Any]] | None:
    """Translate diffusers' callback to ours; it counts the U-Net's calls, of which second-order samplers make two a step."""
    if on_step is None:
        return None
    seen: dict[str, torch.Tensor] = {}
    _watch(scheduler, seen)

    def on_step_end(pipeline: DiffusionPipeline, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        on_step(index + 1, pipeline.num_timesteps, lambda: estimate_clean(scheduler, **seen))
        return {}

    return on_step_end


def explain_not_finite(error: NotFinite, precision: str) -> UserError:
    """What to say when no larger precision is left to try."""
    return UserError(
        f"{error} holds values that are no numbers in {precision}; draw with --precision fp32 (or bf16, where the card has it)"
    )

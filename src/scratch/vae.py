"""The third phase: an autoencoder whose latents are orderly (Kingma and Welling 2013, arXiv 1312.6114; Rombach et al. 2022).

    pixels (B, 3, 128, 128) --encoder--> mean, log variance (B, 12, 16, 16) --sample--> latents --decoder--> (B, 3, 128, 128)

The first three channels are asked to be a thumbnail of the picture, the others hold what it lacks. So colours lie where a
diffusion model finds them, and both halves learn faster: each has something to go by before the other has learnt anything.
It learns on crops, which hold more that is worth learning than flat backgrounds. Afterwards its latents are scaled to deviation
1, as a diffusion model wants them.
"""

from __future__ import annotations

import math

import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from src.evaluation.checking import check
from src.scenes.grammar import SIZE_PX
from src.scratch.learning import Lesson, device_of, learn, precision_of
from src.scratch.phases import Work
from src.scratch.pictures import Pictures, read_pictures
from src.scratch.settings import ScratchSettings, VaeSettings
from src.terminal import Terminal

JUDGED = 128  # held-out pictures that it is judged by, and as many of training for the scale of its latents
SHOWN = 8
FIRST_LOG_VARIANCE = -6.0
THUMBNAIL_SCALE = 4.0  # of the latents' first three channels to pixels in [-1, 1]: they outlast the others in noise


def build(settings: VaeSettings) -> AutoencoderKL:
    """Random weights, but for latents that begin nearly without noise: at deviation 1 it would hide what there is to learn."""
    levels = len(settings.channels)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=settings.latent_channels, block_out_channels=settings.channels,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=settings.layers, norm_num_groups=8, sample_size=SIZE_PX, mid_block_add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        vae.quant_conv.bias[settings.latent_channels :] = FIRST_LOG_VARIANCE
    return vae


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(0, 1)) per element: (m^2 + s^2 - 1 - log s^2) / 2 (Kingma and Welling, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def loss_of(vae: AutoencoderKL, pixels: Tensor, settings: VaeSettings) -> tuple[Tensor, dict[str, float]]:
    """|x - x'|^2 + a |x - x'| + b KL + c |m - thumbnail|^2 for pixels (B, 3, h, w) in [-1, 1]; the settings' a, b and c."""
    posterior = vae.encode(pixels).latent_dist  # mean m and log variance (B, 12, h/8, w/8)
    rebuilt = vae.decode(posterior.sample()).sample.float()  # (B, 3, h, w)
    squared, absolute = F.mse_loss(rebuilt, pixels), F.l1_loss(rebuilt, pixels)
    kl = kl_to_normal(posterior.mean.float(), posterior.logvar.float()).mean()
    small = thumbnail_loss(posterior.mean.float(), pixels)
    loss = squared + settings.l1_weight * absolute + settings.kl_weight * kl + settings.thumbnail_weight * small
    return loss, {"squared": float(squared.detach()), "kl": float(kl.detach()), "thumbnail": float(small.detach())}


def thumbnail_loss(means: Tensor, pixels: Tensor) -> Tensor:
    """How far the first three channels of (B, C, h, w) are from the means of the pixels' squares: mean squared error."""
    small = F.adaptive_avg_pool2d(pixels.float(), means.shape[-2:])  # (B, 3, h, w)
    return F.mse_loss(means[:, :3] / THUMBNAIL_SCALE, small)


def crops(pictures: Pictures, settings: VaeSettings, step: int) -> Tensor:
    """The batch of a step: (B, 3, crop, crop) in [-1, 1], places and pictures at random; every other one is mirrored."""
    random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    which = torch.randint(len(pictures), (settings.batch_size,), generator=random)
    room = SIZE_PX - settings.crop_px + 1
    corners = torch.randint(room, (settings.batch_size, 2), generator=random)
    batch = pictures.pixels[which]
    parts = [one[:, y : y + settings.crop_px, x : x + settings.crop_px] for one, (y, x) in zip(batch, corners.tolist())]
    parts = [part.flip(-1) if number % 2 else part for number, part in enumerate(parts)]
    return torch.stack(parts).float() / 127.5 - 1


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]: 10 log10(2^2 / mean squared error), over all pixels."""
    return 10 * math.log10(4 / max(float(F.mse_loss(one.float(), other.float())), 1e-12))  # in this order no number stays none


def learn_vae(work: Work, settings: ScratchSettings, terminal: Terminal) -> dict[str, float]:
    """Learn on crops of the training pictures, measure the latents, and publish a diffusers folder."""
    scenes, device = work.result("scenes"), device_of(settings.machine)
    training, judging = read_pictures(scenes, "train"), read_pictures(scenes, "held-out", JUDGED)
    torch.manual_seed(settings.vae.seed)
    vae = build(settings.vae).to(device, memory_format=torch.channels_last)
    held_out = judging.floats(slice(None)).to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels = crops(training, settings.vae, step).to(device, memory_format=torch.channels_last)
        return loss_of(vae, pixels, settings.vae)

    def judge() -> tuple[dict[str, float], Image.Image]:
        rebuilt = reconstruct(vae, held_out)
        picture = strip(held_out[:SHOWN].cpu(), rebuilt[:SHOWN].cpu())
        right = [check(strip(one[None].cpu()), scene).all for one, scene in zip(rebuilt, judging.scenes)]
        return {"psnr_db": psnr(rebuilt, held_out), "accepted": sum(right) / len(right)}, picture

    inputs = work.inputs("vae")
    lesson = Lesson("vae", vae, settings.vae, loss, judge, {"inputs": inputs})
    figures = learn(lesson, work.of("vae"), settings.machine, terminal)
    with torch.no_grad(), precision_of(settings.machine, device):
        latents = encode(vae, training.floats(slice(JUDGED)).to(device))
    deviation = float(latents.std())
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    figures |= {"scaling_factor": vae.config.scaling_factor, "parameters": sum(item.numel() for item in vae.parameters())}
    work.publish("vae", settings, model_files(vae), figures, inputs)
    return figures


def model_files(model: torch.nn.Module, name: str = "diffusion_pytorch_model.safetensors") -> dict[str, bytes]:
    """A diffusers component's folder, in fp16."""
    weights = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
    return {"config.json": model.to_json_string().encode(), name: safetensors.torch.save(weights, {"format": "pt"})}


def read_vae(work: Work) -> AutoencoderKL:
    """The published VAE, in fp32."""
    return AutoencoderKL.from_pretrained(work.result("vae").folder, torch_dtype=torch.float32).eval()


def encode(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 32) -> Tensor:
    """Means of the latents (B, 12, 16, 16) of pixels (B, 3, 128, 128) in [-1, 1], not scaled."""
    parts = [
        vae.encode(part.contiguous(memory_format=torch.channels_last)).latent_dist.mean for part in pixels.split(batch_size)
    ]
    return torch.cat(parts).float().contiguous()


def reconstruct(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 16) -> Tensor:
    """Pixels through the latents and back, (B, 3, 128, 128) in [-1, 1]."""
    parts = [vae.decode(encode(vae, part)).sample.float().clamp(-1, 1) for part in pixels.split(batch_size)]
    return torch.cat(parts)


def strip(*rows: Tensor) -> Image.Image:
    """Rows of pictures (B, 3, h, w) in [-1, 1], one below the other."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return Image.fromarray(((sheet.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())

"""Tiny random Stable Diffusion pipelines made of the real classes: real shapes of code, seconds instead of gigabytes.

The tokenizer is the embedded model's byte-level BPE (it encodes any text) with CLIP's window of 77. The VAE has four
levels, so that a latent is an eighth of a picture as in the full-size models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = Path(__file__).parents[2] / "models" / "embedded" / "tokenizer"
WINDOW = 77


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=WINDOW, pad_token=pad_token)


SPECIAL = {"vocab_size": len(tokenizer()), "bos_token_id": tokenizer().bos_token_id, "eos_token_id": tokenizer().eos_token_id}


def text_config(width: int, layers: int = 3, **extra: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        **SPECIAL, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=WINDOW, pad_token_id=SPECIAL["eos_token_id"], projection_dim=width, **extra,
    )  # fmt: skip


def vae(seed: int = 0, latent_channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=4, latent_channels=latent_channels, sample_size=64,
    ).eval()  # fmt: skip


def scheduler(prediction_type: str = "epsilon") -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        use_karras_sigmas=True, prediction_type=prediction_type,
    )  # fmt: skip


def sd1(
    seed: int = 0, cross_attention_dim: int = 32, in_channels: int = 4, linear: bool = False, latent_channels: int = 4
) -> StableDiffusionPipeline:  # fmt: skip
    """SD1 shape: one text encoder, convolutional projections. ``linear=True`` gives SD2's linear projections."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=latent_channels, block_out_channels=(32, 64),
        layers_per_block=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim, attention_head_dim=4, use_linear_projection=linear,
    ).eval()  # fmt: skip
    text_encoder = CLIPTextModel(text_config(cross_attention_dim)).eval()
    return StableDiffusionPipeline(
        vae=vae(seed, latent_channels), text_encoder=text_encoder, tokenizer=tokenizer(), unet=unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL shape: two text encoders (24 + 40 = 64 wide), pooled text and size conditioning."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True, cross_attention_dim=64,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 40,
    ).eval()  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(seed), unet=unet, scheduler=scheduler(),
        text_encoder=CLIPTextModel(text_config(24)).eval(), tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(40, hidden_act="gelu")).eval(), tokenizer_2=tokenizer(pad_token="!"),
    )  # fmt: skip


def save(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, folder: Path) -> Path:
    """Write the pipeline as an ordinary diffusers folder and return it."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder

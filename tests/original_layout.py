"""Write a tiny pipeline as a single file in the original layout (CompVis, Stability AI): the inverse of what loading does.

The names are those of the first releases: ``model.diffusion_model`` (U-Net), ``first_stage_model`` (VAE),
``cond_stage_model`` (text encoder of SD1: CLIP by Hugging Face, of SD2: OpenCLIP) and ``conditioner`` (SDXL: both).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"} | {
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def write(path: Path, pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> Path:
    """Write the pipeline's networks as one .safetensors file and return its path."""
    save_file(tensors_of(pipeline), path)
    return path


def tensors_of(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> Tensors:
    """All tensors of a pipeline under their original names. ``use_linear_projection`` tells SD2 from SD1."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(pipeline.vae).items()}
    if hasattr(pipeline, "text_encoder_2"):
        texts = {"conditioner.embedders.0.transformer.": clip_tensors(pipeline.text_encoder)}
        texts["conditioner.embedders.1.model."] = open_clip_tensors(pipeline.text_encoder_2)
    elif pipeline.unet.config.use_linear_projection:
        texts = {"cond_stage_model.model.": open_clip_tensors(pipeline.text_encoder)}
    else:
        texts = {"cond_stage_model.transformer.": clip_tensors(pipeline.text_encoder)}
    tensors |= {f"{prefix}{name}": tensor for prefix, part in texts.items() for name, tensor in part.items()}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def unet_tensors(unet: torch.nn.Module) -> Tensors:
    per_block = unet.config.layers_per_block + 1
    return {_unet_name(name, per_block, unet): tensor for name, tensor in unet.state_dict().items()}


def _unet_name(name: str, per_block: int, unet: torch.nn.Module) -> str:
    if "resnets" in name:
        for new, old in _RESNET.items():
            name = re.sub(rf"\b{new}\b", old, name)
    for new, old in _UNET_ENDS.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    side, block, kind, layer, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
    block, layer = int(block), int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        slot = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
        return f"output_blocks.{(block + 1) * per_block - 1}.{slot}.{rest}"
    first = "input_blocks" if side == "down" else "output_blocks"
    number = block * per_block + layer + (side == "down")
    return f"{first}.{number}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_tensors(vae: torch.nn.Module) -> Tensors:
    count, tensors = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda match: f"up.{count - 1 - int(match[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{count - 1 - int(match[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for new, old in _VAE_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # it was a 1x1 convolution
        tensors[name] = tensor
    return tensors


def clip_tensors(text_encoder: torch.nn.Module) -> Tensors:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text_encoder.state_dict().items()}


def open_clip_tensors(text_encoder: torch.nn.Module) -> Tensors:
    """OpenCLIP keeps queries, keys and values in one matrix, and the projection transposed."""
    source = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    projection = source.pop("text_projection.weight", torch.eye(text_encoder.config.hidden_size))
    tensors = {"text_projection": projection.T, "logit_scale": torch.tensor(4.6)}
    for name, tensor in source.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if match:
            layer, part, kind = match.groups()
            if part == "q":
                stacked = [source[f"encoder.layers.{layer}.self_attn.{other}_proj.{kind}"] for other in "qkv"]
                tensors[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(stacked)
            continue
        for new, old in _OPEN_CLIP.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    return tensors

"""A tiny random CLIP with both towers, as transformers saves it."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tests.tiny import pipelines


def save_clip(folder: Path, seed: int = 0, image_px: int = 32) -> Path:
    """Write the CLIP with its tokenizer into ``folder``, and return that. Features have 16 dimensions."""
    torch.manual_seed(seed)
    text = {
        **pipelines.SPECIAL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 77, "pad_token_id": pipelines.SPECIAL["eos_token_id"],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": image_px,
        "patch_size": 8,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    pipelines.tokenizer().save_pretrained(folder)
    return folder

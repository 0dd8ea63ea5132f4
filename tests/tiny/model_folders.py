"""Model folders, caches and headers as they lie on disk, with empty files for weights: what names and configs tell."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from src.errors import ExitCode, UserError

SD1 = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
}
CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
SDXL = {
    **SD1,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def model(
    folder: Path, parts: dict = SD1, pipeline: object = "StableDiffusionPipeline", dot: str = "", unet: dict | None = None
) -> Path:
    """A diffusers folder: real names, empty weights."""
    write(folder / "model_index.json", json.dumps({"_class_name": pipeline, "_diffusers_version": "0.42.1", **parts}))
    for name, value in parts.items():
        if not isinstance(value, list) or value[1] is None:
            continue
        match name.removesuffix("_2"):
            case "unet" | "vae":
                write(folder / name / "config.json", json.dumps({"_class_name": value[1], **(unet or {})}))
                write(folder / name / f"diffusion_pytorch_model{dot}.safetensors")
            case "text_encoder" | "safety_checker":
                write(folder / name / "config.json")
                write(folder / name / f"model{dot}.safetensors")
            case "tokenizer":
                write(folder / name / "vocab.json")
                write(folder / name / "merges.txt")
            case "scheduler":
                write(folder / name / "scheduler_config.json")
            case "feature_extractor":
                write(folder / name / "preprocessor_config.json")
    return folder


def cached(cache: Path, model_id: str, **options: object) -> Path:
    """The same folder as a snapshot in the layout of a Hugging Face cache."""
    storage = cache / f"models--{model_id.replace('/', '--')}"
    write(storage / "refs" / "main", COMMIT)
    return model(storage / "snapshots" / COMMIT, **options)


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A .safetensors file of zeros, written by the format's description."""
    entries, end = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        size = 1
        for item in shape:
            size *= item
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    return path


def refusal(code: ExitCode, call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert caught.value.exit_code == code, message
    assert "\n" not in message
    assert len(message) < 400, message
    return message

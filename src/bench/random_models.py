"""Model folders in the shapes of well-known models with random weights: real speed and real memory, without a download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src import files
from src.model_files import ARCHITECTURES, EMBEDDED, OF_SAFETY_CHECKER

NAMES = ("sd15", "sd21", "small-sd", "sdxl")  # folders of configs/architectures


def write(folder: Path, name: str, precision: str = "fp32") -> Path:
    """Write a diffusers folder of a model's shapes, without safety checker, with the embedded model's tokenizer.

    Numbers are normal, of deviation 0.02; one-dimensional weights are 1 and biases 0, so that activations stay finite.
    """
    import torch
    from safetensors.torch import save

    from src.base_models import DTYPES

    shapes = ARCHITECTURES / name
    index = json.loads((shapes / "model_index.json").read_bytes())
    index |= {part: [None, None] for part in index if part in OF_SAFETY_CHECKER}
    for path in shapes.glob("*/*.json"):
        _publish(folder / path.relative_to(shapes), path.read_bytes())
    for part in index:
        if part.startswith("tokenizer"):
            for path in (EMBEDDED / "tokenizer").iterdir():
                _publish(folder / part / path.name, path.read_bytes())
    torch.manual_seed(0)
    # The stock pipeline draws with the model's own scheduler; PNDM's, of some, calls the U-Net once more than it is told.
    own = json.loads((shapes / "scheduler" / "scheduler_config.json").read_bytes())
    scheduler = json.loads((EMBEDDED / "scheduler" / "scheduler_config.json").read_bytes())
    scheduler |= {"prediction_type": own.get("prediction_type", "epsilon")}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _publish(folder / "scheduler" / "scheduler_config.json", json.dumps(scheduler).encode())
    _publish(folder / "model_index.json", json.dumps(index).encode())
    for part, build in _networks(shapes, index).items():
        with torch.device("meta"):
            state = build().state_dict()
        tensors = {key: _random(key, value, DTYPES[precision]) for key, value in state.items() if value.is_floating_point()}
        if part.startswith("text_encoder"):  # the names of published files, which transformers has shortened since
            tensors = {
                key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": value
                for key, value in tensors.items()
            }
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        _publish(folder / part / f"{stem}.safetensors", save(tensors))
        del tensors
    return folder


def _networks(shapes: Path, index: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """How to build each component that has weights."""
    import diffusers
    import transformers

    networks = {}
    for part in ("unet", "vae"):
        kind = getattr(diffusers, index[part][1])
        networks[part] = lambda kind=kind, part=part: kind.from_config(kind.load_config(shapes / part))
    for part in ("text_encoder", "text_encoder_2"):
        if part in index:
            kind = getattr(transformers, index[part][1])
            config = kind.config_class.from_pretrained(shapes / part)
            networks[part] = lambda kind=kind, config=config: kind(config)
    return networks


def _random(name: str, like: Any, dtype: Any) -> Any:
    import torch

    if like.ndim > 1:
        return torch.empty(like.shape, dtype=dtype).normal_(std=0.02)
    return torch.full(like.shape, float(name.endswith("weight")), dtype=dtype)


def _publish(path: Path, content: bytes) -> None:
    files.check_writable_folder(path.parent)
    files.publish_bytes(path, content)

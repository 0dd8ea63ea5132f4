"""A whole model as the files of a diffusers folder, half precision, each made piece by piece while it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.base_models import TOKENIZERS, LoadedModel
from src.files import Stream
from src.model_files import WEIGHT_STEMS
from src.training.tensor_stream import streamed

LARGEST_FP16 = torch.finfo(torch.float16).max
# What transformers names without this level since 5.6, while other versions and programs look for it.
CLIP_LEVEL = "text_model."


def model_contents(model: LoadedModel, unet: Mapping[str, Tensor], say: Callable[[str], None]) -> dict[str, bytes | Stream]:
    """Every file of the folder, by name. ``unet``: the tensors of the U-Net; everything else is as it was loaded.

    There is no safety checker in it. A component with numbers beyond the range of fp16 is kept in fp32, and one with finer
    numbers is rounded; both are said (of the U-Net by the caller, who knows what of it learnt).
    """
    pipeline = model.pipeline
    names = [
        name for name in (*WEIGHT_STEMS, *TOKENIZERS) if name != "safety_checker" and getattr(pipeline, name, None) is not None
    ]
    contents: dict[str, bytes | Stream] = {}
    for name in names:
        part = getattr(pipeline, name)
        if name in TOKENIZERS:
            contents |= {f"{name}/{path.name}": path.read_bytes() for path in _tokenizer_files(Path(part.name_or_path))}
            continue
        tensors = unet if name == "unet" else _tensors(part)
        dtype = torch.float16
        if largest := next((key for key, item in tensors.items() if item.abs().max() > LARGEST_FP16), None):
            say(f"save    {name}.{largest} is beyond the range of fp16; the {name} is saved in fp32")
            dtype = torch.float32
        elif name != "unet" and not all(torch.equal(item, item.half().to(item.dtype)) for item in tensors.values()):
            say(f"save    the {name} is stored finer than fp16; it is saved rounded to fp16")
        contents[f"{name}/config.json"] = _config(part)
        contents[f"{name}/{WEIGHT_STEMS[name]}.safetensors"] = streamed(tensors, dtype)
    scheduler = json.loads(pipeline.scheduler.to_json_string()) | {
        key: model.scheduler_config[key] for key in ("rescale_betas_zero_snr",) if key in model.scheduler_config
    }
    contents["scheduler/scheduler_config.json"] = _json(scheduler)
    contents["model_index.json"] = _json(_index(pipeline))
    return contents


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = module.state_dict()
    if type(module).__name__ == "CLIPTextModel" and not any(name.startswith(CLIP_LEVEL) for name in tensors):
        return {CLIP_LEVEL + name: tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _config(part: Any) -> bytes:
    """A component's configuration, without the path that it was loaded from."""
    if hasattr(part, "to_json_string"):  # diffusers
        return _json({key: value for key, value in json.loads(part.to_json_string()).items() if key != "_name_or_path"})
    # Transformers loads in the precision that stands here and diffusers in fp32: plain pipelines want both to be the same.
    facts = {**json.loads(part.config.to_json_string()), "dtype": "float32"}
    return _json({key: value for key, value in facts.items() if key != "_name_or_path"})


def _index(pipeline: Any) -> dict[str, Any]:
    """What ``model_index.json`` says: the class of the pipeline and of each component."""
    facts = {key: value for key, value in json.loads(pipeline.to_json_string()).items() if key != "_name_or_path"}
    return facts | {name: [None, None] for name in ("safety_checker", "feature_extractor") if name in facts}


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n"

"""What is said of a training in the headers of its adapter, and what a resume compares."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from torch import nn

from src import files
from src.base_models import LoadedModel
from src.dataset import Dataset
from src.lora.headers import ZERO_TERMINAL_SNR
from src.lora.writing import AdapterFacts
from src.train_config import TrainRun

MAX_TAGS = 200  # in an adapter's header


def adapter_facts(run: TrainRun, model: LoadedModel, dataset: Dataset) -> AdapterFacts:
    """The headers of the adapter's files."""
    train = run.train
    return AdapterFacts(
        family=model.family,
        name=train.name or dataset.trigger or Path(train.output_dir).resolve().name,
        trigger=dataset.trigger,
        resolution_px=train.resolution or model.native_size_px,
        base_model=model.name,
        base_sha256=weights_sha256(run, model),
        prediction_type=model.scheduler_config.get("prediction_type", "epsilon"),
        extra=_kohya_facts(dataset)
        | ({ZERO_TERMINAL_SNR: "True"} if model.scheduler_config.get("rescale_betas_zero_snr") else {}),
    )


def _kohya_facts(dataset: Dataset) -> dict[str, str]:
    """What A1111 shows of the pictures, and proposes prompts from: how often each comma-separated part of a caption occurs."""
    folders: dict[str, dict[str, int]] = {}
    for example in dataset.train:
        folder = folders.setdefault(example.path.resolve().parent.name, {"n_repeats": example.repeats, "img_count": 0})
        folder["img_count"] += 1
    name = dataset.folder.resolve().name
    captions = [caption for example in dataset.train for caption in example.captions]
    tags = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    return {
        "ss_tag_frequency": json.dumps({name: dict(tags.most_common(MAX_TAGS))}, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps(folders, ensure_ascii=False),
        "ss_num_train_images": str(sum(example.repeats for example in dataset.train)),
    }


def weights_sha256(run: TrainRun, model: LoadedModel) -> str:
    """Of the model's file, or the (first) one of its U-Net."""
    return files.sha256_of(model.weights_path, run.paths.folder("cache") / "hashes.json")


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a model's tensors, names included: another model, precision or a changed file is another digest."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def machine_facts(model: LoadedModel, processes: int) -> dict[str, Any]:
    """What bit-equality after a resume depends on beside the settings."""
    return {
        "torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__,
        "python": platform.python_version(), "device": model.device_name, "precision": model.precision,
        "threads": torch.get_num_threads(), "processes": processes,
    }  # fmt: skip

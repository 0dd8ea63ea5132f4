"""accelerate: one process or many, which device, which precision; and what a run comes to in steps."""

from __future__ import annotations

import importlib.util
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from src import base_models
from src.base_models import LoadedModel
from src.errors import usage_error
from src.processes import from_environment
from src.train_config import DEFAULT_STEPS, TrainRun

# While one process encodes, draws or judges the others wait: longer than the ten minutes after which NCCL gives up.
PATIENCE = timedelta(days=7)


def build_accelerator(run: TrainRun) -> Accelerator:
    """The engine: one process or many, which device, which precision. Raises UserError (usage)."""
    for name in ("DeepSpeed", "FSDP", "Megatron_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true"):
            raise usage_error(
                f"accelerate's configuration asks for {name}, which splits the model; a training here needs the whole "
                "one on each card: use accelerate launch --multi_gpu"
            )
    device = base_models.pick_device(run.model.device)
    if device.type == "mps":
        _check_mac(run)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a single process trains on the current card, whatever was asked for
    precision = _mixed_precision(run, device)
    # Gradients lie in the buckets that are exchanged, not beside them; buffers are constants, equal everywhere.
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    options: dict[str, Any] = {"kwargs_handlers": [InitProcessGroupKwargs(timeout=PATIENCE), parallel]}
    if run.train.tracker:
        if importlib.util.find_spec(run.train.tracker) is None:
            raise usage_error(f"tracker {run.train.tracker} is not installed; pip install {run.train.tracker}")
        options |= {"log_with": run.train.tracker, "project_dir": str(Path(run.train.output_dir).expanduser() / "tracker")}
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu", **options)
    if run.train.tracker:
        accelerator.init_trackers(
            run.door.removeprefix("src."), config={key: str(value) for key, value in run.to_dict()["train"].items()}
        )
    return accelerator


def _check_mac(run: TrainRun) -> None:
    """Raises UserError (usage) for what torch or bitsandbytes cannot do on an Apple GPU."""
    if run.train.optimizer == "adamw8bit":
        raise usage_error("optimizer adamw8bit has no code for a Mac; use --optimizer adamw or adafactor")
    if run.train.quantize:
        raise usage_error(f"--quantize {run.train.quantize} needs an NVIDIA card; leave it out")
    if getattr(run.train, "dropout", 0) and run.train.gradient_checkpointing is not False:
        raise usage_error(  # what is computed again would draw another mask (pytorch#127676)
            "--dropout with gradient checkpointing learns wrong on a Mac; add --no-gradient-checkpointing, or use --dropout 0"
        )


def _mixed_precision(run: TrainRun, device: torch.device) -> str:
    """What autocast computes in: as asked for, else as the frozen weights, else what the device is good at."""
    frozen = {"fp32": "no"}.get(run.model.precision, run.model.precision)
    precision = frozen if run.train.mixed_precision == "auto" else run.train.mixed_precision
    if precision == "auto":
        picked = base_models.pick_dtype("auto", device)
        precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "no"}[picked]
        if device.type == "cuda" and _has_bf16(device):
            precision = "bf16"  # the range of float32: no scaler, no overflow
        if device.type == "mps":
            precision = "no"
    if precision == "bf16" and device.type == "cuda" and not _has_bf16(device):
        raise usage_error(
            f"{torch.cuda.get_device_name(device)} only imitates bf16, slowly and without fused attention; "
            "use --mixed_precision fp16 or no"
        )
    if precision == "fp16" and device.type == "cpu":
        raise usage_error("mixed_precision fp16 needs a graphics card; use bf16 or no on a CPU")
    if frozen == "fp16" and precision != "fp16":
        raise usage_error(
            f"model.precision fp16 with mixed_precision {precision}: small gradients would vanish without fp16's scaler; leave "
            "model.precision out, or use --mixed_precision fp16"
        )
    return precision


def _has_bf16(device: torch.device) -> bool:
    """Whether the card computes in bf16; of several processes, all cards: one's scaled gradients would meet the others'."""
    if torch.version.hip is not None:
        return True
    cards = range(torch.cuda.device_count()) if from_environment().are_several else [device]
    return all(torch.cuda.get_device_capability(card) >= (8, 0) for card in cards)


def autocast_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def size_step_px(model: LoadedModel) -> int:
    """What a picture's sides must be multiples of, so that the U-Net can halve its latents at each level."""
    return model.pipeline.vae_scale_factor * 2 ** (len(model.pipeline.unet.config.block_out_channels) - 1)


def total_steps(run: TrainRun, batches_per_epoch: int) -> int:
    """``max_steps``, or what ``num_epochs`` come to, rounded up."""
    train = run.train
    if train.num_epochs is not None:
        return math.ceil(train.num_epochs * batches_per_epoch / train.gradient_accumulation_steps)
    return train.max_steps or DEFAULT_STEPS

"""The state of a training as files of a checkpoint, and the way back: live tensors, their average, the optimizer, numbers.

Nothing in it names code; what is read back is checked first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from src.checkpoints import Checkpoint
from src.errors import ExitCode, UserError, refused
from src.files import Stream
from src.training.loop import Progress
from src.training.network import MovingAverage
from src.training.optimizers import pack_state, unpack_state

AVERAGE = "state/average.safetensors"
OPTIMIZER = "state/optimizer.safetensors"
NUMBERS = "state/numbers.json"
File = TypeVar("File", bytes, Stream)


class Holder(Protocol):
    """Who has what a state consists of."""

    network: Any  # LoraNetwork, UnetNetwork
    average: MovingAverage | None
    optimizer: Any
    scaler: Any  # of fp16, or None


def state_contents(
    held: Holder, live_name: str, progress: Progress, pack: Callable[[Mapping[str, Tensor]], File]
) -> dict[str, File | bytes]:
    """The files of a state; the live tensors go into ``live_name``. ``pack``: tensors -> a .safetensors file."""
    tensors, text = pack_state(held.optimizer)
    scaler = held.scaler.state_dict() if held.scaler is not None else None
    has_average = held.average is not None
    numbers = {"progress": asdict(progress), "optimizer": text, "scaler": scaler, "has_average": has_average}
    contents: dict[str, File | bytes] = {
        live_name: pack(held.network.trainable()),
        OPTIMIZER: pack(tensors),
        NUMBERS: json.dumps(numbers).encode(),
    }
    return contents if held.average is None else contents | {AVERAGE: pack(held.average.tensors)}


def restore_state(held: Holder, live_name: str, checkpoint: Checkpoint, read: Callable[[str], dict[str, Tensor]]) -> Progress:
    """Bring everything to where the checkpoint was written. ``read``: a .safetensors file of it -> tensors.

    Raises UserError (refused) when it is of another training.
    """
    try:
        held.network.load(read(live_name))
        numbers = json.loads(checkpoint.read(NUMBERS))
        unpack_state(held.optimizer, read(OPTIMIZER), numbers["optimizer"])
        if held.average is not None:
            begun = numbers["has_average"]  # where --force has turned it on, it begins here
            average = read(AVERAGE if begun else live_name)
            held.average.tensors = {name: average[name].to(item.device) for name, item in held.average.tensors.items()}
        if held.scaler is not None and numbers["scaler"] is not None:
            held.scaler.load_state_dict(numbers["scaler"])
        progress = Progress(**numbers["progress"])
        if progress.step != checkpoint.step:
            raise ValueError("its parts are those of different steps")
        return progress
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:160]
        raise refused(
            f"{checkpoint.folder}: is a checkpoint of another training ({cause}); start anew with another --output_dir"
        ) from None


def refuse_not_finite(held: Holder, step: int, what: str) -> None:
    """Raises UserError (diverged) if a number that would be saved is none. ``what`` learns, in a word."""
    tensors = dict(held.network.trainable()) | ({} if held.average is None else held.average.tensors)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"step {step}: the {what} holds NaN or infinity ({name}); nothing was written, the last checkpoint is "
                "kept; lower --lr, or use --mixed_precision no",
                ExitCode.DIVERGED,
            )


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what YAML can write without tags."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

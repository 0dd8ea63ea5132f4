"""What a checkpoint of a fine-tuning holds, the way back, and the model folders that are made of it.

``checkpoint-N/`` holds ``config.yaml`` and ``state/``: the part that learns as it is, its average, the optimizer, and numbers.
``final/`` and ``best/`` are whole diffusers folders, of the moving average where there is one. A full model's state is
several times the model, so every file is written tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor

from src import base_models
from src.base_models import LoadedModel
from src.checkpoints import Checkpoint, CheckpointFolder
from src.files import Stream
from src.finetune_config import FinetuneRun
from src.model_weights import read_tensors
from src.training import state
from src.training.loop import Progress
from src.training.model_folder import model_contents
from src.training.network import MovingAverage
from src.training.tensor_stream import streamed
from src.training.unet_network import UnetNetwork

WEIGHTS = "state/weights.safetensors"
PREFIX = "unet."


@dataclass(slots=True)
class ModelSaver:
    """Writes checkpoints and models of one fine-tuning and restores it."""

    store: CheckpointFolder
    run: FinetuneRun
    model: LoadedModel
    network: UnetNetwork
    average: MovingAverage | None
    optimizer: Any
    scaler: Any  # of fp16, or None
    run_facts: dict[str, Any]  # what a resume compares: dataset, model, versions
    say: Callable[[str], None]
    said: set[str] = field(default_factory=set)

    def save(self, progress: Progress) -> Checkpoint:
        """Write ``checkpoint-<step>``. Raises UserError."""
        state.refuse_not_finite(self, progress.step, "model")
        contents = state.state_contents(self, WEIGHTS, progress, streamed)
        facts = {"run": self.run.to_dict(), **self.run_facts}
        return self.store.save(progress.step, {"config.yaml": self._settings(), **contents}, facts)

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Bring everything to where the checkpoint was written. Raises UserError (refused) when it is of another training."""
        return state.restore_state(self, WEIGHTS, checkpoint, lambda name: read_tensors(checkpoint.verified(name), None))

    def result(self, step: int) -> dict[str, bytes | Stream]:
        """The model as it is now: of the moving average, where there is one."""
        return self._model(dict(self.network.trainable() if self.average is None else self.average.tensors))

    def result_of(self, checkpoint: Checkpoint) -> dict[str, bytes | Stream]:
        """The model as it was at a checkpoint. Raises UserError (refused) for a damaged one."""
        name = state.AVERAGE if state.AVERAGE in checkpoint.files else WEIGHTS
        return self._model(read_tensors(checkpoint.verified(name), torch.float16))

    def _model(self, learnt: dict[str, Tensor]) -> dict[str, bytes | Stream]:
        """What did not learn is rounded from the disk to fp16, and not from what it was rounded to to be computed with."""
        learnt = {name.removeprefix(PREFIX): tensor for name, tensor in learnt.items()}
        names = list(self.network.models["unet"].state_dict())
        frozen = {} if len(learnt) == len(names) else base_models.unet_tensors(self.model, torch.float16)
        if frozen and base_models.unet_is_finer_than_fp16(self.model):
            self._say_once("save    the unet is stored finer than fp16; what did not learn is saved rounded to fp16")
        tensors = {name: learnt[name] if name in learnt else frozen[name] for name in names}
        return {"config.yaml": self._settings(), **model_contents(self.model, tensors, self._say_once)}

    def _say_once(self, line: str) -> None:
        """``best/`` is made again and again."""
        if line not in self.said:
            self.said.add(line)
            self.say(line)

    def _settings(self) -> bytes:
        return yaml.safe_dump(state.plain(self.run.to_dict()), sort_keys=False, allow_unicode=True).encode()

"""What a checkpoint holds, and the way back: the adapter in the forms that other programs read, and the state to go on from.

``checkpoint-N/`` holds the adapter (of the moving average, if there is one), ``config.yaml``, and ``state/``: the live
tensors, the average, the optimizer, and numbers. Nothing in it names code; what is read back is checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from src.base_models import LoadedModel
from src.checkpoints import Checkpoint, CheckpointFolder
from src.errors import UserError
from src.lora.formats import LoraLayer, Where
from src.lora.names import canonical
from src.lora.reading import parse_adapter, read_adapter
from src.lora.stack import AdapterStack
from src.lora.writing import AdapterFacts, adapter_files
from src.train_config import TrainRun
from src.training import state
from src.training.batches import TextInput, predict
from src.training.loop import Progress
from src.training.network import LoraNetwork, MovingAverage
from src.training.state import NUMBERS as NUMBERS
from src.training.state import OPTIMIZER as OPTIMIZER

ADAPTER = "state/adapter.safetensors"
PROBE_PX = 64  # latents a side are an eighth: the smallest that every U-Net takes


@dataclass(slots=True)
class Saver:
    """Writes checkpoints of one run and restores them."""

    store: CheckpointFolder
    run: TrainRun
    model: LoadedModel
    network: LoraNetwork
    average: MovingAverage | None
    optimizer: Any
    scaler: Any  # of fp16, or None
    facts: AdapterFacts
    run_facts: dict[str, Any]  # what a resume compares: dataset, model, versions

    def save(self, progress: Progress) -> Checkpoint:
        """Write ``checkpoint-<step>``, and prove that its adapter reads back and draws as the live one. Raises UserError."""
        state.refuse_not_finite(self, progress.step, "adapter")
        adapter = self.adapter_contents(progress.step)
        self.check_forms(adapter)
        contents = adapter | self._state(progress)
        checkpoint = self.store.save(progress.step, contents, {"run": self.run.to_dict(), **self.run_facts})
        self.check_reads_back(checkpoint.folder)
        return checkpoint

    def adapter_contents(self, step: int) -> dict[str, bytes]:
        """The adapter in every form that was asked for, and the settings it was trained with."""
        formats = {"diffusers", "peft"} | ({"kohya"} if self.run.train.format == "kohya" else set())
        facts = AdapterFacts(**{item.name: getattr(self.facts, item.name) for item in fields(self.facts)} | {"steps": step})
        contents = adapter_files(self._layers(), facts, formats)
        return contents | {
            "config.yaml": yaml.safe_dump(state.plain(self.run.to_dict()), sort_keys=False, allow_unicode=True).encode()
        }

    def _layers(self) -> dict[Where, LoraLayer]:
        """What is saved: the moving average, where there is one."""
        return self.network.layers(None if self.average is None else self.average.tensors)

    def result(self, step: int) -> dict[str, bytes]:
        """What is published at the end."""
        return self.adapter_contents(step)

    def result_of(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """The adapter as it was at a checkpoint. Raises UserError (refused) for a damaged one."""
        return {name: checkpoint.read(name) for name in checkpoint.files if not name.startswith("state/")}

    def _state(self, progress: Progress) -> dict[str, bytes]:
        return state.state_contents(self, ADAPTER, progress, _pack)

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Bring everything to where the checkpoint was written. Raises UserError (refused) when it is of another training."""
        return state.restore_state(self, ADAPTER, checkpoint, lambda name: safetensors.torch.load(checkpoint.read(name)))

    def check_forms(self, contents: Mapping[str, bytes]) -> None:
        """Read every form out of its bytes: the same layers, number by number, at the same strength. Raises UserError."""
        live = _named(self._layers())
        for form, found in parse_adapter(contents).items():
            layers = _named(found)
            if layers.keys() != live.keys() or not all(_draws_as(layers[where], live[where]) for where in live):
                raise UserError(
                    f"the adapter's {form} form does not read back as what was trained; nothing was written, the last "
                    "checkpoint is kept; this is a fault of the program, please report it"
                )

    @torch.no_grad()
    def check_reads_back(self, folder: Path) -> None:
        """Read the adapter as the generator would, and compare one U-Net output with the live one. Raises UserError.

        The tensors are compared first, number by number; the output, in the run's precision, proves that names, alpha and
        scale mean the same to the reader as to the trainer.
        """
        adapter = read_adapter(folder)
        trainable = self.network.trainable()
        swapped = nullcontext() if self.average is None else self.average.swapped_in(trainable)
        unet = self.network.models["unet"]
        was_training = unet.training
        unet.eval()
        try:
            with swapped:
                live = self._probe()
                with self.network.taken_off():
                    base = self._probe()
                    parts = {name: getattr(self.model.pipeline, name, None) for name in self.network.models}
                    stack = AdapterStack(SimpleNamespace(**parts), self.model.family)
                    stack.set([(adapter, 1.0)])
                    reread = self._probe()
                    stack.clear()
        finally:
            unet.train(was_training)
        effect, error = (live - base).norm(), (live - reread).norm()
        rounding = (1e-4 if self.model.dtype == torch.float32 else 3e-2) * live.norm()
        if error > 0.1 * effect + rounding:
            raise UserError(
                f"{folder}: the adapter that was written does not draw as the live one does (difference {error:.3g}, its "
                f"effect {effect:.3g}); this is a fault of the program, please report it; the training's state is saved"
            )

    def _probe(self) -> Tensor:
        """The U-Net's output for one fixed input, float32 on the CPU."""
        unet = self.network.models["unet"]
        parameter = next(iter(self.network.trainable().values()))
        source = torch.Generator().manual_seed(0)
        config, device = unet.config, parameter.device
        side = PROBE_PX // 8

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source).to(device, self.model.dtype)

        text = TextInput(draw(1, 77, config.cross_attention_dim))
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            text.pooled, text.time_ids = draw(1, pooled), torch.tensor([[PROBE_PX] * 6], device=device)
        latents = draw(1, config.in_channels, side, side)
        with torch.autocast(device.type, self.model.dtype, enabled=self.model.dtype != torch.float32):
            output = predict(unet, latents, torch.tensor([500], device=device), text)
        return output.float().cpu()


def _named(layers: Mapping[Where, LoraLayer]) -> dict[Where, LoraLayer]:
    """The layers by the one name that every form's can be translated to."""
    return {(component, canonical(component, name)): layer for (component, name), layer in layers.items()}


def _draws_as(layer: LoraLayer, live: LoraLayer) -> bool:
    """Whether both add the same: diffusers' form has the scale multiplied into ``up``, the others beside it."""
    one, other = layer.magnitude, live.magnitude
    return (
        layer.down.numel() == live.down.numel()
        and torch.equal(layer.down.flatten(), live.down.flatten())
        and torch.allclose(layer.up.flatten() * layer.scale, live.up.flatten() * live.scale, rtol=1e-5, atol=0)
        and (one is other if one is None or other is None else torch.equal(one.flatten(), other.flatten()))
    )


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

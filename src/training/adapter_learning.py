"""What is the adapter's own in a training: how it is put in, saved and spoken of. Its sibling: unet_learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from src.base_models import LoadedModel
from src.checkpoints import CheckpointFolder
from src.config import AppConfig
from src.dataset import Dataset
from src.terminal import shell_word
from src.train_config import TrainRun, learning_rates
from src.training.engine import autocast_dtype
from src.training.facts import adapter_facts
from src.training.network import LoraNetwork, MovingAverage
from src.training.saving import Saver
from src.training.speed import prepare_for_speed

COPIES = 6  # of the adapter in a checkpoint: diffusers', PEFT's, what goes on, and two moments of the optimizer, and one spare


class AdapterLearning:
    """A LoRA learns, the model is frozen."""

    def __init__(self, run: TrainRun) -> None:
        self.run = run

    def settle(self) -> None:
        """Decide what was left open."""
        train = self.run.train
        train.learning_rate = learning_rates(train)["unet"]
        train.alpha = float(train.rank) if train.alpha is None else train.alpha

    def settle_steps(self, steps: int) -> None:
        """The same, once it is known how many steps there are."""

    def loading(self, config: AppConfig) -> AppConfig:
        """How the model is to be loaded."""
        return config

    def frozen_precision(self, model: LoadedModel) -> str:
        """Of the weights that do not learn: fp16 | bf16 | fp32."""
        return model.precision

    def build(self, model: LoadedModel, accelerator: Any) -> LoraNetwork:
        """Put in what learns, on the device."""
        train, device, unet = self.run.train, accelerator.device, model.pipeline.unet
        if train.quantize:
            from src.quantization import check_card, quantize_unet

            check_card(train.quantize, device)
            quantize_unet(unet, train.quantize)
        unet.to(device).train()
        models: dict[str, nn.Module] = {"unet": unet}
        if train.train_text_encoder:
            for name in ("text_encoder", "text_encoder_2"):
                if (encoder := getattr(model.pipeline, name, None)) is not None:
                    models[name] = encoder.to(device).train()
        network = LoraNetwork(models, train, computes_in=autocast_dtype(accelerator))
        prepare_for_speed(unet)
        return network

    def space_bytes(self, network: LoraNetwork, model: LoadedModel) -> int:
        """What a checkpoint needs of the disk, at most."""
        return COPIES * sum(4 * parameter.numel() for parameter in network.trainable().values())

    def saver(
        self, store: CheckpointFolder, model: LoadedModel, network: LoraNetwork, average: MovingAverage | None,
        optimizer: Any, scaler: Any, dataset: Dataset, run_facts: dict[str, Any],
    ) -> Saver:  # fmt: skip
        """Who writes checkpoints and the result."""
        facts = adapter_facts(self.run, model, dataset)
        return Saver(store, self.run, model, network, average, optimizer, scaler, facts, run_facts)

    def line(self, network: LoraNetwork) -> str:
        """What learns, in words."""
        train = self.run.train
        numbers = sum(parameter.numel() for parameter in network.trainable().values())
        learns = "U-Net and text encoders" if train.train_text_encoder else "U-Net"
        return f"adapter rank {train.rank}, {train.targets}, {numbers:,} numbers ({learns})"

    def notes(self) -> list[str]:
        """What the user should know of the settings."""
        if self.run.train.use_dora and self.run.train.format == "kohya":
            return ["format  A1111 and ComfyUI draw a DoRA of this kind otherwise; for those, train without --dora"]
        return []

    def size_words(self) -> str:
        """What memory depends on beside the pictures."""
        return f"rank {self.run.train.rank}"

    def way_out(self) -> str:
        """The next smaller thing to try when memory has run out with gradient checkpointing and single pictures."""
        return "use a smaller --resolution" if self.run.train.quantize else "use --quantize nf4, or a smaller --resolution"

    def draw_command(self, final: Path, prompt: str) -> str:
        """How to draw with the result."""
        model = self.run.model.model_id
        of_model = "" if model == TrainRun().model.model_id else f" --model {shell_word(model)}"
        return f"python main.py {shell_word(prompt)} --lora {shell_word(str(final))}{of_model}"

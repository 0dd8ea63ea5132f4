"""What is a fine-tuning's own in a training: which weights learn, how they are saved and spoken of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.base_models import LoadedModel
from src.checkpoints import CheckpointFolder
from src.config import AppConfig
from src.dataset import Dataset
from src.finetune_config import USUAL_VERSIONS, USUAL_WARMUP, FinetuneRun
from src.terminal import shell_word
from src.training.engine import autocast_dtype
from src.training.learning_layers import exchange_learning_layers
from src.training.model_saving import ModelSaver
from src.training.network import MovingAverage
from src.training.speed import prepare_for_speed
from src.training.unet_network import UnetNetwork
from src.training_memory import OPTIMIZER_BYTES

USUAL_LEARNING_RATE = 1e-5


class UnetLearning:
    """The weights of the U-Net, or of a part of it, learn; VAE and text encoders are frozen."""

    def __init__(self, run: FinetuneRun) -> None:
        self.run = run

    def settle(self) -> None:
        """Decide what was left open."""
        train = self.run.train
        if train.learning_rate is None:
            train.learning_rate = 1.0 if train.optimizer == "prodigy" else USUAL_LEARNING_RATE
        if train.versions is None:
            train.versions = USUAL_VERSIONS if train.crop or train.colour else 1

    def settle_steps(self, steps: int) -> None:
        """The same, once it is known how many steps there are."""
        if self.run.train.lr_warmup_steps is None:
            self.run.train.lr_warmup_steps = steps // USUAL_WARMUP

    def loading(self, config: AppConfig) -> AppConfig:
        """How the model is to be loaded: with every bit, for these are the weights that are saved in the end."""
        config.model.precision = "fp32"
        return config

    def frozen_precision(self, model: LoadedModel) -> str:
        """Of the U-Net's weights that do not learn: fp16 | bf16 | fp32."""
        return self.run.model.precision

    def build(self, model: LoadedModel, accelerator: Any) -> UnetNetwork:
        """Let the part learn, on the device."""
        train, unet = self.run.train, model.pipeline.unet
        computes_in = autocast_dtype(accelerator)
        network = UnetNetwork(unet, train.part, train.learning_rate, computes_in)
        unet.to(accelerator.device).train()
        exchange_learning_layers(unet, computes_in)
        prepare_for_speed(unet, computes_in)
        return network

    def space_bytes(self, network: UnetNetwork, model: LoadedModel) -> int:
        """What a checkpoint and the model, beside the one that it replaces, need of the disk, at most."""
        pipeline = model.pipeline
        parts = [getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")]
        whole = sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())
        learning = sum(parameter.numel() for parameter in network.trainable().values())
        average = 0 if self.run.train.ema_decay is None else 4
        return learning * (4 + average + OPTIMIZER_BYTES[self.run.train.optimizer]) + 2 * 2 * whole

    def saver(
        self, store: CheckpointFolder, model: LoadedModel, network: UnetNetwork, average: MovingAverage | None,
        optimizer: Any, scaler: Any, dataset: Dataset, run_facts: dict[str, Any],
    ) -> ModelSaver:  # fmt: skip
        """Who writes checkpoints and the result."""
        return ModelSaver(store, self.run, model, network, average, optimizer, scaler, run_facts, store.say)

    def line(self, network: UnetNetwork) -> str:
        """What learns, in words."""
        train = self.run.train
        numbers = sum(parameter.numel() for parameter in network.trainable().values())
        whole = sum(parameter.numel() for parameter in network.models["unet"].parameters())
        average = "" if train.ema_decay is None else f", averaged ({train.ema_decay:g})"
        return f"learns  {train.part}, {numbers:,} of the U-Net's {whole:,} numbers{average}"

    def notes(self) -> list[str]:
        """What the user should know of the settings."""
        train = self.run.train
        found = []
        if train.versions > 1:
            found.append(f"data    {train.versions} versions of each picture (crop {train.crop:g}, colour {train.colour:g})")
        if train.ema_decay is not None:
            found.append("save    final/, best/, the samples and the validation loss are of the moving average")
        return found

    def size_words(self) -> str:
        """What memory depends on beside the pictures."""
        return f"--train {self.run.train.part}"

    def way_out(self) -> str:
        """The next smaller thing to try when memory has run out with gradient checkpointing and single pictures."""
        smaller = "--train cross-attention" if self.run.train.part == "all" else "--optimizer adafactor"
        return f"use {smaller}, or a smaller --resolution"

    def draw_command(self, final: Path, prompt: str) -> str:
        """How to draw with the result."""
        return f"python main.py {shell_word(prompt)} --model {shell_word(str(final))}"

"""The memory of one training: the plan it begins with, what its steps took, and how it goes on where the plan was wrong.

The ladder: gradient checkpointing, where that was left open; then each batch in halves, one after the other, whose gradients
add up to those of the whole. A step that ran out of memory is done again from its start, from the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn

from src import devices, optimizations
from src.base_models import LoadedModel
from src.config import OptimizationConfig
from src.errors import ExitCode, UserError
from src.measured_peaks import MeasuredPeaks
from src.model_shapes import read_shapes
from src.train_config import TrainRun
from src.training_memory import TrainingNeed
from src.training_plan import TrainingPlan, choose, describe, kind_of

if TYPE_CHECKING:
    from src.training.trainer import Learning

MEASURED_STEP = 2  # of a session: the first one still makes the optimizer's numbers


class TrainingMemory:
    """``checkpoints_gradients`` and ``parts`` (of a batch, one after the other) are what stands now."""

    def __init__(self, run: TrainRun, learning: Learning, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self.checkpoints_gradients, self.parts = bool(run.train.gradient_checkpointing), 1
        self._run, self._learning, self._accelerator, self._say = run, learning, accelerator, say
        self._peaks = MeasuredPeaks(run.paths.folder("cache"), say)
        self._budget_bytes: int | None = None
        self._plan: TrainingPlan | None = None
        self._key = ""
        self._models: Mapping[str, nn.Module] = {}
        self._steps = 0

    def ask(self) -> None:
        """How much there is; before anything is loaded, since the plan counts the weights itself."""
        if self._accelerator.device.type == "cpu":
            self._budget_bytes = devices.available_memory_bytes()
        else:
            options = OptimizationConfig(max_vram_gb=self._run.train.max_vram_gb)
            self._budget_bytes = optimizations.memory_budget(self._accelerator.device, options)

    def plan(self, model: LoadedModel) -> None:
        """Decide whether activations are computed twice rather than kept: as the user says, or as the memory asks for."""
        shapes, train = read_shapes(model.config_folder), self._run.train
        need = TrainingNeed.of(train, model.native_size_px, self._learning.frozen_precision(model))
        asked = replace(need, gradient_checkpointing=None, samples=False)  # a step needs the same, whatever is chosen there
        parts = (
            "training", model.device_name, model.name, sum(shapes.parameters.values()), *astuple(asked),
            train.mixed_precision, train.gradient_accumulation_steps > 1, getattr(train, "dropout", 0), train.masked_loss,
        )  # fmt: skip
        self._key = " | ".join(map(str, parts))
        on_card = self._accelerator.device.type != "cpu"
        self._plan = choose(shapes, need, self._budget_bytes, on_card=on_card, measured=self._peaks.of(self._key))
        self._say(f"plan    {describe(self._plan)}")
        self.checkpoints_gradients = bool(self._plan.need.gradient_checkpointing)

    def watch(self, models: Mapping[str, nn.Module]) -> None:
        """The models that a step goes through."""
        self._models = models
        if self.checkpoints_gradients:
            self._enable_checkpointing()

    def begin_step(self) -> None:
        """Before a step, and before it is done again."""
        if self._steps == MEASURED_STEP - 1:
            optimizations.reset_peak(self._accelerator.device, clean=True)

    def end_step(self) -> None:
        """After a step: what it took of a card is remembered for the next plan."""
        self._steps += 1
        if self._steps == MEASURED_STEP and self.parts == 1 and self._plan is not None:
            peak_bytes = optimizations.peak_bytes(self._accelerator.device)
            if peak_bytes is not None and self._accelerator.is_main_process:
                self._peaks.remember(self._key, kind_of(self.checkpoints_gradients), peak_bytes)

    def step_down(self, step: int, batch_size: int) -> None:
        """Go on with less, after a step of batches of ``batch_size`` ran out. Raises UserError where there is no less."""
        optimizations.free_memory()
        self._remember_failure()
        if self._accelerator.num_processes > 1:  # the others wait for this one's gradients of this very step
            raise self.ran_out(step)
        if not self.checkpoints_gradients and self._run.train.gradient_checkpointing is None:
            self._say(f"memory  ran out in step {step}; going on with gradient checkpointing, which takes longer")
            self.checkpoints_gradients = True
            self._enable_checkpointing()
        elif self.parts < batch_size:
            self.parts = min(2 * self.parts, batch_size)
            self._say(f"memory  ran out in step {step}; going on with each batch in {self.parts} parts, one after the other")
        else:
            raise self.ran_out(step)
        self._steps = 0

    def ran_out(self, step: int, is_encoding: bool = False) -> UserError:
        """Out of memory, with the next smaller thing to try."""
        train = self._run.train
        resolution = f"resolution {train.resolution}" if train.resolution else "the model's own resolution"
        size = f"step {step}, {resolution}, batch size {train.batch_size}, {self._learning.size_words()}"
        if is_encoding:
            way_out = "use a smaller --resolution"
        elif not self.checkpoints_gradients:
            way_out = "use --gradient_checkpointing"
        elif train.batch_size > 1 and self.parts == 1:
            way_out = f"use --batch_size 1 --gradient_accumulation {train.batch_size}"
        else:
            way_out = self._learning.way_out()
        return UserError(f"out of memory ({size}); {way_out}", ExitCode.OUT_OF_MEMORY)

    def _remember_failure(self) -> None:
        if self._accelerator.device.type == "cpu" or self._plan is None or self._budget_bytes is None or self.parts > 1:
            return
        kind = kind_of(self.checkpoints_gradients)  # more than there was: the next run begins with less, unless more is free
        self._peaks.remember(self._key, kind, max(self._plan.peak_bytes, self._budget_bytes) + 1)

    def _enable_checkpointing(self) -> None:
        for model in self._models.values():
            enable = getattr(model, "enable_gradient_checkpointing", None) or model.gradient_checkpointing_enable
            enable()

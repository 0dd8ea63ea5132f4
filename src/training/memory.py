"""The memory of one training: the plan it begins with, what its steps took, and how it goes on where the plan was wrong.

The ladder: gradient checkpointing, where that was left open; then each batch in parts, one after the other, whose gradients
add up to those of the whole. A step that ran out of memory is done again from its start, with the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from src.training_plan import RAN_OUT, TrainingPlan, choose, describe, kind_of, step_key

if TYPE_CHECKING:
    from src.training.trainer import Learning

MEASURED_STEPS = 10  # that are looked at; fewer where pictures are judged before
PARTS = "parts of a batch"  # beside the peaks: in how many it went


class TrainingMemory:
    """``checkpoints_gradients`` and ``parts`` (of a batch, one after the other) are what stands now."""

    def __init__(self, run: TrainRun, learning: Learning, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self.checkpoints_gradients, self.parts = bool(run.train.gradient_checkpointing), 1
        self._run, self._learning, self._accelerator, self._say = run, learning, accelerator, say
        self._are_several = accelerator.num_processes > 1
        self._peaks = MeasuredPeaks(run.paths.folder("cache"), say)
        self._budget_bytes: int | None = None
        self._plan: TrainingPlan | None = None
        self._key = ""
        self._models: Mapping[str, nn.Module] = {}
        self._steps: int | None = None  # measured so far; None: it has not begun

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
        names = model.device_name, model.name
        self._key = step_key(*names, shapes, need, self._run, are_several=self._are_several)
        on_card, known = self._accelerator.device.type != "cpu", self._peaks.of(self._key)
        self._plan = choose(shapes, need, self._budget_bytes, on_card=on_card, known=known)
        self._say(f"plan    {describe(self._plan)}")
        self.checkpoints_gradients = bool(self._plan.need.gradient_checkpointing)
        if not self._plan.fits and PARTS in known and not self._are_several:
            self.parts = min(known[PARTS], train.batch_size)
            self._say(f"plan    each batch in {self.parts} parts, one after the other, which fitted the last time")

    def watch(self, models: Mapping[str, nn.Module]) -> None:
        """The models that a step goes through."""
        self._models = models
        if self.checkpoints_gradients:
            self._enable_checkpointing()

    def begin_step(self, has_state: bool) -> None:
        """Before a step. ``has_state``: the optimizer has all its numbers by now."""
        if has_state and self._steps is None:
            optimizations.reset_peak(self._accelerator.device, clean=True)
            self._steps = 0

    def end_step(self) -> None:
        """After a step."""
        if self._steps is not None:
            self._steps += 1
            if self._steps == MEASURED_STEPS:
                self.end_measuring()

    def end_measuring(self) -> None:
        """Remember what the steps so far took of a card, for the next plan; what comes is no step."""
        if self._steps is None or not 0 < self._steps <= MEASURED_STEPS:
            return
        self._steps = MEASURED_STEPS + 1
        peak_bytes = optimizations.peak_bytes(self._accelerator.device)
        if peak_bytes is None or not self._accelerator.is_main_process:
            return
        kind = kind_of(self.checkpoints_gradients)
        if self.parts > 1:
            self._peaks.remember(self._key, PARTS, self.parts)
        elif peak_bytes > self._peaks.of(self._key).get(kind, 0):
            self._peaks.remember(self._key, kind, peak_bytes)

    def step_down(self, step: int) -> str:
        """Go on with less after ``step`` ran out; returns what is done, in words. Raises UserError where there is no less."""
        optimizations.free_memory()
        self._remember_failure()
        train = self._run.train
        if self._are_several:  # the others wait for this one's gradients of this very step
            raise self.ran_out(step, self._way_out())
        if not self.checkpoints_gradients and train.gradient_checkpointing is None:
            self.checkpoints_gradients, way = True, "gradient checkpointing, which takes longer"
            self._enable_checkpointing()
        elif self.parts < train.batch_size:
            self.parts = min(2 * self.parts, train.batch_size)
            way = f"each batch in {self.parts} parts, one after the other"
        else:
            raise self.ran_out(step, self._way_out())
        self._steps = None
        told = f"ran out in step {step}; going on with {way}"
        self._say(f"memory  {told}")
        return f"memory {told}"

    def ran_out(self, step: int, way_out: str) -> UserError:
        """Out of memory, with the next smaller thing to try."""
        train = self._run.train
        resolution = f"resolution {train.resolution}" if train.resolution else "the model's own resolution"
        size = f"step {step}, {resolution}, batch size {train.batch_size}, {self._learning.size_words()}"
        return UserError(f"out of memory ({size}); {way_out}", ExitCode.OUT_OF_MEMORY)

    def _way_out(self) -> str:
        """Of a step that the ladder did not help."""
        if not self.checkpoints_gradients:
            return "use --gradient_checkpointing"
        if self._are_several and self._run.train.batch_size > 1:
            return f"use --batch_size 1 --gradient_accumulation {self._run.train.batch_size}"
        return self._learning.way_out()

    def _remember_failure(self) -> None:
        """The next run begins with less, unless more is free. Less than a step was measured to take says nothing: the plan
        goes by the larger of both, so others who held the memory leave no mark."""
        room_bytes = optimizations.room_bytes(self._accelerator.device)
        if room_bytes is None or self._budget_bytes is None or self.parts > 1 or not self._accelerator.is_main_process:
            return
        self._peaks.remember(self._key, kind_of(self.checkpoints_gradients) + RAN_OUT, min(room_bytes, self._budget_bytes))

    def _enable_checkpointing(self) -> None:
        for model in self._models.values():
            enable = getattr(model, "enable_gradient_checkpointing", None) or model.gradient_checkpointing_enable
            enable()

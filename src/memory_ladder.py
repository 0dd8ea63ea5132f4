"""Keeps a loaded model within its memory: places it by a plan, steps down when memory runs out, remembers what was measured.

The ladder is that of ``memory_prediction.PLANS``, and after the smallest plan of a card the CPU, in fp32 and where the model
fits into the free main memory; there the VAE's tiles are the last step. Each step is said; what failed is done again with the
same seeds, so the picture is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from src import base_models, devices, memory_plan, model_source, native, optimizations
from src.base_models import LoadedModel
from src.config import AppConfig, OptimizationConfig
from src.errors import ExitCode, UserError, is_out_of_memory
from src.estimate import Place, estimate
from src.measured_peaks import MeasuredPeaks, peak_key
from src.memory_prediction import CONTEXT_BYTES, CPU_TILED, RAN_OUT, Placement, Request, adapter_bytes, predict
from src.model_shapes import ModelShapes
from src.plan_report import describe
from src.processes import from_environment
from src.quantization import check_card
from src.request import PictureRequest

Result = TypeVar("Result")


@dataclass(frozen=True)
class Announced:
    """What was said before a model was loaded."""

    placement: Placement | None  # None: nothing was
    process_bytes: int  # main memory that this process held by then


def announce(config: AppConfig, request: PictureRequest, say: Callable[[str], None]) -> Announced:
    """Say before anything is loaded what plan the request will take, and what that will cost.

    Nothing is said where shapes are not known before the model or its VAE is fetched, or where a file is wrong: loading says
    how. Raises UserError (usage) for switches that contradict each other, and for what the device cannot do: xformers,
    slicing, quantised weights.
    """
    device = base_models.pick_device(config.model.device)
    dtype = base_models.pick_dtype(config.model.precision, device)
    memory_plan.check_switches(config.optimization)
    memory_plan.check_device(config.optimization, device.type)
    budget_bytes, process_bytes = optimizations.memory_budget(device, config.optimization), _process_bytes()
    if config.optimization.quantize and budget_bytes is None:
        raise memory_plan.no_card_to_quantize_on(config.optimization.quantize)
    check_card(config.optimization.quantize, device)
    memory_bytes = _main_memory_bytes(device, process_bytes)
    place = Place("", base_models.name_of(device), base_models.precision_of(dtype), budget_bytes, memory_bytes)
    try:
        vae = config.model.vae
        if vae and model_source.resolve_vae(vae, config.paths.folder("cache"), config.model.offline).path is None:
            return Announced(None, process_bytes)
        plan = estimate(config, request, place).plan
    except UserError:
        return Announced(None, process_bytes)
    _say_plan(plan, say)
    return Announced(plan.placement, process_bytes)


def _process_bytes() -> int:
    return optimizations.memory_in_use_bytes(torch.device("cpu"))


def _main_memory_bytes(device: torch.device, before_bytes: int) -> int | None:
    """Main memory for a plan, as far as it is known: what is free, and what is the plan's already.

    That is all of this process on a CPU, where a prediction counts the libraries; beside a card it is what the process has
    grown by since it held ``before_bytes``, before the model was loaded.
    """
    if device.type == "mps":  # main memory is the card's
        return None
    free_bytes, own_bytes = devices.available_memory_bytes(), _process_bytes()
    if free_bytes is not None:
        free_bytes //= from_environment().local_count  # of as many processes each has its share
    return free_bytes and free_bytes + (own_bytes if device.type == "cpu" else max(0, own_bytes - before_bytes))


def _is_all(room_bytes: int, budget_bytes: int) -> bool:
    """Whether what this process could hold now is what it had to begin with: else another program has taken a part of it."""
    return room_bytes >= budget_bytes - CONTEXT_BYTES  # kernels loaded meanwhile are no other program's


def _say_plan(plan: memory_plan.Plan, say: Callable[[str], None]) -> None:
    for line in (describe(plan), *plan.notes):
        say(f"plan    {line}")


class MemoryLadder:
    """The memory of one loaded model. ``model`` and ``plan`` are those in use now: on the last rung it is another model."""

    def __init__(
        self,
        model: LoadedModel,
        shapes: ModelShapes,
        config: Callable[[], AppConfig],
        adapters: Callable[[], Iterable[Path]],
        say: Callable[[str], None],
        announced: Announced,
    ) -> None:
        """``config`` is the generator's, as it is now; ``adapters`` gives the files of those that are attached."""
        self.model = model
        self.plan: memory_plan.Plan | None = None
        self._shapes, self._config, self._adapters, self._say = shapes, config, adapters, say
        self._quantize = config().optimization.quantize
        self._budget_bytes = optimizations.memory_budget(model.device, config().optimization)
        self._said, self._before_bytes = announced.placement, announced.process_bytes
        self._ran_out = self._is_quantized = self._must_tile = False
        self._first_budget_bytes, self._was_crowded = self._budget_bytes, False
        self._left_card_for: PictureRequest | None = None
        self._card = model.device
        self._applied: Placement | None = None
        self._peaks = MeasuredPeaks(config().paths.folder("cache"), say)
        self._need: Request | None = None  # of the plan in use
        self._key = self._measured_key = ""
        self._measured_plan: memory_plan.Plan | None = None

    def place(self, request: PictureRequest) -> None:
        """Choose a plan for the request's size, and apply it if it is another one than now. Steps down as ``within`` does."""
        self.within(request, lambda: self._place(request))

    def within(self, request: PictureRequest, action: Callable[[], Result]) -> Result:
        """Do something; when memory runs out, step down to a smaller plan and do it again.

        Raises UserError (out of memory) when there is none.
        """
        while True:
            try:
                return action()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the except block: inside, the error's frames would keep the tensors that filled the memory.
            self._step_down(request)

    def start_measuring(self, count: int) -> None:
        """Begin to measure a batch of so many; one that was never measured starts without what earlier work left.

        Of a smaller batch than was planned for nothing is remembered: prompts of different length share none.
        """
        unknown = self.plan.placement.name not in self._peaks.of(self._key) and count == self._need.batch_size
        self._measured_plan = self.plan if unknown else None
        optimizations.reset_peak(self.model.device, clean=unknown or self._key != self._measured_key)
        self._measured_key = self._key

    def end_measuring(self) -> None:
        """Remember what the batch took, if it was drawn with one plan from its start."""
        peak_bytes = optimizations.peak_bytes(self.model.device)
        if peak_bytes is not None and self._measured_plan is self.plan:
            self._peaks.remember(self._key, self.plan.placement.name, peak_bytes)

    def why_return(self, request: PictureRequest) -> str | None:
        """Why it is worth loading the model anew onto the card that was left; None where it was not, or is not.

        Either it was left for a larger picture, or because another program held a part of it, which is free again.
        """
        if self._left_card_for is None:
            return None
        if self._size(request) < self._size(self._left_card_for):
            return "this picture is smaller than the one that left the card"
        is_free = self._was_crowded and _is_all(optimizations.room_bytes(self._card), self._first_budget_bytes)
        return "the memory that another program held is free again" if is_free else None

    def _size(self, request: PictureRequest) -> int:
        native_px, count = self.model.native_size_px, min(request.batch_size, request.num_images)
        return (request.width or native_px) * (request.height or native_px) * count

    @property
    def _options(self) -> OptimizationConfig:
        """The user's switches; once memory ran out, those for a placement say only where the ladder begins."""
        options = replace(self._config().optimization, quantize=self._quantize)
        options = replace(options, enable_vae_tiling=options.enable_vae_tiling or self._must_tile)
        if not self._ran_out:
            return options
        offload = {"enable_model_cpu_offload": "balanced", "enable_sequential_cpu_offload": "minimal"}
        first = next((mode for name, mode in offload.items() if getattr(options, name)), options.memory)
        first = "auto" if first == "fast" or self._budget_bytes is None else first
        xformers = options.enable_xformers and self._budget_bytes is not None  # knows no CPU
        return replace(options, memory=first, enable_xformers=xformers, **dict.fromkeys(offload, False))

    def _place(self, request: PictureRequest) -> None:
        plan = self._choose(request)
        if plan.placement == self._applied:
            self.plan = plan
        else:
            self._take(plan)

    def _choose(self, request: PictureRequest) -> memory_plan.Plan:
        model, options = self.model, self._options
        checker = getattr(model.pipeline, "safety_checker", None) is not None
        lora_bytes = adapter_bytes(self._adapters(), model.precision)
        self._need = Request.of(
            request, model.native_size_px, model.precision,
            lora_bytes=lora_bytes, safety_checker=checker, quantize=options.quantize,
            attention_slicing=options.enable_attention_slicing, unet=self._shapes.unet,
        )  # fmt: skip
        self._key = peak_key(model.device_name, model.name, self._shapes, self._need, request.mode, self._config())
        return memory_plan.choose(
            self._shapes, self._need, self._budget_bytes, options,
            memory_bytes=_main_memory_bytes(model.device, self._before_bytes), measured=self._peaks.of(self._key),
        )  # fmt: skip

    def _take(self, plan: memory_plan.Plan) -> None:
        """Say a plan and apply it."""
        model, options = self.model, self._options
        self.plan, self._applied = plan, None  # when it is cut off half-way, the next one starts anew
        if plan.placement != self._said:
            _say_plan(plan, self._say)
        self._said = plan.placement
        if model.device.type == "cpu" and not options.enable_torch_compile and (problem := native.problem()):
            self._say(f"cpu     {problem}")
        if options.enable_torch_compile:
            self._say("compile the U-Net is compiled at the first step, which takes up to minutes")
        if options.quantize and not self._is_quantized:
            optimizations.quantize(model.pipeline, options.quantize, model.device)
            self._is_quantized = True
        optimizations.apply(model.pipeline, plan.placement, options, model.device)
        self._applied = plan.placement

    def _step_down(self, request: PictureRequest) -> None:
        """Plan for less than the plan that failed. Raises UserError (out of memory) when there is no smaller one."""
        optimizations.free_memory()
        failed = self.plan
        if self._budget_bytes is not None:
            # More than there was: the next run begins with a smaller plan, unless more is free by then. What others had taken
            # meanwhile leaves no mark: the plan goes by the larger of this and its prediction.
            room_bytes = optimizations.room_bytes(self._card) or self._budget_bytes
            is_all = _is_all(room_bytes, self._budget_bytes)
            too_little = self._budget_bytes if is_all else room_bytes
            self._was_crowded = self._was_crowded or not is_all
            self._peaks.remember(self._key, failed.placement.name + RAN_OUT, too_little + 1)
            self._budget_bytes = min(self._budget_bytes, failed.peak_bytes - 1, failed.estimate.peak_bytes - 1)
            self._ran_out = True
            plan = self._choose(request)
            if plan.placement != failed.placement:
                self._say(f"memory  ran out with plan {failed.placement.name}; trying a smaller one")
                self.within(request, lambda: self._place(request))  # chosen anew each time: the smaller one may fail as well
                optimizations.reset_peak(self.model.device)  # what failed is no measure of what comes
                return
        elif predict(self._shapes, self._need, CPU_TILED).peak_bytes < failed.peak_bytes and not failed.placement.vae_tiling:
            self._must_tile = True
            self._say(f"memory  ran out with plan {failed.placement.name}; trying it with VAE tiling")
            self.within(request, lambda: self._place(request))
            return
        if not self._move_to_cpu(request):
            size = f"{request.width or self.model.native_size_px}x{request.height or self.model.native_size_px}"
            wanted = f"{size}, batch size {request.batch_size}, plan {failed.placement.name}"
            smaller = "use --batch-size 1 or a smaller size" if self._need.batch_size > 1 else "use a smaller size or model"
            way_out = f"leave --quantize {self._quantize} out, or {smaller}" if self._quantize else smaller
            raise UserError(f"out of memory ({wanted}); {way_out}", ExitCode.OUT_OF_MEMORY)

    def _move_to_cpu(self, request: PictureRequest) -> bool:
        """Go on without the card, if there was one and main memory suffices. In fp32: a CPU is slow in fp16, and in bf16 the
        picture would be another one. Quantised weights stay where they are: a CPU takes longer with them."""
        is_there = (self.model.device.type, self.model.dtype) == ("cpu", torch.float32)
        shares_memory = self.model.device.type == "mps"  # in fp32 the CPU would need twice what has just run out
        if self._budget_bytes is None or is_there or shares_memory or self._quantize:
            return False
        free_bytes = _main_memory_bytes(self.model.device, self._before_bytes)  # an offload's weights are in it already
        need, options = replace(self._need, precision="fp32", quantize=None), self._options
        if not memory_plan.choose(self._shapes, need, None, options, memory_bytes=free_bytes).fits:
            return False
        self._say(f"memory  ran out with plan {self.plan.placement.name}; going on with the CPU in fp32, which is slow")
        self._left_card_for = request
        optimizations.move_to_cpu(self.model.pipeline)
        self.model = replace(self.model, device=torch.device("cpu"), dtype=torch.float32)
        self._budget_bytes = None
        self._place(request)
        return True

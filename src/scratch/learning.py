"""The loop that all phases share: a loss, a step, a moving average; judged, saved and resumable at any moment.

What differs between the phases is a `Lesson`. A batch is made from the number of its step alone, so a training that was cut
off goes on with exactly what it would have seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from src import devices, files
from src.checkpoints import Checkpoint, CheckpointFolder
from src.errors import ExitCode, UserError
from src.images import encode_png
from src.scratch import phase_report
from src.scratch.muon import Muon, has_fast_bf16, parameter_groups
from src.scratch.settings import ADDED, NOT_LEARNT, MachineSettings
from src.terminal import Terminal
from src.training.history import History, finite
from src.training.interruption import Interruption
from src.training.network import MovingAverage
from src.training.optimizers import pack_state, unpack_state
from src.training.speed import keep_freed_memory

LIVE, AVERAGE, OPTIMIZER, NUMBERS = (
    f"state/{name}" for name in ("live.safetensors", "average.safetensors", "optimizer.safetensors", "optimizer.json")
)
KEEP = 2  # checkpoints of a phase
POINT_STEPS = 10  # a point of the loss curve is the mean of so many
MAX_NOT_FINITE = 3
BEGUN = "model_it_began_from"  # a hash of what that says of itself: by now its folder may hold another


class Settings(Protocol):
    """What every phase that learns can be told."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    ema_decay: float
    validation_steps: int
    checkpoint_steps: int
    seed: int


@dataclass
class Lesson:
    """What one phase learns: ``loss(step)`` is a scalar and what else to note; ``judge()`` gives figures and a picture."""

    name: str
    model: nn.Module
    settings: Settings
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    judge: Callable[[], tuple[dict[str, float], Image.Image | None]]
    facts: dict[str, Any]  # what it builds on: a checkpoint of other facts is not gone on from


def device_of(machine: MachineSettings) -> torch.device:
    """The machine's card, or the CPU. Raises UserError (usage) for a device that is not there."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device(devices.pick_device(machine.device, card_count=cards, has_mps=torch.backends.mps.is_available()))


@contextmanager
def precision_of(machine: MachineSettings, device: torch.device) -> Iterator[None]:
    """Autocast to bf16 where that is asked for, or faster: on a card, and on a CPU that multiplies it."""
    fast = has_fast_bf16(device)
    enabled = machine.precision == "bf16" or (machine.precision == "auto" and fast)
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then half a cosine to nothing; ``step`` from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def learn(lesson: Lesson, folder: Path, machine: MachineSettings, terminal: Terminal) -> dict[str, float]:
    """Teach until the last step; the model then holds the moving average. Returns the last figures of ``judge``.

    Goes on from the newest checkpoint in ``folder``. Ctrl-C finishes the step, saves and raises UserError (interrupted).
    """
    if next(lesson.model.parameters()).device.type == "cpu":
        keep_freed_memory()
    student = Student(lesson, folder, machine, terminal)
    store = CheckpointFolder(folder, terminal.say)
    with store.lock(), Interruption() as stop:
        student.resume(store.newest())
        terminal.start_progress(lesson.settings.steps)
        try:
            while student.step < lesson.settings.steps:
                student.learn_a_step()
                student.judge_and_save(store)
                if stop.requested is not None:
                    student.save(store)
                    phase_report.write(lesson.name, folder, lesson.settings, student.history, student.figures)
                    raise UserError(
                        f"{lesson.name}: interrupted after step {student.step}; the same command goes on", stop.exit_code
                    )
        finally:
            terminal.end_progress()
            student.history.flush()
    student.take_average()
    return student.figures


class Student:
    """A model, its optimizer and its average, and what was noted on the way."""

    def __init__(self, lesson: Lesson, folder: Path, machine: MachineSettings, terminal: Terminal) -> None:
        self.lesson, self.folder, self.machine, self.terminal = lesson, folder, machine, terminal
        self.device = next(lesson.model.parameters()).device
        self.parameters = {name: item for name, item in lesson.model.named_parameters() if item.requires_grad}
        groups = parameter_groups(lesson.model, lesson.settings.weight_decay)
        self.optimizer = Muon(groups, lesson.settings.learning_rate)
        self.average = MovingAverage(self.parameters, lesson.settings.ema_decay)
        self.history = History(folder / "log.jsonl")
        self.step, self.seconds = 0, 0.0
        self.figures: dict[str, float] = {}
        self._noted: list[dict[str, float]] = []
        self._not_finite = 0
        self.saved: Checkpoint | None = None

    def learn_a_step(self) -> None:
        """One batch. A loss that is no number is passed over; three in a row end the training (UserError, diverged)."""
        started, settings = time.monotonic(), self.lesson.settings
        rate = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.lesson.model.train()
        torch.manual_seed(settings.seed * 1_000_003 + self.step)  # whatever is drawn at random follows from the step
        with precision_of(self.machine, self.device):
            loss, noted = self.lesson.loss(self.step)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.max_grad_norm))
        if math.isfinite(norm) and math.isfinite(value := float(loss.detach())):
            self._not_finite = 0
            self.optimizer.step()
            self.average.update(self.parameters, self.step + 1)
            self._noted.append({"loss": value, "grad_norm": norm, **noted})
        else:
            self._not_finite += 1
            self.terminal.say(f"{self.lesson.name:<7} step {self.step + 1:,}: the loss was no number, passed over")
            if self._not_finite == MAX_NOT_FINITE:
                raise UserError(
                    f"{self.lesson.name}: the loss was no number {MAX_NOT_FINITE} times in a row at step {self.step}; "
                    f"try --restart --set {self.lesson.name}.learning_rate={settings.learning_rate / 2:g}", ExitCode.DIVERGED,
                )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.monotonic() - started
        self._show(rate)

    def _show(self, rate: float) -> None:
        if self._noted and (self.step % POINT_STEPS == 0 or self.step == self.lesson.settings.steps):
            means = {name: sum(point[name] for point in self._noted) / len(self._noted) for name in self._noted[0]}
            self.history.add("train", self.step, lr=rate, seconds=self.seconds, **means)
            self._noted = []
            self.terminal.progress(self.step, f"{self.lesson.name}  loss {means['loss']:.4f}")

    def judge_and_save(self, store: CheckpointFolder) -> None:
        """Where that is due: figures and a picture by the moving average, and a checkpoint."""
        settings = self.lesson.settings
        is_last = self.step == settings.steps
        if is_last or self.step % settings.validation_steps == 0:
            with self.average.swapped_in(self.parameters):
                self.lesson.model.eval()
                with torch.no_grad(), precision_of(self.machine, self.device):
                    self.figures, picture = self.lesson.judge()
            self.history.add("validation", self.step, seconds=self.seconds, **self.figures)
            told = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
            self.terminal.say(f"{self.lesson.name:<7} step {self.step:,}: {told}  ({self.seconds / 60:.1f} min)")
            if picture is not None:
                samples = files.check_writable_folder(self.folder / "samples")
                files.publish_bytes(samples / f"step-{self.step:06d}.png", encode_png(picture, {}))
            phase_report.write(self.lesson.name, self.folder, settings, self.history, self.figures)
        if is_last or self.step % settings.checkpoint_steps == 0:
            self.save(store)

    def save(self, store: CheckpointFolder) -> Checkpoint:
        """All that a resume needs; not again what was just saved."""
        if self.saved is not None and self.saved.step == self.step:
            return self.saved
        tensors, numbers = pack_state(self.optimizer)
        contents = {
            LIVE: safetensors.torch.save(_on_cpu(self.parameters)),
            AVERAGE: safetensors.torch.save(_on_cpu(self.average.tensors)),
            OPTIMIZER: safetensors.torch.save(_on_cpu(tensors)), NUMBERS: numbers.encode(),
        }  # fmt: skip
        self.history.flush()
        figures = {name: finite(value) for name, value in self.figures.items()}  # a manifest holds no other numbers
        facts = {"lesson": self._facts(), "seconds": self.seconds, "figures": figures}
        facts |= {"noted": self._noted, "not_finite": self._not_finite}  # of a point of the curve that is not full yet
        self.saved = store.save(self.step, contents, facts)
        store.prune(KEEP)
        return self.saved

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a checkpoint. Raises UserError (usage) for one of other settings or of other earlier phases."""
        if checkpoint is None:
            self.history.rewind(-1)
            return
        differing = _differences(checkpoint.facts["lesson"], self._facts())
        if differing:
            raise UserError(
                f"{checkpoint.folder}: was learnt with other settings ({', '.join(differing[:4])}); go on with those, or "
                "start anew with --restart or another --work folder", ExitCode.USAGE,
            )  # fmt: skip
        _put_back(self.parameters, safetensors.torch.load(checkpoint.read(LIVE)))
        _put_back(self.average.tensors, safetensors.torch.load(checkpoint.read(AVERAGE)))
        unpack_state(self.optimizer, safetensors.torch.load(checkpoint.read(OPTIMIZER)), checkpoint.read(NUMBERS).decode())
        self.step, self.seconds, self.figures = checkpoint.step, checkpoint.facts["seconds"], checkpoint.facts["figures"]
        self._noted, self._not_finite = list(checkpoint.facts.get("noted", ())), checkpoint.facts.get("not_finite", 0)
        self.history.rewind(self.step)
        self.terminal.say(f"{self.lesson.name:<7} goes on after step {self.step:,} of {self.lesson.settings.steps:,}")

    def take_average(self) -> None:
        """The model's weights become the moving average."""
        with torch.no_grad():
            _put_back(self.parameters, self.average.tensors)
        self.lesson.model.eval()

    def _facts(self) -> dict[str, Any]:
        return {**asdict(cast(Any, self.lesson.settings)), **self.lesson.facts}


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _put_back(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same, but for what changes nothing that was learnt."""
    known = ADDED | {name: now[name] for name in now if name == BEGUN}  # which older checkpoints do not say
    before = {name: value for name, value in known.items() if name in now} | dict(before)
    names = [name for name in {**before, **now} if name not in NOT_LEARNT and _plain(before.get(name)) != _plain(now.get(name))]
    told = [f"{name} {before.get(name)} -> {now.get(name)}" for name in names if name != "inputs"]
    others = [phase for phase in now["inputs"] if before.get("inputs", {}).get(phase) != now["inputs"][phase]]
    return told + [f"another {phase}" for phase in others]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

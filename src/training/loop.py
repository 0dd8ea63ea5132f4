"""The loop: micro-steps gather gradients, a step uses them; then, where due, the adapter is judged and saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from src import diffusion
from src.dataset import subkey
from src.diffusion import NoiseSchedule
from src.errors import ExitCode, UserError, is_out_of_memory
from src.train_config import TrainConfig
from src.training.batches import Batch, Feeder, Trainee
from src.training.history import History
from src.training.interruption import Interruption
from src.training.memory import TrainingMemory
from src.training.network import LoraNetwork, MovingAverage
from src.training.optimizers import lr_factor

MAX_NOT_FINITE = 3  # steps in a row that may be skipped
HISTORY_STEPS = 5  # a point of the loss curve is the mean of so many steps


@dataclass(slots=True)
class Progress:
    """Where a run stands; what a checkpoint remembers beside tensors."""

    step: int = 0  # optimizer steps done, over all sessions
    skipped: int = 0  # steps whose loss or gradient was no number
    skipped_in_a_row: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # where the time went, over all sessions

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - started


@dataclass(slots=True)
class Job:
    """Everything that the loop works with."""

    train: TrainConfig
    total_steps: int
    accelerator: Accelerator
    trainee: Any  # Trainee, as accelerate wrapped it
    network: LoraNetwork
    optimizer: Any
    feeder: Feeder
    schedule: NoiseSchedule
    history: History
    average: MovingAverage | None
    memory: TrainingMemory
    show: Callable[[Progress, float, float], None]  # progress, loss, learning rate: on the terminal and in the tracker
    judge: Callable[[Progress], None]  # validation, samples, scores
    save: Callable[[Progress], None]  # a checkpoint


def train(job: Job, progress: Progress, stop: Interruption) -> None:
    """Train from ``progress.step`` to the last step, or until interrupted: then the step is finished and saved.

    Raises UserError (diverged) when the loss is no number three times in a row.
    """
    losses: list[float] = []
    saved_at = progress.step
    trainable = job.network.trainable()
    while progress.step < job.total_steps and not _is_stopped(job, stop):
        with progress.timed("train"):
            factor = lr_factor(job.train, progress.step, job.total_steps)
            for group in job.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            job.memory.begin_step(bool(job.optimizer.state))
            loss = _gather_within_memory(job, progress.step)
            grad_norm = float(job.accelerator.clip_grad_norm_(list(trainable.values()), job.train.max_grad_norm))
            is_finite = _apply(job, loss, grad_norm)
            job.memory.end_step()
            progress.step += 1
            if is_finite:
                progress.skipped_in_a_row = 0
                losses.append(loss)
                if job.average is not None:
                    job.average.update(trainable, progress.step)
            else:
                _count_skipped(job, progress, loss)
        group = job.optimizer.param_groups[0]
        rate = group["lr"] * group.get("d", 1.0)  # d: what Prodigy found
        if losses and (progress.step % HISTORY_STEPS == 0 or progress.step == job.total_steps):
            job.history.add("train", progress.step, loss=sum(losses) / len(losses), lr=rate, grad_norm=grad_norm)
            losses = []
        job.show(progress, loss, rate)
        if _is_due(progress.step, job.train.validation_steps or job.train.checkpoint_steps, job.total_steps):
            job.memory.end_measuring()
            job.judge(progress)
        if _is_due(progress.step, job.train.checkpoint_steps, job.total_steps):
            job.save(progress)
            saved_at = progress.step
    if progress.step != saved_at:  # interrupted
        job.save(progress)


def _gather_within_memory(job: Job, step: int) -> float:
    """The gradients of a step, with less memory where it ran out. Raises UserError (out of memory) when there is no less."""
    while True:
        try:
            return _gather_gradients(job, step)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block: inside, the error's frames would keep the tensors that filled the memory.
        job.optimizer.zero_grad()
        job.history.add("event", step + 1, text=job.memory.step_down(step + 1))


def _gather_gradients(job: Job, step: int) -> float:
    """The micro-steps of one step; returns the mean loss of all processes."""
    job.optimizer.zero_grad()
    count = job.train.gradient_accumulation_steps
    total = torch.zeros((), device=job.accelerator.device)
    for micro in range(count):
        index = step * count + micro
        batch = job.feeder.batch(index, job.accelerator.process_index).to(job.accelerator.device)
        torch.manual_seed(subkey(job.train.seed, f"dropout {index} {job.accelerator.process_index}"))
        is_last = micro == count - 1
        with nullcontext() if is_last else job.accelerator.no_sync(job.trainee):
            for part, share in batch.parts(job.memory.parts):
                loss = batch_loss(job.trainee, part, job.schedule, job.train.snr_gamma, job.network.taken_off) * share / count
                job.accelerator.backward(loss)
                total += loss.detach()
    return float(job.accelerator.reduce(total, "mean"))


def batch_loss(
    trainee: Trainee,
    batch: Batch,
    schedule: NoiseSchedule,
    snr_gamma: float | None,
    taken_off: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """The mean over the batch of w(t) * ||prediction - target||^2 (Ho et al. 2020, eq. 14; w: Hang et al. 2023).

    ``taken_off``: takes the adapter off the trainee, for the targets of ``batch.preserved``.
    """
    noisy = diffusion.add_noise(schedule, batch.latents, batch.noise, batch.timesteps)  # (B, 4, h, w)
    target = diffusion.target(schedule, batch.latents, batch.noise, batch.timesteps)  # (B, 4, h, w): noise or velocity
    if batch.preserved:
        rows = torch.tensor(batch.preserved, device=noisy.device)
        with torch.no_grad(), taken_off():
            before = trainee(noisy[rows], batch.rows(batch.preserved))
        target = target.index_copy(0, rows, before.to(target.dtype))
    weights = diffusion.loss_weights(schedule, batch.timesteps, snr_gamma) * batch.weights  # (B,)
    prediction = trainee(noisy, batch)  # (B, 4, h, w)
    return diffusion.weighted_loss(prediction, target, weights, batch.mask).mean()


def _apply(job: Job, loss: float, grad_norm: float) -> bool:
    """Take the optimizer's step, unless loss or gradient is no number; returns whether both are."""
    scaler = job.accelerator.scaler
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if is_finite or scaler is not None:  # the scaler of fp16 skips the step itself, and lowers its scale
        job.optimizer.step()
    # While it looks for its scale, fp16 overflows a few times: that is no divergence, as long as the loss is a number.
    return is_finite or (scaler is not None and math.isfinite(loss) and scaler.get_scale() >= 1)


def _count_skipped(job: Job, progress: Progress, loss: float) -> None:
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    where = "gradient" if math.isfinite(loss) else "loss"
    job.history.add("event", progress.step, text=f"step {progress.step} skipped: the {where} was no number")
    if progress.skipped_in_a_row < MAX_NOT_FINITE:
        return
    precision = job.accelerator.mixed_precision
    way_out = "lower --lr, or check the model's VAE and weights"
    if precision == "fp16":  # GTX 16xx give no numbers in it
        way_out = "use --mixed_precision no, on a small card with --quantize nf4 --no-samples"
    raise UserError(
        f"step {progress.step}: the {where} was no number {MAX_NOT_FINITE} times in a row, in precision {precision}; the last "
        f"checkpoint is kept; {way_out}",
        ExitCode.DIVERGED,
    )


def _is_due(step: int, every: int, total_steps: int) -> bool:
    return step % every == 0 or step == total_steps


def _is_stopped(job: Job, stop: Interruption) -> bool:
    """Whether any process was told to stop: all leave the loop at the same step, or the others would wait for ever."""
    if job.accelerator.num_processes == 1:
        return bool(stop.requested)
    flag = torch.tensor(float(bool(stop.requested)), device=job.accelerator.device)
    return bool(job.accelerator.reduce(flag, "sum") > 0)

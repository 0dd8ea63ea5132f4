"""One training from start to end: read, encode, let something learn, loop, finish. What has done its work leaves the card.

What learns, an adapter or weights of the U-Net, is a `Learning`: it knows how that is built, saved, and spoken of.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src import base_models, optimizations
from src.base_models import LoadedModel
from src.checkpoints import Checkpoint, CheckpointFolder
from src.dataset import Dataset, Example, read_dataset
from src.diffusion import NoiseSchedule, check_loss
from src.errors import ExitCode, is_out_of_memory, refused, usage_error
from src.terminal import Terminal, counted, shell_word
from src.train_config import TrainRun, check_warmup
from src.training.adapter_learning import AdapterLearning
from src.training.batches import Feeder, Trainee, versions_of
from src.training.class_images import draw_class_images
from src.training.engine import autocast_dtype, build_accelerator, size_step_px, total_steps
from src.training.facts import machine_facts, weights_digest, weights_sha256
from src.training.history import History
from src.training.interruption import Interruption
from src.training.judging import Judge
from src.training.latent_cache import LatentCache
from src.training.live_text import LiveText
from src.training.loop import Job, Progress, train
from src.training.memory import TrainingMemory
from src.training.model_saving import ModelSaver
from src.training.network import MovingAverage
from src.training.optimizers import build_optimizer
from src.training.saving import Saver
from src.training.text_cache import TextCache
from src.training.unet_learning import UnetLearning
from src.training_start import read_pictures

Learning = AdapterLearning | UnetLearning


class Trainer:
    """Builds what the loop needs out of a run's settings, and ends it properly."""

    def __init__(
        self, run: TrainRun, terminal: Terminal, dataset: Dataset | None = None, learning: Learning | None = None
    ) -> None:
        """``dataset``: as `read_dataset` gives it, if it has been read already. ``learning``: what learns; None: an adapter."""
        self.run, self.terminal, self._dataset = run, terminal, dataset
        self.learning = learning or AdapterLearning(run)
        self.accelerator = build_accelerator(run)
        self.is_main = self.accelerator.is_main_process
        train = run.train  # what was left open is decided now, and stands so in the checkpoints and the report
        train.mixed_precision = self.accelerator.mixed_precision
        if run.model.precision == "auto":
            run.model.precision = {"no": "fp32"}.get(train.mixed_precision, train.mixed_precision)
        self.learning.settle()
        self.progress = Progress()
        self.memory = TrainingMemory(run, self.learning, self.accelerator, self.say)
        self._is_encoding = False

    def say(self, line: str) -> None:
        """A line on the terminal, from one process only."""
        if self.is_main:
            self.terminal.say(line)

    def train(self, store: CheckpointFolder, checkpoint: Checkpoint | None, force: bool) -> ExitCode:
        """Train to the end or to an interruption. ``checkpoint``: go on from there. Returns the exit code.

        Raises UserError: usage, refused, out of memory, diverged; whatever it is, the checkpoints so far stay.
        """
        try:
            return self._train(store, checkpoint, force)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.terminal.end_progress()
        # Outside of the except block: inside, the error's frames would keep the tensors that filled the memory.
        optimizations.free_memory()
        way_out = "use a smaller --resolution" if self._is_encoding else self.learning.way_out()  # a step has its own
        raise self.memory.ran_out(self.progress.step + 1, way_out)

    def _train(self, store: CheckpointFolder, checkpoint: Checkpoint | None, force: bool) -> ExitCode:
        job, saver, judge = self._prepare(store)
        if checkpoint is None:
            job.history.rewind(-1)  # what a training left that was killed before its first checkpoint
            self._on_main(judge.before)(self.progress)
        else:
            self._compare(checkpoint, saver.run_facts, force)
            earlier = saver.restore(checkpoint)
            seconds = Counter(earlier.seconds) + Counter(self.progress.seconds)
            self.progress = replace(earlier, seconds=dict(seconds))
            job.history.rewind(self.progress.step)
            self.say(f"resume  from {checkpoint.folder}, step {self.progress.step} of {job.total_steps}")
        self._start_progress(job, self.progress.step)
        with Interruption() as stop:
            try:
                train(job, self.progress, stop)
            finally:
                self.terminal.end_progress()
                job.history.flush()
        self._on_main(judge.report)(self.progress)
        code = ExitCode.OK
        if self.progress.step < job.total_steps:
            again = resume_command(self.run, self.accelerator.num_processes)
            self.say(f"stopped after step {self.progress.step}; to go on: {again}")
            code = stop.exit_code or ExitCode.INTERRUPTED  # of several processes, another one may have got the signal
        else:
            self._on_main(lambda progress: self._finish(saver, judge))(self.progress)
        self.accelerator.end_training()
        return code

    # -- preparing

    def _prepare(self, store: CheckpointFolder) -> tuple[Job, Saver | ModelSaver, Judge]:
        train = self.run.train
        if train.class_prompt is not None and self.is_main:
            draw_class_images(self.run, class_folder(self.run), self.say)
        self.accelerator.wait_for_everyone()
        self.memory.ask()
        with self.progress.timed("load"):
            model = self._load_model()
        if train.zero_terminal_snr:  # also for the samplers that draw meanwhile
            model.scheduler_config["rescale_betas_zero_snr"] = True
        schedule = NoiseSchedule.from_config(model.scheduler_config)
        check_loss(schedule.prediction_type, train.snr_gamma, schedule.has_zero_terminal_snr)
        dataset, priors = self._read_data(model)
        with self.progress.timed("encode"):
            latents, texts, judge = self._encode(model, dataset, priors, schedule)
        self.memory.plan(model)
        network = self.learning.build(model, self.accelerator)
        self.memory.watch(network.models)
        store.check_space(self.learning.space_bytes(network, model))
        live_text = LiveText(model.pipeline) if train.train_text_encoder else None
        trainee = self.accelerator.prepare(Trainee(model.pipeline.unet, live_text))
        optimizer = self.accelerator.prepare(build_optimizer(network.groups(), train))
        average = MovingAverage(network.trainable(), train.ema_decay) if train.ema_decay else None
        feeder = Feeder(
            dataset, priors, latents, texts, train, timestep_count=schedule.timesteps,
            processes=self.accelerator.num_processes, live_text=train.train_text_encoder, is_sdxl=model.family == "SDXL",
        )  # fmt: skip
        steps = total_steps(self.run, feeder.order.batches_per_epoch)
        check_warmup(train, steps)
        self.learning.settle_steps(steps)
        history = History(store.root / "log.jsonl") if self.is_main else History(None)
        machine = machine_facts(model, self.accelerator.num_processes)
        base_sha256 = weights_sha256(self.run, model)
        run_facts = {"dataset": dataset.digest, "base_sha256": base_sha256, "machine": machine, "total_steps": steps}
        scaler = self.accelerator.scaler
        saver = self.learning.saver(store, model, network, average, optimizer.optimizer, scaler, dataset, run_facts)
        judge.start(saver, history)
        job = Job(
            train, steps, self.accelerator, trainee, network, optimizer, feeder, schedule.to(self.accelerator.device),
            history, average, self.memory, show=self._show, judge=self._on_main(judge.judge), save=self._on_main(judge.save),
        )  # fmt: skip
        self._say_plan(dataset, priors, network, job)
        return job, saver, judge

    def _load_model(self) -> LoadedModel:
        config = self.learning.loading(self.run.app_config())
        config.model.device = self.accelerator.device.type  # its own of several processes' cards, else the current one
        started = time.monotonic()
        # On a card the VAE is in fp32, as its file has it: it works once for all steps, and SDXL's overflows in fp16.
        model = base_models.load(config, vae_dtype=None if config.model.device == "cpu" else torch.float32)
        if line := base_models.idle_card(self.run.model.device, model.device):
            self.say(f"idle    {line}")
        if model.pipeline.unet.config.in_channels == 9:
            raise refused(f"{model.name}: is an inpainting model; train on the model it was made from")
        self.say(
            f"model   {model.name} ({model.family}), {model.precision} on {model.device}, {time.monotonic() - started:.1f} s"
        )
        return model

    def _read_data(self, model: LoadedModel) -> tuple[Dataset, tuple[Example, ...]]:
        train = self.run.train
        resolution_px = train.resolution or model.native_size_px
        options = {"step_px": size_step_px(model), "buckets": train.buckets}
        dataset = self._dataset or read_pictures(self.run, resolution_px, size_step_px(model), self.say)
        for note in dataset.notes:
            self.say(f"data    {note}")
        if not train.sample_prompts:
            train.sample_prompts = (usual_prompt(dataset),)
        if train.class_prompt is None:
            return dataset, ()
        # A prompt with {a|b} is another one in each picture, and stands beside it; any other is that of all, whoever made them.
        fixed = None if "{" in train.class_prompt or "__" in train.class_prompt else train.class_prompt
        priors = read_dataset(
            class_folder(self.run), resolution_px, validation_every=0, weight=train.prior_loss_weight, fixed_caption=fixed,
            **options,
        )  # fmt: skip
        digest = hashlib.sha256(f"{dataset.digest} {priors.digest}".encode()).hexdigest()
        return replace(dataset, digest=digest), priors.train[: train.num_class_images]

    def _encode(
        self, model: LoadedModel, dataset: Dataset, priors: Sequence[Example], schedule: NoiseSchedule
    ) -> tuple[LatentCache, TextCache, Judge]:
        """Pictures and captions through their encoders, one encoder on the device at a time, and off it afterwards."""
        train, device, pipeline = self.run.train, self.accelerator.device, model.pipeline
        cache = self.run.paths.folder("cache") / "training"
        latents = LatentCache(pipeline.vae, cache, vae_id=weights_digest(pipeline.vae), device=device, say=self.say)
        encoders = nn.ModuleList([pipeline.text_encoder, *filter(None, [getattr(pipeline, "text_encoder_2", None)])])
        rounds_to = None if train.part is None else autocast_dtype(self.accelerator)  # there the encoders are in fp32
        texts = TextCache(
            pipeline, cache, encoder_id=weights_digest(encoders), stores_in=rounds_to, device=device, say=self.say
        )
        learnt = [version for example in dataset.train for version in versions_of(example, train)]
        self._is_encoding = True
        with self.accelerator.main_process_first():  # the others find everything in the cache
            latents.encode([*learnt, *priors], train.flip, self._encoding("pictures"), unmirrored=dataset.held_out)
            captions = [caption for example in (*dataset.train, *dataset.held_out, *priors) for caption in example.captions]
            texts.encode(captions, self._encoding("captions"))
        self._is_encoding = False
        self.terminal.end_progress()
        judge = Judge(self.run, model, dataset, latents, texts, schedule, self.accelerator, self.say)
        optimizations.free_memory()  # what the encoders worked in, before the U-Net takes its place
        return latents, texts, judge

    def _encoding(self, what: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if done <= 1 and self.is_main:
                self.terminal.end_progress()
                self.terminal.start_progress(total)
            if self.is_main:
                self.terminal.progress(done, f"encode {what}")

        return report

    # -- while it runs

    def _on_main(self, action: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """What one process does while the others wait."""

        def run(progress: Progress) -> None:
            if self.is_main:
                action(progress)
            self.accelerator.wait_for_everyone()

        return run

    def _start_progress(self, job: Job, start: int) -> None:
        if self.is_main:
            self.terminal.start_progress(job.total_steps)
            self.terminal.progress(start, "train")

    def _show(self, progress: Progress, loss: float, rate: float) -> None:
        if not self.is_main:
            return
        self._loss = loss if not math.isfinite(getattr(self, "_loss", math.nan)) else 0.95 * self._loss + 0.05 * loss
        used = optimizations.memory_in_use_bytes(self.accelerator.device) / 2**30
        self.terminal.progress(progress.step, f"loss {self._loss:.4f}  lr {rate:.2g}  {used:.1f} GiB")
        if self.run.train.tracker:
            self.accelerator.log({"loss": loss, "lr": rate}, step=progress.step)

    def _say_plan(self, dataset: Dataset, priors: Sequence[Example], network: Any, job: Job) -> None:
        train = self.run.train
        held = f", {len(dataset.held_out)} held out" if dataset.held_out else ""
        prior = f", {len(priors)} of the class" if priors else ""
        self.say(f"data    {counted(len(dataset.train), 'picture')}{held}{prior}; trigger: {dataset.trigger or 'none'}")
        order = job.feeder.order
        if order.fill_ups > 0.1 * order.batches_per_epoch * train.batch_size * self.accelerator.num_processes:
            self.say(
                f"data    batches hold pictures of one size: to fill them, {order.fill_ups} visits an epoch are extra; "
                "--batch_size 1 or --no-buckets avoids that"
            )
        if job.schedule.has_zero_terminal_snr and train.snr_gamma is not None:
            self.say("loss    min-SNR gives the timestep of pure noise the weight 0; --snr_gamma none lets it be learnt")
        for note in self.learning.notes():
            self.say(note)
        a_step = train.batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes
        self.say(
            f"{self.learning.line(network)}; {counted(job.total_steps, 'step')} "
            f"of {counted(a_step, 'picture')}, {order.batches_per_epoch} batches an epoch, "
            f"mixed precision: {train.mixed_precision}"
        )

    def _compare(self, checkpoint: Checkpoint, mine: dict[str, Any], force: bool) -> None:
        """Refuse to go on with other pictures or another model; say what else may change the last bits."""
        changed = [name for name in ("dataset", "base_sha256") if checkpoint.facts.get(name) != mine[name]]
        words = {"dataset": "the pictures or captions", "base_sha256": "the model's weights"}
        if changed and not force:
            what = " and ".join(words[name] for name in changed)
            raise usage_error(f"--resume: {what} changed since {checkpoint.folder.name}; --force goes on all the same")
        total = checkpoint.facts.get("total_steps", mine["total_steps"])
        if total != mine["total_steps"] and self.run.train.lr_scheduler != "constant" and not force:
            raise usage_error(
                f"--resume: the training comes to {mine['total_steps']} steps in place of {total}, by other batches; "
                "--force goes on along a learning rate stretched to that"
            )
        before, now = checkpoint.facts.get("machine") or {}, mine["machine"]
        other = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
        if other:
            self.say(f"resume  not bit for bit as without a stop: {', '.join(other)}")

    def _finish(self, saver: Saver | ModelSaver, judge: Judge) -> None:
        judge.follow_up()
        final = judge.publish_final(self.progress)
        self.say(f"saved   {final}")
        self.say(f"best    {judge.best_line()}")
        self.say(f"report  {saver.store.root / 'report.html'}")
        self.say(f"draw    {self.learning.draw_command(final, saver.run.train.sample_prompts[0])}")


def usual_prompt(dataset: Dataset) -> str:
    """What to draw where nobody said it: the trigger, or the commonest caption where there is none."""
    captions = Counter(caption for example in dataset.train for caption in example.captions)
    words = dataset.trigger or re.sub(r"<lora:[^<>]*>?", "", captions.most_common(1)[0][0], flags=re.IGNORECASE).strip()
    literal = re.sub(r"\{|_(?=_)", r"\\\g<0>", words)  # the braces of a caption or a trigger are no choice
    return f"a photo of {literal}" if dataset.trigger else literal or "a photo"


def resume_command(run: TrainRun, processes: int = 1) -> str:
    """What to type to go on after an interruption."""
    launcher = "python" if processes == 1 else f"accelerate launch --multi_gpu --num_processes {processes}"
    usual = type(run)().train.output_dir
    output = f" --output_dir {shell_word(run.train.output_dir)}" if run.train.output_dir != usual else ""
    return f"{launcher} -m {run.door} --dataset_dir {shell_word(run.train.dataset_dir)}{output} --resume"


def class_folder(run: TrainRun) -> Path:
    """Where the pictures of the class are."""
    return Path(run.train.class_dir or Path(run.train.output_dir) / "class").expanduser()

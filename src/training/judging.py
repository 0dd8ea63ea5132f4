"""What happens at a checkpoint beside saving: a validation loss, sample pictures, a score, the best so far, the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from src.base_models import LoadedModel
from src.dataset import Dataset, Example, load_picture
from src.diffusion import NoiseSchedule
from src.errors import UserError
from src.train_config import TrainRun
from src.training.history import History
from src.training.latent_cache import LatentCache
from src.training.live_text import LiveText
from src.training.loop import Progress
from src.training.model_saving import ModelSaver
from src.training.samples import Sampler, as_drawn, save_samples
from src.training.saving import Saver
from src.training.scores import MAX_PHOTOS, Best, Scorer, choose_best, load_clip
from src.training.text_cache import Text, TextCache, time_ids
from src.training.training_report import write
from src.training.validation import Item, Validation

BEST, FINAL = "best", "final"
REPORT_EVERY_S = 60.0


class Judge:
    """Judges and publishes what one training makes; of several processes the first one does."""

    def __init__(
        self,
        run: TrainRun,
        model: LoadedModel,
        dataset: Dataset,
        latents: LatentCache,
        texts: TextCache,
        schedule: NoiseSchedule,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        """Encodes the sample prompts: to be made while the text encoders are still at hand."""
        self._run, self._model, self._dataset, self._say = run, model, dataset, say
        self._accelerator = accelerator
        train = run.train
        self._live_text = LiveText(model.pipeline) if train.train_text_encoder else None
        items = [self._item(example, latents, texts) for example in dataset.held_out]
        self._validation = Validation(items, schedule, seed=train.seed) if items else None
        draws = train.samples and bool(train.sample_prompts) and accelerator.is_main_process
        self._sampler = Sampler(model, as_drawn(train, run.paths.folder("wildcards")), train, say) if draws else None
        self._scorer = self._build_scorer() if train.score and self._sampler is not None else None
        self._reported_at = time.monotonic()
        self._best_step: int | None = None

    def start(self, saver: Saver | ModelSaver, history: History) -> None:
        """What exists only once the network is there."""
        self._saver, self._history = saver, history

    def before(self, progress: Progress) -> None:
        """The base model's own loss, pictures and score: what the result is compared with."""
        self.judge(progress)

    def judge(self, progress: Progress) -> None:
        """Measure what would be saved now."""
        step = progress.step
        saver = self._saver
        average = nullcontext() if saver.average is None else saver.average.swapped_in(saver.network.trainable())
        unet, autocast = self._model.pipeline.unet, self._autocast
        with average:
            if self._validation is not None:
                with progress.timed("validation"):
                    encoders = () if self._live_text is None else self._live_text.encoders
                    loss = self._validation.loss(unet, self._model.device, autocast, encoders)
                self._history.add("validation", step, loss=loss)
            if self._sampler is None:
                return
            with progress.timed("samples"):
                pictures = self._sampler.draw(unet, autocast)
        prompts, seed = self._sampler.prompts, self._run.train.sample_seed
        save_samples(self._root, step, pictures, prompts, seed)
        train = self._run.train  # a resume may ask for others: only what was drawn alike is compared
        drawn = {"seed": seed, "steps": train.sample_inference_steps, "guidance": train.sample_guidance_scale}
        drawn |= {"prompts": list(prompts)}
        self._history.add("samples", step, **drawn)
        if self._scorer is not None:
            score = self._scorer.score(pictures)
            self._history.add("score", step, clip_i=score.clip_i, clip_t=score.clip_t, drawn=drawn)

    def save(self, progress: Progress) -> None:
        """A checkpoint, and what follows from it: the best one by name, old ones pruned, the report."""
        self._history.flush()  # first: a resume from this checkpoint does not judge it again
        with progress.timed("checkpoints"):
            checkpoint = self._saver.save(progress)
        self._history.add("checkpoint", progress.step, folder=checkpoint.folder.name)
        self._history.flush()
        self.follow_up()
        if time.monotonic() - self._reported_at > REPORT_EVERY_S:  # its charts take seconds
            self.report(progress)

    def follow_up(self) -> None:
        """What follows from a checkpoint, and again at the end: the process may have been killed between the two."""
        best = self._name_the_best()  # protected also where it could not be published
        self._saver.store.prune(self._run.train.keep, () if best is None else (best.step,))

    def _name_the_best(self) -> Best | None:
        """Publish ``best/``, what the best checkpoint learnt, when it is another one than before; returns which it is."""
        checkpoints = {checkpoint.step: checkpoint for checkpoint in self._saver.store.valid()}
        best = choose_best(self._history, checkpoints.keys())
        if best is None or best.step == self._best_step:
            return best
        source = checkpoints[best.step]
        facts = {"best_of": source.folder.name, "reason": best.reason}
        try:
            self._saver.store.publish(BEST, self._saver.result_of(source), facts, best.step)
        except UserError as error:  # on Windows another program may look into it; the checkpoint has been saved
            self._say(f"best    not renewed, tried again at the next checkpoint: {error}")
        else:
            self._best_step = best.step
        return best

    def publish_final(self, progress: Progress) -> Path:
        """``final/``: what was learnt as it is now, without the state of the training."""
        return self._saver.store.publish(FINAL, self._saver.result(progress.step), {}, progress.step)

    def best_line(self) -> str | None:
        """Which checkpoint is the best, and by what."""
        best = self._best()
        return None if best is None else f"checkpoint-{best.step} ({best.reason})"

    def report(self, progress: Progress) -> Path:
        """Write ``report.html`` anew."""
        self._reported_at = time.monotonic()
        return write(
            self._root, self._run, self._history, photos=self._dataset.train, facts=self._report_facts(progress),
            seconds=progress.seconds, best=self._best(),
        )  # fmt: skip

    def _report_facts(self, progress: Progress) -> dict[str, Any]:
        """The head of the report."""
        dataset, precision = self._dataset, self._accelerator.mixed_precision
        return {
            "trigger": dataset.trigger,
            "model": f"{self._model.name} ({self._model.family})",
            "machine": f"{self._model.device_name}, {'fp32' if precision == 'no' else precision}",
            "pictures": f"{len(dataset.train)} learnt, {len(dataset.held_out)} held out",
            "steps": f"{progress.step:,}",
            "skipped steps": progress.skipped or None,
        }

    def _best(self) -> Best | None:
        return choose_best(self._history, [checkpoint.step for checkpoint in self._saver.store.valid()])

    @property
    def _root(self) -> Path:
        return self._saver.store.root

    def _autocast(self) -> AbstractContextManager:
        return self._accelerator.autocast()

    def _item(self, example: Example, latents: LatentCache, texts: TextCache) -> Item:
        """A held-out picture, with its first caption."""
        caption, is_sdxl = example.captions[0], self._model.family == "SDXL"
        text: Text | Callable[[], Text] = texts.get(caption, texts.chunks(caption))
        if self._live_text is not None:
            text = self._live_encoder(caption, texts.chunks(caption))
        return latents.get(example), text, time_ids(example) if is_sdxl else None

    def _live_encoder(self, caption: str, chunks: int) -> Callable[[], Text]:
        def encode() -> Text:
            tokens, pooled = self._live_text([caption], chunks)
            return Text(tokens[0], None if pooled is None else pooled[0])

        return encode

    def _build_scorer(self) -> Scorer | None:
        clip = load_clip(self._run.model.model_id, self._run.paths.folder("cache"), self._say)
        if clip is None:
            return None
        step = -(-len(self._dataset.train) // MAX_PHOTOS)  # a few of them: thousands would fill the memory
        photos: list[Image.Image] = [load_picture(example) for example in self._dataset.train[::step]]
        return Scorer(clip, photos, self._sampler.prompts, self._dataset.trigger)

"""Draw a list of jobs: save each picture at once, remember what is finished, and let no bad job end the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import files, images
from src.errors import ExitCode, UserError
from src.jobs import Journal
from src.request import LoraChoice, PictureRequest
from src.terminal import Terminal

if TYPE_CHECKING:
    from PIL import Image

    from src.generator import Step, TextToImageGenerator


@dataclass(slots=True)
class Job:
    """One request, or the error that its line holds. ``line`` is its place in a job file."""

    request: PictureRequest | None = None
    error: UserError | None = None
    line: int | None = None
    id: str = ""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What shall happen beside drawing."""

    folder: Path
    prefix: str
    grid: bool = False
    preview_every: int | None = None
    metadata: bool = True
    journal: Journal | None = None  # with one, finished pictures are not drawn again


class Session:
    """One run of the program: jobs in, files and lines out."""

    def __init__(self, generator: TextToImageGenerator, terminal: Terminal, wishes: Wishes) -> None:
        self._generator, self._terminal, self._wishes = generator, terminal, wishes
        self._stem = f"{wishes.prefix}_{datetime.now():%Y%m%d_%H%M%S}"
        self._saved = 0
        self._steps_done = 0.0

    def run(self, jobs: Sequence[Job]) -> ExitCode:
        """Draw all jobs. With one job its error is raised; with several each error is reported and the rest is drawn."""
        failed = 0
        drawable = [job.request for job in jobs if job.request is not None]
        self._terminal.start_progress(
            sum(item.num_images for item in drawable), max((item.num_inference_steps for item in drawable), default=1)
        )
        try:
            for job in jobs:
                try:
                    self._draw(job)
                except UserError as error:
                    if job.line is None:
                        raise
                    failed += 1
                    self._terminal.error(str(error), error.exit_code, job.line)
        finally:
            self._terminal.end_progress()
        if failed:
            self._terminal.say(f"{failed} of {len(jobs)} jobs failed; the others are done")
        return ExitCode.PARTLY_FAILED if failed else ExitCode.OK

    def _draw(self, job: Job) -> None:
        if job.request is None:
            raise job.error or ValueError("a job holds a request or an error")
        request, journal = job.request, self._wishes.journal
        if request.seed is None and journal is not None:
            request.seed = journal.seed_of(job.id)
        finished = {}
        if journal is not None:
            found = {index: journal.finished(job.id, index) for index in range(request.num_images)}
            finished = {index: path for index, path in found.items() if path is not None}
        for path in finished.values():
            self._terminal.skipped(path, job.line or 0)
        drawn = []
        for first, count in _gaps(request.num_images, finished):
            drawn += self._draw_part(job, first, count)
        if self._wishes.grid and len(drawn) > 1:
            self._save_grid(drawn)
        self._steps_done += len(finished) * request.num_inference_steps

    def _draw_part(self, job: Job, first: int, count: int) -> list[tuple[Image.Image, int]]:
        """Draw ``count`` pictures of a job from the ``first``; returns them with their seeds, if a grid needs them."""
        request = replace(job.request, num_images=count)
        if request.seed is not None:
            request.seed = job.request.seed_of(first)
        kept = []
        for offset, picture in enumerate(self._generator.draw(request, lambda step: self._on_step(request, step))):
            if job.request.seed is None:  # drawn by the generator just now
                job.request.seed = request.seed
            seed = request.seed_of(offset)
            self._save(job, request, first + offset, seed, picture)
            if self._wishes.grid:
                kept.append((picture, seed))
        self._steps_done += count * request.num_inference_steps
        return kept

    def _save(self, job: Job, request: PictureRequest, index: int, seed: int, picture: Image.Image) -> None:
        time_s = picture.info["time_s"]
        if not self._wishes.metadata:
            picture.info = {}
        path = images.save_picture(picture, self._wishes.folder, self._stem, self._saved)
        self._saved += 1
        if self._wishes.journal is not None:
            self._wishes.journal.record(job.id, index, path, job.request.seed)
        facts = {
            "prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": seed,
            "width": picture.width, "height": picture.height, "steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale, "scheduler": request.scheduler,
            "model": self._generator.model.name, "time_s": round(time_s, 3),
        }  # fmt: skip
        self._terminal.picture(path, facts if job.line is None else {"line": job.line, **facts})

    def _save_grid(self, drawn: Sequence[tuple[Image.Image, int]]) -> None:
        sheet = images.contact_sheet([picture for picture, _ in drawn], [f"seed {seed}" for _, seed in drawn])
        path = images.save_picture(sheet, self._wishes.folder, f"{self._stem}_grid", 0)
        self._terminal.say(f"grid    {path}")

    def _on_step(self, request: PictureRequest, step: Step) -> None:
        steps = request.num_inference_steps
        done = step.pictures_done + step.fraction * step.batch_size
        self._terminal.progress(self._steps_done + done * steps, f"picture {self._saved + 1}")
        every = self._wishes.preview_every
        if every and round(step.fraction * steps) % every == 0:
            sheet = images.contact_sheet(self._generator.preview(step.latents()))
            files.publish_bytes(self._wishes.folder / "preview.png", images.encode_png(sheet, {}))


def job_settings(request: PictureRequest, model_id: str, vae: str | None) -> dict[str, Any]:
    """What decides how a job's pictures look, for its id: another batch size draws the same pictures."""
    settings = {item.name: _as_json(getattr(request, item.name)) for item in fields(request) if item.name != "batch_size"}
    return settings | {"model_id": model_id, "vae": vae}


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return [value.name, hashlib.sha256(value.read_bytes()).hexdigest()]
    if isinstance(value, LoraChoice):
        return [str(value.path), value.weight]
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


def _gaps(count: int, finished: dict[int, Path]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive indices below ``count`` that are not finished, as (first, length)."""
    first = None
    for index in range(count + 1):
        missing = index < count and index not in finished
        if missing and first is None:
            first = index
        elif not missing and first is not None:
            yield first, index - first
            first = None

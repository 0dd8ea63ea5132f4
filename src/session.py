"""Draw a list of jobs: save each picture at once, remember what is finished, and let no bad job end the others."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from src import files, images
from src.errors import ExitCode, UserError, explain_unexpected
from src.jobs import Journal
from src.request import PictureRequest
from src.terminal import Terminal

if TYPE_CHECKING:
    from PIL import Image

    from src.generator import Step, TextToImageGenerator


FULL_SIZE_GRID = 36  # pictures up to which a contact sheet shows them in full size
GRID_CELL_PX = 256  # beyond that: memory must not grow with the number of jobs


@dataclass(slots=True)
class Job:
    """One request, or the error that its line holds. ``line`` is its place in a job file."""

    request: PictureRequest | None = None
    error: UserError | None = None
    line: int | None = None
    id: str = ""
    share: range | None = None  # the pictures of it that this process draws; None: all

    @property
    def pictures(self) -> range:
        """The indices of the pictures to draw."""
        return range(self.request.num_images) if self.share is None else self.share


@dataclass(frozen=True, slots=True)
class Wishes:
    """What shall happen beside drawing."""

    folder: Path
    prefix: str
    grid: bool = False
    preview_every: int | None = None
    metadata: bool = True
    debug: bool = False  # show the tracebacks of unexpected errors
    journal: Journal | None = None  # with one, finished pictures are not drawn again
    first_number: int = 0  # of the files; several processes count on from each other


class Session:
    """One run of the program: jobs in, files and lines out."""

    def __init__(self, generator: TextToImageGenerator, terminal: Terminal, wishes: Wishes) -> None:
        self._generator, self._terminal, self._wishes = generator, terminal, wishes
        self._stem = f"{wishes.prefix}_{datetime.now():%Y%m%d_%H%M%S}"
        self._saved = self._planned = self._asked = 0  # asked: finished ones included
        self._steps_done = 0.0
        self._preview_path: Path | None = None
        self._grid: dict[tuple[int, int], tuple[Image.Image, int]] = {}  # line and index -> picture, seed

    def first_request(self, jobs: Sequence[Job]) -> PictureRequest | None:
        """The first that has pictures left to draw, so that a model is worth loading; None where all are drawn."""
        return next((job.request for job in jobs if job.request is not None and self._missing(job)), None)

    def run(self, jobs: Sequence[Job]) -> ExitCode:
        """Draw all jobs. With one job its error is raised; with several each error is reported and the rest is drawn."""
        failed = 0
        counts = [(len(self._missing(job)), job.request.num_inference_steps) for job in jobs if job.request is not None]
        self._planned = sum(pictures for pictures, _ in counts)
        self._asked = sum(len(job.pictures) for job in jobs if job.request is not None)
        self._terminal.start_progress(sum(pictures * steps for pictures, steps in counts))
        try:
            for job in jobs:
                failed += not self._try(job)
        finally:
            self._terminal.end_progress()
        self._save_grid()
        if failed:
            others = "the others are done" if failed < len(jobs) else "nothing was drawn"
            self._terminal.say(f"{failed} of {len(jobs)} jobs failed; {others}")
        return ExitCode.PARTLY_FAILED if failed else ExitCode.OK

    def _try(self, job: Job) -> bool:
        """Draw a job; report what goes wrong with a line of a job file, so that the others are still drawn."""
        try:
            self._draw(job)
        except UserError as error:
            if job.line is None:
                raise
            self._terminal.error(str(error), error.exit_code, job.line)
            return False
        except Exception as error:
            if job.line is None:
                raise
            if self._wishes.debug:
                traceback.print_exception(error)
            self._terminal.error(explain_unexpected(error), ExitCode.FAILURE, job.line)
            return False
        return True

    def _finished(self, job: Job) -> dict[int, Path]:
        """The pictures of a job that earlier runs finished, by index."""
        journal = self._wishes.journal
        if journal is None or job.request is None:
            return {}
        found = {index: journal.finished(job.id, index) for index in job.pictures}
        return {index: path for index, path in found.items() if path is not None}

    def _missing(self, job: Job) -> list[int]:
        finished = self._finished(job)
        return [index for index in job.pictures if index not in finished]

    def _draw(self, job: Job) -> None:
        if job.request is None:
            raise job.error or ValueError("a job holds a request or an error")
        if job.request.seed is None and self._wishes.journal is not None:
            job.request.seed = self._wishes.journal.seed_of(job.id)
        finished = self._finished(job)
        for index, path in finished.items():
            self._terminal.skipped(path, job.line or 0)
            if self._wishes.grid:
                self._read_for_grid(job, index, path)
        for first, count in _gaps(job.pictures, finished):
            self._draw_part(job, first, count)

    def _draw_part(self, job: Job, first: int, count: int) -> None:
        """Draw ``count`` pictures of a job from the ``first``, and save each at once."""
        request = replace(job.request, num_images=count)
        if request.seed is not None:
            request.seed = job.request.seed_of(first)
        for offset, picture in enumerate(self._generator.draw(request, lambda step: self._on_step(request, step))):
            if job.request.seed is None:  # drawn by the generator just now
                job.request.seed = request.seed
            self._save(job, first + offset, picture)
        self._steps_done += count * request.num_inference_steps

    def _save(self, job: Job, index: int, picture: Image.Image) -> None:
        drawn = picture.info["drawn"]
        if not self._wishes.metadata:
            picture.info = {}
        journal, seed, number = self._wishes.journal, job.request.seed, self._wishes.first_number + self._saved

        def announce(path: Path, data: bytes) -> None:
            if journal is not None:
                journal.announce(job.id, index, path, seed, data)

        path = images.save_picture(picture, self._wishes.folder, self._stem, number, announce)
        self._saved += 1
        if journal is not None:
            journal.record(job.id, index, path, seed)
        if self._wishes.grid:
            self._keep_for_grid(job, index, picture)
        facts = {
            "prompt": drawn.prompt, "negative_prompt": drawn.negative_prompt, "seed": drawn.seed, "width": drawn.width,
            "height": drawn.height, "steps": drawn.num_inference_steps, "guidance_scale": drawn.guidance_scale,
            "scheduler": drawn.scheduler, "model": drawn.model.name,
            "loras": [[item.name, item.weight] for item in drawn.loras],
            "precision": drawn.precision, "device": drawn.device, "time_s": drawn.time_s,
        }  # fmt: skip
        self._terminal.picture(path, facts if job.line is None else {"line": job.line, **facts})

    def _read_for_grid(self, job: Job, index: int, path: Path) -> None:
        try:
            self._keep_for_grid(job, index, images.read_image(path))
        except UserError as error:
            self._terminal.say(f"grid    without {error}")

    def _keep_for_grid(self, job: Job, index: int, picture: Image.Image) -> None:
        small = picture.copy()
        if self._asked > FULL_SIZE_GRID:
            small.thumbnail((GRID_CELL_PX, GRID_CELL_PX))
        self._grid[job.line or 0, index] = (small, job.request.seed_of(index))

    def _save_grid(self) -> None:
        if self._wishes.grid and len(self._grid) < 2:
            self._terminal.say("grid    not made: it takes two pictures or more")
        elif self._wishes.grid:
            pictures, seeds = zip(*(self._grid[place] for place in sorted(self._grid)))
            sheet = images.contact_sheet(pictures, [f"seed {seed}" for seed in seeds])
            self._terminal.say(f"grid    {images.save_picture(sheet, self._wishes.folder, f'{self._stem}_grid', 0)}")

    def _on_step(self, request: PictureRequest, step: Step) -> None:
        steps = request.num_inference_steps
        done = step.pictures_done + step.fraction * step.batch_size
        number = f"{self._saved + 1}-{self._saved + step.batch_size}" if step.batch_size > 1 else f"{self._saved + 1}"
        self._terminal.progress(self._steps_done + done * steps, f"picture {number} of {self._planned}")
        every = self._wishes.preview_every
        if every and round(step.fraction * steps) % every == 0:
            self._write_preview(self._generator.preview(step.latents()))

    def _write_preview(self, pictures: Sequence[Image.Image]) -> None:
        if not pictures:
            return
        if self._preview_path is None:
            self._preview_path = self._wishes.folder / f"{self._stem}_preview.png"
            self._terminal.say(f"preview {self._preview_path}")
        with contextlib.suppress(UserError):  # on Windows a viewer may have it open; the next one will do
            files.publish_bytes(self._preview_path, images.encode_png(images.contact_sheet(pictures), {}))


def _gaps(pictures: range, finished: dict[int, Path]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive indices in ``pictures`` that are not finished, as (first, length)."""
    first = None
    for index in range(pictures.start, pictures.stop + 1):
        missing = index < pictures.stop and index not in finished
        if missing and first is None:
            first = index
        elif not missing and first is not None:
            yield first, index - first
            first = None

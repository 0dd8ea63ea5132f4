"""``TextToImageGenerator``: load a model, load adapters, draw, save. The command line is a thin door to this class."""

from __future__ import annotations

import gc
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from src import base_models, conditioning, denoising, files, images, memory_plan, optimizations, prompts
from src.config import AppConfig
from src.drawn_recipe import describe_picture
from src.errors import usage_error
from src.lora import Adapter, AdapterStack, LoraReport, read_adapter
from src.request import MAX_SEED, LoraChoice, PictureRequest
from src.schedulers import build_scheduler, find_sampler

KEPT_ADAPTERS = 4  # read adapters that stay in memory when they are not in use, so that swapping back is instant


@dataclass(frozen=True, slots=True)
class Step:
    """Where a running request stands, handed to ``on_step``."""

    pictures_done: int  # finished before this batch
    batch_size: int
    fraction: float  # of this batch's steps, 0 to 1
    latents: Callable[[], torch.Tensor]  # () -> (B, 4, h, w): the finished latents as they are expected now


@dataclass(frozen=True, slots=True)
class Task:
    """One picture to draw: its seed, and its prompt with wildcards filled in."""

    seed: int
    prompt: str  # as recorded, <lora:...> kept
    text: str  # as encoded, <lora:...> taken out
    loras: tuple[LoraChoice, ...]
    conditioning: conditioning.Conditioning

    def fits_beside(self, other: Task) -> bool:
        """Whether both can be drawn in one batch: an embedding is never filled up to a neighbour's length."""
        return self.loras == other.loras and self.conditioning.length == other.conditioning.length


class TextToImageGenerator:
    """Draws pictures with one Stable Diffusion model.

    >>> generator = TextToImageGenerator(config)
    >>> generator.load_model()
    >>> pictures = generator.generate("a serene Japanese garden", seed=42, num_images=2)
    >>> generator.save_images(pictures, prefix="garden")

    What a person can mend is raised as ``UserError``: one line, with an exit code.
    """

    def __init__(self, config: AppConfig | None = None, say: Callable[[str], None] = lambda line: None) -> None:
        """``say`` receives a line whenever something happens that the user should know."""
        self.config = config or AppConfig()
        self.say = say
        self.allow_partial = False  # use adapters of which only a part fits the model
        self._forget()

    # -- model

    def load_model(self) -> None:
        """Load the configured model and place it by a memory plan. Raises UserError."""
        self.unload()
        started = time.monotonic()
        self._model = model = base_models.load(self.config)
        self._adapters = AdapterStack(model.pipeline, model.family)
        self._budget_bytes = optimizations.memory_budget(model.device, self.config.optimization)
        self.say(
            f"model   {model.name} ({model.family}), {model.precision} on {model.device}, {time.monotonic() - started:.1f} s"
        )
        self._place(PictureRequest.from_config(self.config.generation, prompt="-"))

    def unload(self) -> None:
        """Free the model, its adapters and the memory they held."""
        self._forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def weights_sha256(self) -> str:
        """SHA-256 of the model's weights (the U-Net's file, or the single file); read once, then remembered on disk."""
        return files.sha256_of(self.model.weights_path, Path(self.config.paths.cache) / "hashes.json")

    @property
    def model(self) -> base_models.LoadedModel:
        """The loaded model; loaded now, if it is not yet."""
        if self._model is None:
            self.load_model()
        return self._model

    def _forget(self) -> None:
        self._model: base_models.LoadedModel | None = None
        self._adapters: AdapterStack | None = None
        self._plan: memory_plan.Plan | None = None
        self._budget_bytes: int | None = None
        self._loras: tuple[LoraChoice, ...] = ()  # loaded to stay
        self._in_use: tuple[LoraChoice, ...] = ()  # attached right now
        self._reports: tuple[LoraReport, ...] = ()
        self._read_adapters: dict[tuple[Path, int], Adapter] = {}

    def _place(self, request: PictureRequest) -> None:
        """Choose a memory plan for the request's size and apply it, if it is another one than now."""
        model, options = self.model, self.config.optimization
        need = memory_plan.Request(
            width_px=request.width or model.native_size_px,
            height_px=request.height or model.native_size_px,
            batch_size=min(request.batch_size, request.num_images),
            guidance=request.guidance_scale > 1,
            precision=model.precision,
        )
        plan = memory_plan.choose(memory_plan.read_shapes(model.config_folder), need, self._budget_bytes, options)
        if self._plan is None or plan.placement != self._plan.placement:
            optimizations.apply(model.pipeline, plan.placement, options, model.device)
            self.say(f"plan    {memory_plan.describe(plan)}")
        self._plan = plan

    # -- adapters

    def load_lora_weights(self, path: str | Path, scale: float = 1.0) -> LoraReport:
        """Add an adapter to the running model, or change the scale of one that is there; the base is not touched.

        Returns what was matched. Raises UserError for an adapter that is missing, damaged, of another model family,
        or (unless ``allow_partial`` is set) fits only in part; the adapters loaded before stay as they were.
        """
        choice = LoraChoice(Path(path).expanduser(), scale)
        return self.set_loras([*(item for item in self._loras if item.path != choice.path), choice])[-1]

    def unload_lora_weights(self) -> None:
        """Take all adapters off: the base's output is back, bit for bit."""
        self.set_loras([])

    def set_loras(self, choices: Sequence[LoraChoice]) -> list[LoraReport]:
        """Make exactly these the loaded adapters. Returns a report for each."""
        self._use(tuple(choices))
        self._loras = tuple(choices)
        return list(self._reports)

    def _use(self, choices: tuple[LoraChoice, ...]) -> None:
        """Attach exactly these adapters; those that were not in use before are reported."""
        self.model  # noqa: B018 - there must be something to attach to
        if choices == self._in_use:
            return
        adapters = [(self._read_adapter(choice.path), choice.weight) for choice in choices]
        self._reports = tuple(self._adapters.set(adapters, allow_partial=self.allow_partial))
        before = {choice.path for choice in self._in_use}
        for choice, report in zip(choices, self._reports):
            if choice.path not in before:
                self.say(f"lora    {report.line()}, weight {choice.weight:g}")
        self._in_use = choices

    def _read_adapter(self, path: Path) -> Adapter:
        """Read an adapter once, and again when its file has changed."""
        key = (path, path.stat().st_mtime_ns if path.exists() else 0)
        adapter = self._read_adapters.pop(key, None) or read_adapter(path)
        self._read_adapters[key] = adapter  # the newest last
        for old in list(self._read_adapters)[:-KEPT_ADAPTERS]:
            del self._read_adapters[old]
        return adapter

    # -- pictures

    def generate(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        num_images: int | None = None,
        batch_size: int | None = None,
        scheduler: str | None = None,
        clip_skip: int | None = None,
        init_image: str | Path | Image.Image | None = None,
        mask_image: str | Path | Image.Image | None = None,
        strength: float | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> list[Image.Image]:
        """Draw pictures; what is not given is taken from ``config.generation``.

        Each picture carries its recipe in ``image.info`` ("parameters" as A1111 writes it, "recipe" as JSON), which
        ``save_images`` stores. Picture i has the seed ``seed + i`` and is the same at any ``batch_size``.
        """
        settings = {name: value for name, value in locals().items() if name not in ("self", "prompt", "on_step")}
        for name in ("init_image", "mask_image"):
            settings[name] = Path(settings[name]) if isinstance(settings[name], str) else settings[name]
        return list(self.draw(PictureRequest.from_config(self.config.generation, prompt, **settings), on_step))

    def draw(self, request: PictureRequest, on_step: Callable[[Step], None] | None = None) -> Iterator[Image.Image]:
        """Draw a request's pictures and yield each as soon as it is finished; a seed of None is drawn and set.

        Adapters named in the prompt or the request come on top of the loaded ones, for this request only.
        """
        request.check()
        if request.seed is None:
            request.seed = secrets.randbelow(MAX_SEED + 1)
        try:
            with optimizations.memory_errors(request):
                yield from self._draw(request, on_step)
        finally:
            if self._model is not None:
                self._use(self._loras)

    def preview(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (B, 4, h, w), such as ``Step.latents()`` gives -> small pictures of what is becoming of them."""
        pipeline = self.model.pipeline
        return denoising.preview(pipeline.vae, latents, pipeline._execution_device)

    def save_images(
        self, pictures: Sequence[Image.Image], prefix: str | None = None, output_dir: str | Path | None = None
    ) -> list[Path]:
        """Save as ``PREFIX_YYYYMMDD_HHMMSS_NNN.png``, recipe included; never over another file. Returns the paths."""
        folder = files.check_writable_folder(Path(output_dir or self.config.paths.outputs))
        stem = f"{prefix or self.config.paths.prefix}_{datetime.now():%Y%m%d_%H%M%S}"
        return [images.save_picture(picture, folder, stem, index) for index, picture in enumerate(pictures)]

    def _draw(self, request: PictureRequest, on_step: Callable[[Step], None] | None) -> Iterator[Image.Image]:
        model = self.model
        if model.pipeline.unet.config.in_channels == 9 and request.mode != "inpaint":
            raise usage_error(f"{model.name} is an inpainting model; give it a picture with --init-image and a --mask")
        start = self._read_start(request)
        request = replace(request, width=request.width or model.native_size_px, height=request.height or model.native_size_px)
        self._place(request)
        done = 0
        for batch in self._batches(request):
            started = time.monotonic()
            optimizations.reset_peak(model.device)
            latents = self._denoise(request, batch, start, on_step and partial(_report_step, on_step, done, len(batch)))
            for task, latent in zip(batch, latents):
                picture = self._decode(latent[None])
                if start is not None and start.mask is not None:
                    picture = denoising.keep_outside_mask(picture, start)
                seconds = (time.monotonic() - started) / len(batch)
                loras = [
                    (self._read_adapter(choice.path), choice.weight, report)
                    for choice, report in zip(task.loras, self._reports)
                ]
                picture.info = describe_picture(
                    model, self.weights_sha256(), request, task.seed, task.prompt, loras, self._plan, self.config, seconds
                )
                picture.info["time_s"] = seconds
                done += 1
                yield picture

    def _batches(self, request: PictureRequest) -> Iterator[list[Task]]:
        """The request's pictures in batches of at most ``batch_size`` that can be drawn together."""
        batch: list[Task] = []
        for index in range(request.num_images):
            task = self._plan_task(request, request.seed_of(index), batch[-1] if batch else None)
            if batch and (len(batch) == request.batch_size or not task.fits_beside(batch[0])):
                yield batch
                batch = []
            batch.append(task)
        yield batch

    def _plan_task(self, request: PictureRequest, seed: int, before: Task | None) -> Task:
        """Fill in wildcards, find the adapters, and encode, unless the picture before has the same text and adapters."""
        prompt = prompts.expand_wildcards(prompts.clean_prompt(request.prompt), seed, Path(self.config.paths.wildcards))
        text, tags = prompts.extract_loras(prompt)
        named = (LoraChoice.named(Path(self.config.paths.lora), tag.name, tag.weight) for tag in tags)
        loras = (*self._loras, *request.loras, *named)
        if before is not None and (before.text, before.loras) == (text, loras):
            return replace(before, seed=seed, prompt=prompt)
        self._use(loras)  # adapters change the text encoders, too
        negative = prompts.clean_prompt(request.negative_prompt)
        encoded = conditioning.encode(
            self.model.pipeline, text, negative, clip_skip=request.clip_skip, weighted=request.prompt_weights
        )
        return Task(seed, prompt, text, loras, encoded)

    def _denoise(
        self, request: PictureRequest, batch: list[Task], start: denoising.Start | None, report: denoising.StepCallback | None
    ) -> torch.Tensor:
        """One batch through the U-Net: latents (B, 4, h, w)."""
        model = self.model
        self._use(batch[0].loras)
        model.pipeline.scheduler = build_scheduler(find_sampler(request.scheduler), model.scheduler_config)
        sources = denoising.generators([task.seed for task in batch])
        try:
            return denoising.denoise(model.pipeline, request, [task.conditioning for task in batch], sources, start, report)
        except denoising.NotFinite as error:
            raise denoising.explain_not_finite(error, model.precision) from None

    def _decode(self, latents: torch.Tensor) -> Image.Image:
        """Latents (1, 4, h, w) -> a picture; once more in fp32 when the VAE's precision was too small for it."""
        pipeline = self.model.pipeline
        try:
            pixels = denoising.decode(pipeline.vae, latents)
        except denoising.NotFinite as error:
            if pipeline.vae.dtype == torch.float32:
                raise denoising.explain_not_finite(error, "fp32") from None
            self.say("vae     its output held no numbers in this precision; decoding again in fp32")
            optimizations.use_float32_vae(pipeline, self._plan.placement, self.config.optimization, self.model.device)
            pixels = denoising.decode(pipeline.vae, latents)
        if denoising.is_flagged(pipeline, pixels):
            self.say("safety  the model's checker blacked this picture out; --no-safety-checker draws without it")
            pixels = torch.zeros_like(pixels)
        return denoising.to_picture(pixels)

    def _read_start(self, request: PictureRequest) -> denoising.Start | None:
        """Read the picture and mask to start from, and set the request's size to the picture's where none is given."""
        if request.init_image is None:
            return None
        picture = (
            images.read_image(request.init_image) if isinstance(request.init_image, Path) else request.init_image.convert("RGB")
        )
        mask = images.read_mask(request.mask_image) if isinstance(request.mask_image, Path) else request.mask_image
        width_px, height_px = fitting_size(picture.size, self.model.native_size_px)
        request.width, request.height = request.width or width_px, request.height or height_px
        size_px = (request.width, request.height)
        if picture.size != size_px:
            self.say(f"start   {picture.width}x{picture.height} picture scaled and cropped to {size_px[0]}x{size_px[1]}")
        return denoising.Start(images.fit_to(picture, *size_px), images.fit_to(mask.convert("L"), *size_px) if mask else None)


def fitting_size(picture_px: tuple[int, int], native_px: int) -> tuple[int, int]:
    """The size to draw over a picture: its own, or, above twice the model's native area, scaled down to that area."""
    width_px, height_px = picture_px
    scale = min(1.0, (2 * native_px**2 / (width_px * height_px)) ** 0.5)
    width_px, height_px = (max(64, round(side * scale / 8) * 8) for side in (width_px, height_px))
    return width_px, height_px


def _report_step(
    on_step: Callable[[Step], None], done: int, batch_size: int, step: int, steps: int, latents: Callable[[], torch.Tensor]
) -> None:
    on_step(Step(done, batch_size, step / steps, latents))

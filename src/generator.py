"""``TextToImageGenerator``: load a model, load adapters, draw, save. The command line is a thin door to this class."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from src import base_models, conditioning, denoising, files, images, model_shapes, model_source, optimizations, prompts
from src.config import AppConfig, ModelConfig, OptimizationConfig, check_types
from src.drawn_recipe import describe_picture, picture_ref
from src.errors import is_out_of_memory, usage_error
from src.lora.shelf import LoraShelf, last_of_each
from src.lora.stack import AdapterStack, LoraReport
from src.memory_ladder import MemoryLadder, Result, announce
from src.memory_plan import PLANNED
from src.recipe import to_text_chunks
from src.request import MAX_SEED, LoraChoice, PictureRequest
from src.schedulers import build_scheduler, find_sampler


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
    negative: str
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

    def load_model(self, request: PictureRequest | None = None) -> None:
        """Load the model as configured, adapters kept, and place it by a plan for ``request`` (None: as configured, too)."""
        loras = self._loras
        self.unload()
        self._loras = loras  # at once: should loading fail, they are attached when it succeeds
        check_types(self.config)
        request = request or PictureRequest.from_config(self.config.generation, prompt="-")
        announced = announce(self.config, request, self.say)
        started = time.monotonic()
        model = base_models.load(self.config)
        shapes = model_shapes.read_shapes(model.config_folder, model.pipeline.unet.config.in_channels)
        shapes = replace(shapes, vae=dict(model.pipeline.vae.config))  # another one may do without fp32
        took = f"{time.monotonic() - started:.1f} s"
        self.say(f"model   {model.name} ({model.family}), {model.precision} on {model.device}, {took}")
        unused = base_models.idle_card(self.config.model.device, model.device)
        for line in [*([unused] if unused else []), *model_source.idle_settings(self.config.model)]:
            self.say(f"idle    {line}")
        memory = MemoryLadder(
            model, shapes, lambda: self.config, lambda: self._shelf.files() if self._shelf else [], self.say, announced
        )
        memory.place(request)
        shelf = LoraShelf(AdapterStack(memory.model.pipeline, model.family), self.say)  # quantising has exchanged layers
        self._memory, self._shelf, self._loaded_from = memory, shelf, self._wanted()
        self._use(loras, request)

    def unload(self) -> None:
        """Free the model, its adapters and the memory they held."""
        self._forget()
        optimizations.free_memory()

    @property
    def model(self) -> base_models.LoadedModel:
        """The configured model; loaded now, if it is not yet, or if its configuration has changed since."""
        if self._model is None or self._loaded_from != self._wanted():
            self.load_model()
        return self._model

    @property
    def _model(self) -> base_models.LoadedModel | None:
        return None if self._memory is None else self._memory.model

    def _wanted(self) -> tuple[ModelConfig, OptimizationConfig]:
        """What decides which weights are loaded, and how; the rest is planned for each request."""
        return replace(self.config.model), replace(self.config.optimization, **PLANNED)

    def weights_sha256(self) -> str:
        """SHA-256 of the model's weights (the U-Net's file, or the single file)."""
        if self._weights_sha256 is None:
            self._weights_sha256 = files.sha256_of(self.model.weights_path, self.config.paths.folder("cache") / "hashes.json")
        return self._weights_sha256

    def _forget(self) -> None:
        self._memory: MemoryLadder | None = None  # holds the model
        self._loaded_from: tuple[ModelConfig, OptimizationConfig] | None = None
        self._weights_sha256: str | None = None
        self._shelf: LoraShelf | None = None
        self._loras: tuple[LoraChoice, ...] = ()  # loaded to stay; the shelf knows what is in use right now

    # -- adapters

    def load_lora_weights(self, path: str | Path, scale: float = 1.0) -> LoraReport:
        """Add an adapter to the running model, or change the scale of one that is there; the base is not touched.

        Returns what was matched. Raises UserError for an adapter that is missing, damaged, of another model family,
        or (unless ``allow_partial`` is set) fits only in part; the adapters loaded before stay as they were.
        """
        choice = LoraChoice(path, scale)
        self.set_loras([*self._loras, choice])
        return next(item.report for item in self._shelf.attached if item.choice.path.resolve() == choice.path.resolve())

    def unload_lora_weights(self) -> None:
        """Take all adapters off: the base's output is back, bit for bit."""
        self.set_loras([])

    def set_loras(self, choices: Sequence[LoraChoice]) -> list[LoraReport]:
        """Make exactly these the loaded adapters; of one that is named twice the last counts. Returns their reports."""
        if choices or self._loras:
            self._use(last_of_each(choices))
        self._loras = last_of_each(choices)
        return [item.report for item in self._shelf.attached] if self._loras else []

    def _use(self, choices: tuple[LoraChoice, ...], request: PictureRequest | None = None) -> None:
        """Attach exactly these adapters to the model."""
        self.model  # noqa: B018 - there must be something to attach to
        request = request or PictureRequest.from_config(self.config.generation, prompt="-")
        self._memory.within(request, lambda: self._shelf.use(choices, self.allow_partial))

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
        deep_cache: int | None = None,
        token_merging: float | None = None,
        guidance_start: float | None = None,
        guidance_end: float | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> list[Image.Image]:
        """Draw pictures; what is not given is taken from ``config.generation``.

        Each picture carries its recipe in ``image.info`` ("parameters" as A1111 writes it, "recipe" as JSON), which
        ``save_images`` stores. Picture i has the seed ``seed + i`` and is the same at any ``batch_size``.
        """
        request = PictureRequest.from_config(
            self.config.generation, prompt, negative_prompt=negative_prompt, width=width, height=height,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed, num_images=num_images,
            batch_size=batch_size, scheduler=scheduler, clip_skip=clip_skip, init_image=init_image, mask_image=mask_image,
            strength=strength, deep_cache=deep_cache, token_merging=token_merging, guidance_start=guidance_start,
            guidance_end=guidance_end,
        )  # fmt: skip
        return list(self.draw(request, on_step))

    def draw(
        self,
        request: PictureRequest,
        on_step: Callable[[Step], None] | None = None,
        texts: Sequence[str] | None = None,
    ) -> Iterator[Image.Image]:
        """Draw a request's pictures and yield each as soon as it is finished; a seed of None is drawn and set.

        Adapters named in the request or its prompt come on top of the loaded ones, for this request only. ``texts``: a prompt
        for each picture, in place of the request's; what is of equal length shares a batch.
        """
        request.check()
        if request.seed is None:
            request.seed = secrets.randbelow(MAX_SEED + 1)
        if self.model.pipeline.unet.config.in_channels == 9 and request.mode != "inpaint":
            raise usage_error(f"{self.model.name} is an inpainting model; give it a picture with --init-image and a --mask")
        for line in denoising.idle_settings(self.model.pipeline, request):
            self.say(f"idle    {line}")
        start, (width_px, height_px) = self._read_start(request)
        request = replace(request, width=width_px, height=height_px)
        if reason := self._memory.why_return(request):
            self.say(f"memory  {reason}; loading the model onto the card again")
            self.load_model(request)
        self._memory.place(request)
        done = 0
        for batch in self._batches(request, texts or [request.prompt] * request.num_images):
            report = None if on_step is None else partial(_report_step, on_step, done, len(batch))
            yield from self._draw_batch(request, batch, start, report)
            done += len(batch)

    def preview(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (B, 4, h, w), such as ``Step.latents()`` gives -> small pictures of what is becoming of them.

        Empty where the estimate is still beyond the VAE's range, and, said, where memory does not suffice.
        """
        pipeline = self.model.pipeline
        try:
            return denoising.preview(pipeline.vae, latents, pipeline._execution_device)
        except denoising.NotFinite:
            return []
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            pipeline.maybe_free_model_hooks()  # under model offload the VAE would stay beside the U-Net
        optimizations.free_memory()  # outside of the except block, where the error's frames would keep what filled it
        self.say("preview left out: memory ran out; the picture goes on")
        return []

    def save_images(
        self, pictures: Sequence[Image.Image], prefix: str | None = None, output_dir: str | Path | None = None
    ) -> list[Path]:
        """Save as ``PREFIX_YYYYMMDD_HHMMSS_NNN.png``, recipe included; never over another file. Returns the paths."""
        if isinstance(pictures, Image.Image):
            pictures = [pictures]
        folder = Path(output_dir).expanduser() if output_dir else self.config.paths.folder("outputs")
        files.check_writable_folder(folder)
        stem = f"{prefix or self.config.paths.prefix}_{datetime.now():%Y%m%d_%H%M%S}"
        return [images.save_picture(picture, folder, stem, index) for index, picture in enumerate(pictures)]

    def _batches(self, request: PictureRequest, texts: Sequence[str]) -> Iterator[list[Task]]:
        """The request's pictures in batches of at most ``batch_size`` that can be drawn together."""
        # For a U-Net of 9 channels diffusers encodes the picture once, with the first seed: each must be the first.
        limit = 1 if self.model.pipeline.unet.config.in_channels == 9 else request.batch_size
        batch: list[Task] = []
        for index, text in zip(range(request.num_images), texts, strict=True):
            own = replace(request, prompt=text)
            task = self._plan_task(own, request.seed_of(index), batch[-1] if batch else None)
            if batch and (len(batch) == limit or not task.fits_beside(batch[0])):
                yield batch
                batch = []
            batch.append(task)
        yield batch

    def _plan_task(self, request: PictureRequest, seed: int, before: Task | None) -> Task:
        """Fill in wildcards, find the adapters, and encode, unless the picture before has the same text and adapters."""
        prompt, negative = prompts.clean_prompt(request.prompt), prompts.clean_prompt(request.negative_prompt)
        if request.wildcards:
            folder = self.config.paths.folder("wildcards")
            prompt, negative = (prompts.expand_wildcards(text, seed, folder) for text in (prompt, negative))
        text, tags = prompts.extract_loras(prompt)
        named = [LoraChoice.named(self.config.paths.folder("lora"), tag.name, tag.weight) for tag in tags]
        loras = last_of_each([*self._loras, *request.loras, *named])
        if before is not None and (before.text, before.negative, before.loras) == (text, negative, loras):
            return replace(before, seed=seed, prompt=prompt)
        self._use(loras, request)  # adapters change the text encoders, too
        options = {"clip_skip": request.clip_skip, "weighted": request.prompt_weights}
        # A negative prompt that is not drawn must not fill the prompt up to its own length, which would change the picture.
        away = negative if denoising.is_guided(self._model.pipeline, request) else ""
        encoded = self._memory.within(request, lambda: conditioning.encode(self._model.pipeline, text, away, **options))
        return Task(seed, prompt, text, negative, loras, encoded)

    def _draw_batch(
        self, request: PictureRequest, batch: list[Task], start: denoising.Start | None, report: denoising.StepCallback | None
    ) -> Iterator[Image.Image]:
        """Draw one batch and yield its pictures with their recipes."""
        self._use(batch[0].loras, request)
        memory, attached = self._memory, self._shelf.attached
        memory.place(request)  # adapters take memory, too
        memory.start_measuring(len(batch))
        started = time.monotonic()
        latents = memory.within(request, lambda: self._denoise(request, batch, start, report))
        seconds = (time.monotonic() - started) / len(batch)
        for task, latent in zip(batch, latents):
            started = time.monotonic()
            picture = memory.within(request, lambda latent=latent: self._decode(latent[None]))
            if start is not None and start.mask is not None:
                picture = denoising.keep_outside_mask(picture, start)
            own = replace(request, seed=task.seed, prompt=task.prompt, negative_prompt=task.negative)
            time_s = seconds + time.monotonic() - started
            refs = start.refs if start is not None else {}
            drawn = describe_picture(memory.model, self.weights_sha256(), own, attached, memory.plan, self.config, time_s, refs)
            choice = find_sampler(request.scheduler)
            picture.info = to_text_chunks(drawn, choice.sampler.label, choice.schedule_label) | {"drawn": drawn}
            if task is batch[-1]:
                memory.end_measuring()
            yield picture

    def _denoise(
        self, request: PictureRequest, batch: list[Task], start: denoising.Start | None, report: denoising.StepCallback | None
    ) -> torch.Tensor:
        """One batch through the U-Net: latents (B, 4, h, w)."""
        model = self._model
        schedule = model.scheduler_config
        if schedule.get("prediction_type") == "v_prediction" and any(
            item.adapter.has_zero_terminal_snr for item in self._shelf.attached
        ):
            schedule = schedule | {"rescale_betas_zero_snr": True}  # that on which the adapter was learnt
        model.pipeline.scheduler = build_scheduler(find_sampler(request.scheduler), schedule)
        conditionings = [task.conditioning.to(model.device, model.dtype) for task in batch]  # on the last rung, elsewhere

        def run() -> torch.Tensor:
            sources = denoising.generators([task.seed for task in batch])
            return denoising.denoise(model.pipeline, request, conditionings, sources, start, report)

        try:
            return self._with_larger_vae(run) if start is not None else run()
        except denoising.NotFinite as error:
            raise denoising.explain_not_finite(error, model.precision) from None
        finally:
            model.pipeline.maybe_free_model_hooks()  # under model offload, what ran last would stay on the card

    def _decode(self, latents: torch.Tensor) -> Image.Image:
        """Latents (1, 4, h, w) -> a picture."""
        pipeline = self._model.pipeline
        try:
            pixels = self._with_larger_vae(lambda: denoising.decode(pipeline.vae, latents.to(self._model.device)))
        except denoising.NotFinite as error:
            raise denoising.explain_not_finite(error, "fp32") from None
        finally:
            pipeline.maybe_free_model_hooks()
        if denoising.is_flagged(pipeline, pixels):
            self.say("safety  the model's checker blacked this picture out; --no-safety-checker draws without it")
            pixels = torch.zeros_like(pixels)
        return denoising.to_picture(pixels)

    def _with_larger_vae(self, action: Callable[[], Result]) -> Result:
        """Do something with the VAE, and once more in fp32 when its precision was too small: what came out was no number."""
        vae = self._model.pipeline.vae
        try:
            return action()
        except denoising.VaeNotFinite:
            if vae.dtype == torch.float32:
                raise
        self.say("vae     its output held no numbers in this precision; going on in fp32")
        optimizations.use_float32_vae(
            self._model.pipeline, self._memory.plan.placement, self.config.optimization, self._model.device
        )
        return action()

    def _read_start(self, request: PictureRequest) -> tuple[denoising.Start | None, tuple[int, int]]:
        """The picture and mask to start from, if any, and the size to draw: as asked, the picture's, or the model's own."""
        native_px = self._model.native_size_px
        if request.init_image is None:
            return None, (request.width or native_px, request.height or native_px)
        named = {"init_image": request.init_image, "mask": request.mask_image}
        refs = {name: picture_ref(image) for name, image in named.items() if image is not None}
        picture = images.read_image(start) if isinstance(start := request.init_image, Path) else images.plain(start)
        mask = None if request.mask_image is None else images.read_mask(request.mask_image)
        if mask is not None and mask.width * picture.height != mask.height * picture.width:
            sizes = f"{mask.width}x{mask.height}, the picture {picture.width}x{picture.height}"
            raise usage_error(f"the mask is {sizes}: not of the same shape; draw the mask over the picture itself")
        width_px, height_px = images.fitting_size(picture.size, native_px)
        size_px = (request.width or width_px, request.height or height_px)
        if picture.size != size_px:
            self.say(f"start   {picture.width}x{picture.height} picture scaled and cropped to {size_px[0]}x{size_px[1]}")
        fitted = images.fit_to(picture, *size_px)
        hole = images.fit_to(mask, *size_px) if mask is not None else None
        return denoising.Start(fitted, hole, refs), size_px


def _report_step(
    on_step: Callable[[Step], None], done: int, batch_size: int, step: int, steps: int, latents: Callable[[], torch.Tensor]
) -> None:
    on_step(Step(done, batch_size, step / steps, latents))

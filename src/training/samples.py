"""Pictures that show what the adapter draws so far, by the live modules: no second pipeline, no second copy of anything.

The generator's own functions draw them, with its default sampler, so a sample is what the saved adapter will draw. The VAE
is on the device only while it decodes. Nothing that training depends on changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from src import conditioning, denoising, files, images, optimizations, prompts
from src.base_models import LoadedModel
from src.conditioning import Conditioning, Embedding
from src.errors import is_out_of_memory
from src.request import PictureRequest
from src.schedulers import build_scheduler, find_sampler
from src.train_config import TrainConfig, other_adapter
from src.training.validation import undisturbed

FOLDER = "samples"
_NAME = re.compile(r"step-(\d{6,})-(\d+)\.png")
_TILE_ABOVE_LATENTS = 64  # a side, 512 pixels: beyond this the VAE would need more memory than a training step


def as_drawn(train: TrainConfig, wildcards: Path) -> tuple[str, ...]:
    """The sample prompts as the generator reads them: cleaned, wildcards filled in by the picture's seed.

    Raises UserError: usage for ``<lora:...>``, which a live adapter takes no part in; not found, refused for wildcards.
    """
    found = []
    for index, prompt in enumerate(train.sample_prompts):
        seed = PictureRequest(prompt=prompt, seed=train.sample_seed).seed_of(index)
        text, tags = prompts.extract_loras(prompts.expand_wildcards(prompts.clean_prompt(prompt), seed, wildcards))
        if tags:
            raise other_adapter(tags[0].name)
        found.append(text)
    return tuple(found)


class Sampler:
    """Draws the same prompts with the same seeds at every call: what differs between steps is the adapter."""

    def __init__(
        self,
        model: LoadedModel,
        texts: Sequence[str],
        train: TrainConfig,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``texts``, prompts `as_drawn`, are encoded now, unless the text encoders learn.

        ``say`` receives a line when a picture could not be drawn.
        """
        self.prompts = tuple(texts)
        self._model, self._train, self._say = model, train, say
        self._encoded: list[Conditioning] = []
        if not train.train_text_encoder:
            encoders = _text_encoders(model)
            with undisturbed(*encoders, device=model.device), _moved(encoders, model.device):
                self._encoded = [self._encode(prompt) for prompt in self.prompts]

    def draw(self, unet: nn.Module, autocast: Callable[[], AbstractContextManager] = nullcontext) -> list[Image.Image | None]:
        """One picture for each prompt, drawn one after the other; None where what came out was no picture.

        ``unet`` is the live one, wherever it is; ``autocast`` what training computes in. That memory runs out or the
        adapter draws NaN is said, and is no reason to end a training.
        """
        pipeline = self._model.pipeline
        before = {name: getattr(pipeline, name) for name in ("unet", "scheduler")}
        looked_at = [unet, pipeline.vae, *(_text_encoders(self._model) if self._train.train_text_encoder else [])]
        try:
            pipeline.unet = unet
            with undisturbed(*looked_at, device=self._model.device), autocast():
                latents = [self._denoise(index) for index in range(len(self.prompts))]
            with undisturbed(*looked_at, device=self._model.device):  # the VAE computes in its own precision
                return self._decode(latents)
        finally:
            for name, part in before.items():
                setattr(pipeline, name, part)
            optimizations.free_memory()

    def _encode(self, prompt: str) -> Conditioning:
        encoded = conditioning.encode(self._model.pipeline, prompt, "")
        return _on(torch.device("cpu"), encoded)

    def _denoise(self, index: int) -> Tensor | None:
        """The latents (1, 4, h, w) of one prompt, on the CPU."""
        pipeline, train = self._model.pipeline, self._train
        prompt = self.prompts[index]
        encoded = self._encoded[index] if self._encoded else self._encode(prompt)
        size_px = train.resolution or self._model.native_size_px
        request = PictureRequest(
            prompt=prompt, width=size_px, height=size_px, num_inference_steps=train.sample_inference_steps,
            guidance_scale=train.sample_guidance_scale, seed=train.sample_seed,
        )  # fmt: skip
        pipeline.scheduler = build_scheduler(find_sampler(request.scheduler), self._model.scheduler_config)
        sources = denoising.generators([request.seed_of(index)])
        conditionings = [_on(self._model.device, encoded)]
        return self._attempt(index, lambda: denoising.denoise(pipeline, request, conditionings, sources).cpu())

    def _decode(self, latents: Sequence[Tensor | None]) -> list[Image.Image | None]:
        """All latents -> pictures, with the VAE on the device meanwhile."""
        vae, device = self._model.pipeline.vae, self._model.device
        was_tiling = vae.use_tiling
        is_large = any(item is not None and max(item.shape[-2:]) > _TILE_ABOVE_LATENTS for item in latents)
        try:
            with _moved([vae], device):
                optimizations.set_vae_tiling(vae, was_tiling or (is_large and device.type != "cpu"))
                return [item if item is None else self._picture(index, item) for index, item in enumerate(latents)]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            optimizations.set_vae_tiling(vae, was_tiling)
        self._say("samples are left out at this step: memory ran out for the VAE")
        return [None] * len(latents)

    def _picture(self, index: int, latents: Tensor) -> Image.Image | None:
        vae = self._model.pipeline.vae
        return self._attempt(index, lambda: denoising.to_picture(denoising.decode(vae, latents.to(vae.device))))

    def _attempt(self, index: int, action: Callable[[], Tensor | Image.Image]) -> Tensor | Image.Image | None:
        try:
            return action()
        except denoising.NotFinite as error:
            cause = f"{error} was no number"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            cause = "memory ran out"
        optimizations.free_memory()  # outside of the except block, where the error's frames would keep what filled it
        self._say(f"samples '{self.prompts[index]}' is left out at this step: {cause}")
        return None


def save_samples(
    folder: Path, step: int, pictures: Sequence[Image.Image | None], prompts: Sequence[str], seed: int
) -> list[Path | None]:
    """Save as ``FOLDER/samples/step-000250-0.png``, prompt and seed in its text chunks. Raises UserError."""
    files.check_writable_folder(folder / FOLDER)
    paths: list[Path | None] = []
    for index, (picture, prompt) in enumerate(zip(pictures, prompts)):
        path = folder / FOLDER / f"step-{step:06d}-{index}.png"
        if picture is None:
            paths.append(None)
            continue
        data = images.encode_png(picture, {"prompt": prompt, "seed": str(seed + index), "step": str(step)})
        paths.append(files.publish_bytes(path, data))
    return paths


def saved_samples(folder: Path) -> dict[int, dict[int, Path]]:
    """The pictures that ``save_samples`` left in a folder: step -> number of the prompt -> file."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted((folder / FOLDER).glob("step-*.png")):
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return dict(sorted(found.items()))


def _text_encoders(model: LoadedModel) -> list[nn.Module]:
    both = (model.pipeline.text_encoder, getattr(model.pipeline, "text_encoder_2", None))
    return [encoder for encoder in both if encoder is not None]


@contextmanager
def _moved(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules on a device, and back where they were."""
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes):
            module.to(home)


def _on(device: torch.device, encoded: Conditioning) -> Conditioning:
    def moved(embedding: Embedding) -> Embedding:
        pooled = None if embedding.pooled is None else embedding.pooled.to(device)
        return Embedding(embedding.tokens.to(device), pooled)

    return Conditioning(moved(encoded.positive), moved(encoded.negative))

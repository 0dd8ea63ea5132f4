"""Captions by BLIP (Li et al. 2022, arXiv:2201.12086), for pictures that have none. The model must be on disk already."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.captions import clean
from src.config import PathsConfig
from src.errors import not_found, refused
from src.files import publish_bytes
from src.images import read_image
from src.model_source import cached_snapshot, user_cache
from src.preparation.examining import Examined
from src.preparation.output import Destination
from src.preparation.settings import PrepareConfig
from src.quiet import silence_libraries
from src.terminal import Terminal

DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
_BATCH = 4
_BEAMS = 3
_MAX_NEW_TOKENS = 40


def find_captioner(config: PrepareConfig) -> tuple[str, Path]:
    """(name, folder) of the captioning model: a folder, or a hub id in models/cache or the user's Hugging Face cache.

    Raises UserError: not found (nothing is ever downloaded), or refused for another kind of model or pickled weights.
    """
    name = config.captioner or DEFAULT_MODEL
    caches = (PathsConfig().folder("cache"), user_cache())
    places = [Path(name).expanduser(), *filter(None, (cached_snapshot(name, cache) for cache in caches))]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise not_found(
            f"captioner {name}: is neither a folder nor in {' or '.join(map(str, caches))}; download it with "
            f"`hf download {name}`, name a folder with --captioner, or leave --caption away"
        )
    try:
        kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = "none"
    if kind != "blip":
        raise refused(f"captioner {folder}: is no BLIP model (its config.json says {kind}); name another with --captioner")
    if not any(folder.glob("*.safetensors")):
        raise refused(f"captioner {folder}: has no .safetensors weights, the one format that is read; take such a version")
    return name, folder


def describe_all(
    config: PrepareConfig, pictures: Sequence[Examined], destination: Destination, terminal: Terminal
) -> dict[str, tuple[str, str]]:
    """(captioner, caption) of each picture by its source; what an earlier run was told by the same one is taken over."""
    name, folder = find_captioner(config)
    described = {}
    for picture in pictures:
        if (caption := _earlier(picture, name, destination)) is not None:
            described[picture.source] = (name, caption)
    left = [picture for picture in pictures if picture.source not in described]
    if not left:
        return described
    blip = Blip(folder)
    terminal.start_progress(len(left))
    try:
        for start in range(0, len(left), _BATCH):
            batch = left[start : start + _BATCH]
            captions = blip.describe([destination.place_of(picture) for picture in batch])
            for picture, caption in zip(batch, captions):
                described[picture.source] = (name, caption)
                publish_bytes(_note(picture, destination), json.dumps([name, caption]).encode())
            terminal.progress(start + len(batch), "captions")
    finally:
        terminal.end_progress()
    return described


class Blip:
    """The model on the best device here, ready to describe."""

    def __init__(self, folder: Path) -> None:
        silence_libraries()
        import torch
        from transformers import BlipForConditionalGeneration, BlipProcessor

        silence_libraries()
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
        self._model = BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self._model.to(self._device).eval()

    def describe(self, paths: Sequence[Path]) -> list[str]:
        """One caption for each picture, by beam search: the same picture gets the same words."""
        inputs: Any = self._processor(images=[read_image(path) for path in paths], return_tensors="pt").to(self._device)
        with self._torch.inference_mode():
            tokens = self._model.generate(**inputs, num_beams=_BEAMS, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS)
        return [clean(text) for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


def _note(picture: Examined, destination: Destination) -> Path:
    return destination.shelf / f"{picture.key}.caption"


def _earlier(picture: Examined, name: str, destination: Destination) -> str | None:
    """What this captioner said of this picture in a run before, finished or killed."""
    said = destination.known.get(picture.key, ({}, None))[0].get("described")
    if said is None:
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(_note(picture, destination).read_bytes())
    return said[1] if isinstance(said, list) and len(said) == 2 and said[0] == name and isinstance(said[1], str) else None

"""The pictures and adapters that the orders of one run name: each is found, checked and hashed once, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from src import files, images
from src.config import AppConfig
from src.errors import not_found, refused
from src.prompts import clean_prompt, expand_by_seeds, extract_loras
from src.request import LoraChoice, PictureRequest
from src.tensor_files import missing, read_header, refuse_pickle

_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE = "adapter_model.safetensors"
_PEFT_SETTINGS = "adapter_config.json"


class NamedFiles:
    """Answers from memory when ten thousand lines of a job file name the same adapter."""

    def __init__(self, lora_folder: Path, hashes: Path) -> None:
        """``lora_folder`` is where ``<lora:name>`` is looked for, ``hashes`` the JSON file that ``sha256_of`` remembers by."""
        self._lora_folder, self._hashes = lora_folder, hashes
        self._checked: set[Path] = set()
        self._tagged: dict[str, Path] = {}
        self._sha256: dict[Path, str] = {}

    def tagged(self, name: str) -> Path:
        """The adapter that a prompt calls ``<lora:name>``. Raises UserError (not found)."""
        if name not in self._tagged:
            self._tagged[name] = LoraChoice.named(self._lora_folder, name).path
        return self._tagged[name]

    def check_picture(self, path: Path) -> None:
        """Decode a picture or mask once. Raises what ``images.read_image`` raises."""
        if path not in self._checked:
            images.read_image(path)
            self._checked.add(path)

    def check_adapter(self, path: Path) -> None:
        """Read an adapter's headers once. Raises UserError: not found; refused for a pickle or a damaged file."""
        if path in self._checked:
            return
        refuse_pickle(path)
        try:
            if not path.exists():
                raise missing(path)
            weights = adapter_weights(path)
            inside = list(path.iterdir()) if path.is_dir() else []
        except OSError as error:  # a name that is too long, a folder of somebody else's
            raise refused(f"{path}: cannot be read ({error.strerror}); name an adapter's file or folder") from None
        for file in weights or inside:
            refuse_pickle(file)
        if not weights:
            raise not_found(f"{path}: holds no .safetensors file; name an adapter's file or folder")
        for file in weights:
            read_header(file)
        self._checked.add(path)

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file."""
        if path not in self._sha256:
            self._sha256[path] = files.sha256_of(path, self._hashes)
        return self._sha256[path]

    def adapter_sha256(self, path: Path) -> str:
        """SHA-256 of an adapter, as recipes hold it."""
        return self.joint_sha256(adapter_files(path))

    def joint_sha256(self, paths: Iterable[Path]) -> str:
        """SHA-256 of a file or, for several, of their sorted hashes."""
        hashes = sorted(map(self.sha256, paths))
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def tagged_loras(request: PictureRequest, config: AppConfig) -> list[tuple[str, ...]]:
    """The names in the ``<lora:...>`` tags of the request's pictures: one entry, or several where wildcards choose adapters.

    Wildcards are filled in by the pictures' seeds; without a seed once, so that the files are checked, too.
    """
    prompt = clean_prompt(request.prompt)
    texts: Iterable[str] = [prompt]
    if request.wildcards:
        may_differ = request.seed is not None and ("{" in prompt or "__" in prompt)
        seeds = map(request.seed_of, range(request.num_images)) if may_differ else [0]
        texts = expand_by_seeds(prompt, seeds, config.paths.folder("wildcards"))
    return list(dict.fromkeys(tuple(tag.name for tag in extract_loras(text)[1]) for text in texts))


def adapter_files(path: Path) -> list[Path]:
    """The files that an adapter's path stands for, as ``lora.reading`` reads them: diffusers', PEFT's, or all."""
    if not path.is_dir():
        is_peft = path.name == _PEFT_FILE and (path.parent / _PEFT_SETTINGS).is_file()
        return [path, path.parent / _PEFT_SETTINGS] if is_peft else [path]
    if (path / _DIFFUSERS_FILE).is_file():
        return [path / _DIFFUSERS_FILE]
    settings = [path / _PEFT_SETTINGS] if (path / _PEFT_SETTINGS).is_file() else sorted(path.glob(f"*/{_PEFT_SETTINGS}"))
    if settings:
        return [file for item in settings for file in (item.with_name(_PEFT_FILE), item)]
    return sorted(path.glob("*.safetensors"))


def adapter_weights(path: Path) -> list[Path]:
    """Those of its files that hold tensors."""
    return [file for file in adapter_files(path) if file.name != _PEFT_SETTINGS]


def tensors_sha256(path: Path) -> str:
    """SHA-256 of the bytes behind a .safetensors header: A1111's LoRA hash, which survives a change of the file's notes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

"""Adapter files and folders on the disk: find, check and read them. What their tensors mean stands in src/lora/formats.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from src.errors import not_found, refused
from src.files import sha256_of
from src.lora.formats import LoraLayer, ScaleRule, Where, assemble, guess_family, refuse_other_kinds, split_names
from src.tensor_files import Header, missing, quoted, read_header, refuse_pickle

MAX_ADAPTER_TENSORS = 20_000
MAX_ADAPTER_BYTES = 4 * 2**30  # every layer of SDXL at rank 256 in fp32 is 3.1 GB

_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE = "adapter_model.safetensors"
_PEFT_PICKLE = "adapter_model.bin"
_PEFT_SETTINGS = "adapter_config.json"
_MAX_SETTINGS_BYTES = 2**20
# PEFT has one folder for each component, and three habits of naming them.
_PEFT_FOLDERS = {
    "unet_lora": "unet", "text_encoder_one_lora": "text_encoder", "text_encoder_two_lora": "text_encoder_2",
    "text_encoder_lora": "text_encoder", "text_encoder_2_lora": "text_encoder_2",
    "unet": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2",
}  # fmt: skip
_PEFT_CLASSES = {
    "UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2",
}  # fmt: skip
_WEIGHT_DTYPES = {"F16", "BF16", "F32", "F8_E4M3", "F8_E5M2"}
_ALPHA_DTYPES = _WEIGHT_DTYPES | {"F64", "I8", "U8", "I16", "I32", "I64"}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA as read: its tensors on the CPU in the file's precision, every one finite and every layer complete."""

    name: str
    format: str  # diffusers | peft | kohya
    path: Path
    files: tuple[Path, ...]
    family: str | None  # SD1 | SD2 | SDXL | SD3 | Flux, as far as shapes, names and header tell
    layers: Mapping[Where, LoraLayer]  # (component, module as the file calls it) -> layer

    @cached_property
    def sha256(self) -> str:
        """Of the file; of a folder, the hash of its files' sorted hashes."""
        hashes = sorted(sha256_of(file) for file in self.files)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Read a LoRA from the disk; nothing is ever fetched.

    ``path`` is a .safetensors file; a folder with ``pytorch_lora_weights.safetensors`` (diffusers), with
    ``adapter_config.json`` (PEFT) or with a PEFT folder per component (``unet_lora/``, ``text_encoder_one_lora/`` ...);
    or a folder with a single .safetensors file. ``name`` is how it is called in reports; default: file or folder name.

    Raises UserError: not found; or refused for a pickle, a damaged file, NaN, or a kind that is not a plain LoRA.
    """
    path = Path(path).expanduser()
    sources = _find_sources(path)
    headers = [_read_adapter_header(source.file) for source in sources]
    layers: dict[Where, LoraLayer] = {}
    for source, header in zip(sources, headers):
        part = _read_layers(source, header)
        if layers.keys() & part.keys():
            raise refused(f"{path}: holds two adapters for the {source.component}; name one of their folders")
        layers |= part
    dialect = "peft" if sources[0].settings else "kohya" if _is_kohya(headers[0]) else "diffusers"
    return Adapter(
        name=name or _name_of(path),
        format=dialect,
        path=path,
        files=tuple(file for source in sources for file in (source.file, source.settings) if file),
        family=guess_family(layers, headers[0].metadata),
        layers=layers,
    )


class _Source(NamedTuple):
    """One file of an adapter. ``component`` and ``settings`` belong to PEFT, which has a folder for each component."""

    file: Path
    component: str | None = None
    settings: Path | None = None


def _find_sources(path: Path) -> list[_Source]:
    """Find the file or files that ``path`` means."""
    refuse_pickle(path)
    if not path.exists():
        raise missing(path)
    if not path.is_dir():
        return [_peft_source(path.parent) if path.name == _PEFT_FILE and _is_peft(path.parent) else _Source(path)]
    if (path / _DIFFUSERS_FILE).is_file():
        return [_Source(path / _DIFFUSERS_FILE)]
    if _is_peft(path):
        return [_peft_source(path)]
    parts = [_peft_source(path / folder, component) for folder, component in _PEFT_FOLDERS.items() if _is_peft(path / folder)]
    if parts:
        return parts
    files = sorted(path.glob("*.safetensors"))
    if not files:
        for file in path.iterdir():
            refuse_pickle(file)
        raise not_found(f"{path}: holds no LoRA ({_DIFFUSERS_FILE}, {_PEFT_SETTINGS} or one .safetensors file); check the path")
    if len(files) > 1:
        some = ", ".join(file.name for file in files[:4]) + (" ..." if len(files) > 4 else "")
        raise refused(f"{path}: holds {len(files)} .safetensors files ({some}); name one of them")
    return [_Source(files[0])]


def _is_peft(folder: Path) -> bool:
    return (folder / _PEFT_SETTINGS).is_file()


def _peft_source(folder: Path, component: str | None = None) -> _Source:
    file = folder / _PEFT_FILE
    if not file.exists() and (folder / _PEFT_PICKLE).exists():
        refuse_pickle(folder / _PEFT_PICKLE)
    return _Source(file, component or _PEFT_FOLDERS.get(folder.resolve().name), folder / _PEFT_SETTINGS)


def _name_of(path: Path) -> str:
    """The file's name, or the folder's where the file has the name that every adapter of that format has."""
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.name in (_DIFFUSERS_FILE, _PEFT_FILE) else path.stem


def _is_kohya(header: Header) -> bool:
    return any(name.startswith("lora_") for name in header.tensors)


def _read_adapter_header(file: Path) -> Header:
    """Read the header and refuse what is no plain LoRA of sensible size, before a byte of weights is read."""
    header = read_header(file)
    refuse_other_kinds(header.tensors, str(file))
    size_bytes = sum(tensor.size_bytes for tensor in header.tensors.values())
    if not header.tensors:
        raise refused(f"{file}: holds no tensors; take another file")
    if len(header.tensors) > MAX_ADAPTER_TENSORS or size_bytes > MAX_ADAPTER_BYTES:
        raise refused(f"{file}: {len(header.tensors):,} tensors of {size_bytes / 2**30:.1f} GiB are no LoRA; name a LoRA file")
    return header


def _read_layers(source: _Source, header: Header) -> dict[Where, LoraLayer]:
    label, component = str(source.file), None
    if source.settings:
        settings = _parse_settings(_read_settings(source.settings), str(source.settings))
        component = source.component or _component_of(settings, header)
        rules = {component: ScaleRule.from_peft(settings, str(source.settings))}
    elif any(name.startswith("base_model.model.") for name in header.tensors):
        raise refused(f"{label}: is a PEFT file without its {_PEFT_SETTINGS}, which holds its alpha; copy the whole folder")
    else:
        rules = _diffusers_rules(header.metadata, label)
    names = split_names(header.tensors, label, component)
    for name, tensor in header.tensors.items():
        if tensor.dtype not in (_ALPHA_DTYPES if names[name].role == "alpha" else _WEIGHT_DTYPES):
            raise refused(f"{label}: tensor {quoted(name)} is of type {tensor.dtype}; save the LoRA as F16, BF16 or F32")
    try:
        tensors = load_file(source.file)
    except (SafetensorError, OSError) as error:
        raise refused(f"{label}: cannot be read ({error}); copy or download it again") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            tensors[name] = tensor.half()  # every fp8 number is an fp16 number, and fp16 can be computed with
    return assemble(tensors, names, rules, label)


def _component_of(settings: Mapping[str, Any], header: Header) -> str:
    """The component that a PEFT folder belongs to, when its own name does not say: by the model's class, or by its layers."""
    mapping = settings.get("auto_mapping")
    by_class = _PEFT_CLASSES.get(str(mapping.get("base_model_class"))) if isinstance(mapping, dict) else None
    return by_class or ("text_encoder" if any("encoder.layers." in name for name in header.tensors) else "unet")


def _diffusers_rules(metadata: Mapping[str, str], label: str) -> dict[str, ScaleRule]:
    """The scales that diffusers writes into the header: ``{"unet.r": 4, "unet.lora_alpha": 8, ...}``, or nothing."""
    text = metadata.get("lora_adapter_metadata")
    flat = _parse_settings(text, label) if text else {}
    rules = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        prefix = f"{component}."
        settings = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
        rules[component] = ScaleRule.from_peft(settings or (flat if component == "unet" else {}), label)
    return rules


def _read_settings(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_SETTINGS_BYTES:
            raise refused(f"{file}: is larger than 1 MiB, which no {_PEFT_SETTINGS} is; copy it again")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refused(f"{file}: cannot be read ({error}); copy it again") from None


def _parse_settings(text: str, label: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise refused(f"{label}: its LoRA settings are no JSON table; the file is damaged, copy or download it again")
    return settings

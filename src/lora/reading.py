"""Adapter files and folders on the disk: find, check and read them. What their tensors mean stands in src/lora/formats.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from src.errors import not_found, refused
from src.files import sha256_of
from src.lora.formats import LoraLayer, ScaleRule, TensorName, Where, assemble, guess_family, refuse_other_kinds, split_names
from src.lora.headers import ZERO_TERMINAL_SNR
from src.named_files import tensors_sha256
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
    metadata: Mapping[str, str] = field(default_factory=dict)  # the header's

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether it was learnt on a schedule that ends in pure noise, as headers of this program and of kohya's say."""
        return self.metadata.get(ZERO_TERMINAL_SNR) == "True"

    @cached_property
    def sha256(self) -> str:
        """Of the file; of a folder, the hash of its files' sorted hashes."""
        hashes = sorted(sha256_of(file) for file in self.files)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @cached_property
    def tensors_sha256(self) -> str | None:
        """That by which A1111 knows a LoRA; a folder of several files has none."""
        return tensors_sha256(self.files[0]) if len(self.files) == 1 else None


def read_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Read a LoRA from the disk; nothing is ever fetched.

    ``path`` is a .safetensors file; a folder with ``pytorch_lora_weights.safetensors`` (diffusers), with
    ``adapter_config.json`` (PEFT) or with a PEFT folder per component (``unet_lora/``, ``text_encoder_one_lora/`` ...);
    or a folder with a single .safetensors file. ``name`` is how it is called in reports; default: file or folder name.

    Raises UserError: not found; or refused for a pickle, a damaged file, NaN, or a kind that is neither a LoRA nor a DoRA.
    """
    path = Path(path).expanduser()
    parts = read_parts(path)
    layers: dict[Where, LoraLayer] = {}
    for part in parts:
        mine = _read_layers(part)
        if layers.keys() & mine.keys():
            raise refused(f"{path}: holds two adapters for the {next(iter(mine))[0]}; name one of their folders")
        layers |= mine
    return Adapter(
        name=name or name_of(path),
        format=form_of(parts[0]),
        path=path,
        files=tuple(file for part in parts for file in part.files),
        family=guess_family(layers, parts[0].header.metadata),
        layers=layers,
        metadata=parts[0].header.metadata,
    )


class AdapterPart(NamedTuple):
    """One file of an adapter, as far as its header tells; PEFT has one for each component, and settings beside it."""

    file: Path
    settings: Path | None
    header: Header
    names: dict[str, TensorName]
    rules: dict[str, ScaleRule]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,) if self.settings is None else (self.file, self.settings)


def read_parts(path: Path) -> list[AdapterPart]:
    """What ``path`` means, with every header checked and every name taken apart; no tensor is read, and no torch is needed.

    Raises UserError as `read_adapter` does.
    """
    parts = []
    for source in _find_sources(path):
        header = _read_adapter_header(source.file)
        settings = _read_settings(source.settings) if source.settings else None
        names, rules = _names_and_rules(str(source.file), header.tensors, header.metadata, settings, source.component)
        for name, tensor in header.tensors.items():
            if tensor.dtype not in (_ALPHA_DTYPES if names[name].role == "alpha" else _WEIGHT_DTYPES):
                raise refused(f"{source.file}: tensor {quoted(name)} is of type {tensor.dtype}; save it as F16, BF16 or F32")
        parts.append(AdapterPart(source.file, source.settings, header, names, rules))
    return parts


def form_of(part: AdapterPart) -> str:
    """diffusers | peft | kohya"""
    if part.settings is not None:
        return "peft"
    return "kohya" if any(name.startswith("lora_") for name in part.header.tensors) else "diffusers"


def parse_adapter(files: Mapping[str, bytes]) -> dict[str, dict[Where, LoraLayer]]:
    """The layers of adapter files in memory, as ``writing.adapter_files`` makes them, for each form among them.

    ``{"diffusers": layers, "peft": layers, "kohya": layers}``. Raises UserError (refused) as `read_adapter` does.
    """
    from safetensors.torch import load

    forms: dict[str, dict[Where, LoraLayer]] = {}
    for name, data in files.items():
        folder, _, file = name.rpartition("/")
        if not file.endswith(".safetensors"):
            continue
        try:
            tensors = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        except (SafetensorError, ValueError) as error:
            raise refused(f"{name}: cannot be read back ({error}); save it again") from None
        settings = files[f"{folder}/{_PEFT_SETTINGS}"].decode() if file == _PEFT_FILE else None
        form = "peft" if settings else "diffusers" if file == _DIFFUSERS_FILE else "kohya"
        names, rules = _names_and_rules(name, tensors, metadata, settings, _PEFT_FOLDERS.get(folder))
        forms.setdefault(form, {}).update(assemble(tensors, names, rules, name))
    return forms


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
        below = sorted(file.parent.name for file in path.glob(f"*/{_DIFFUSERS_FILE}"))  # a training's folder
        step = f"name one of its folders: {', '.join(below)}" if below else "check the path"
        raise not_found(f"{path}: holds no LoRA ({_DIFFUSERS_FILE}, {_PEFT_SETTINGS} or one .safetensors file); {step}")
    if len(files) > 1:
        some = ", ".join(file.name for file in files[:4]) + (" ..." if len(files) > 4 else "")
        raise refused(f"{path}: holds {len(files)} .safetensors files ({some}); name one of them")
    return [_Source(files[0])]


def known_files(folder: Path) -> list[Path]:
    """What is in a folder of the files that `read_adapter` finds there by their names: diffusers' one and all of PEFT's."""
    of_peft = [Path(part, name) for part in ("", *_PEFT_FOLDERS) for name in (_PEFT_FILE, _PEFT_SETTINGS)]
    return [file for name in (_DIFFUSERS_FILE, *of_peft) if (file := folder / name).is_file()]


def _is_peft(folder: Path) -> bool:
    return (folder / _PEFT_SETTINGS).is_file()


def _peft_source(folder: Path, component: str | None = None) -> _Source:
    file = folder / _PEFT_FILE
    if not file.exists() and (folder / _PEFT_PICKLE).exists():
        refuse_pickle(folder / _PEFT_PICKLE)
    return _Source(file, component or _PEFT_FOLDERS.get(folder.resolve().name), folder / _PEFT_SETTINGS)


def name_of(path: Path) -> str:
    """The file's name, or the folder's where the file has the name that every adapter of that format has."""
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.name in (_DIFFUSERS_FILE, _PEFT_FILE) else path.stem


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


def _read_layers(part: AdapterPart) -> dict[Where, LoraLayer]:
    from safetensors.torch import load

    try:
        tensors = load(part.file.read_bytes())  # not mapped: Windows lets nobody replace or delete a file that is
    except (SafetensorError, OSError) as error:
        raise refused(f"{part.file}: cannot be read ({error}); copy or download it again") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            tensors[name] = tensor.half()  # every fp8 number is an fp16 number, and fp16 can be computed with
    return assemble(tensors, part.names, part.rules, str(part.file))


def _names_and_rules(
    label: str, tensors: Collection[str], metadata: Mapping[str, str], settings: str | None, component: str | None
) -> tuple[dict[str, TensorName], dict[str, ScaleRule]]:
    """What a file's tensors mean, and how its layers are scaled; ``settings`` is the text of PEFT's adapter_config.json."""
    if settings is not None:
        where = str(Path(label).with_name(_PEFT_SETTINGS))
        table = _parse_settings(settings, where)
        component = component or _component_of(table, tensors)
        rules = {component: ScaleRule.from_peft(table, where)}
    elif any(name.startswith("base_model.model.") for name in tensors):
        raise refused(f"{label}: is a PEFT file without its {_PEFT_SETTINGS}, which holds its alpha; copy the whole folder")
    else:
        rules = _diffusers_rules(metadata, label)
    return split_names(tensors, label, component), rules


def _component_of(settings: Mapping[str, Any], tensors: Collection[str]) -> str:
    """The component that a PEFT folder belongs to, when its own name does not say: by the model's class, or by its layers."""
    mapping = settings.get("auto_mapping")
    by_class = _PEFT_CLASSES.get(str(mapping.get("base_model_class"))) if isinstance(mapping, dict) else None
    return by_class or ("text_encoder" if any("encoder.layers." in name for name in tensors) else "unet")


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

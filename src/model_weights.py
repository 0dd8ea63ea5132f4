"""Weights from .safetensors files into networks, in the precision that they run in and without a second copy.

A network is built without weights; each tensor is read piece by piece, converted and put in its place. What lies on disk in
fp32 and runs in bf16 takes half the file in memory. (The libraries map files into memory, whose pages count as the
process's own once they are read.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from src.tensor_files import read_header

STAGING_BYTES = 1 << 24  # stays in the CPU's cache: a third of the time of reading each tensor whole
DTYPES = {  # by the names of the format
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
# Names that a VAE's attention had before diffusers 0.18, and still has in many files.
_OLD_VAE_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# CLIP's encoders lost this level in transformers 5.6, and files have it; CLIPTextModelWithProjection kept it. The second is the
# safety checker's.
_CLIP_LEVELS = {"text_model.": "", "vision_model.vision_model.": "vision_model."}


def read_tensors(path: Path, dtype: torch.dtype | None, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a .safetensors file whose names begin so, floating-point numbers as ``dtype`` (None: as stored).

    Raises UserError (refused) as ``read_header`` does, OSError where the disk does.
    """
    wanted = {name: info for name, info in read_header(path).tensors.items() if name.startswith(prefixes)}
    tensors, staging = {}, torch.empty(STAGING_BYTES, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        for name, info in sorted(wanted.items(), key=lambda item: item[1].offset):  # as they lie on the disk
            stored = DTYPES[info.dtype]
            tensors[name] = tensor = torch.empty(info.shape, dtype=dtype if dtype and stored.is_floating_point else stored)
            file.seek(info.offset)
            for part in tensor.view(-1).split(STAGING_BYTES // stored.itemsize):
                read = staging[: part.numel() * stored.itemsize]
                _read_into(file, memoryview(read.numpy()))
                part.copy_(read.view(stored))
    return tensors


def build_empty(create: Callable[[], nn.Module]) -> nn.Module:
    """What ``create`` builds, its parameters without memory and without random numbers; `fill` gives them both."""
    with no_init_weights(), init_empty_weights():
        return create()


def fill(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Put tensors in the place of the parameters of their names; returns the names that none came for, sorted.

    Raises RuntimeError for a tensor of another shape.
    """
    return sorted(model.load_state_dict(tensors, strict=False, assign=True).missing_keys)


def renamed(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a component's own file under the ``names`` that the installed libraries have for them."""
    known = set(names)

    def current(name: str) -> str:
        for old, new in _OLD_VAE_ATTENTION.items():
            if name not in known and name.replace(old, new) in known:
                return name.replace(old, new)
        for level, today in _CLIP_LEVELS.items():
            if name not in known and name.startswith(level) and name.replace(level, today, 1) in known:
                return name.replace(level, today, 1)
        return name

    return {current(name): tensor for name, tensor in tensors.items()}


def renamed_from_checkpoint(component: str, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one component of a file in the original layout under ``model``'s names. The translation is diffusers'."""
    if component == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(tensors, model.config)
    if component == "vae":
        if any(name.startswith("encoder.down_blocks.") for name in tensors):  # a VAE's own file, in today's layout
            return renamed(tensors, model.state_dict())
        return single_file_utils.convert_ldm_vae_checkpoint(tensors, model.config)
    open_clip = "conditioner.embedders.1.model." if component == "text_encoder_2" else "cond_stage_model.model."
    if any(name.startswith(open_clip) for name in tensors):
        state = single_file_utils.convert_open_clip_checkpoint(model, tensors, prefix=open_clip)
    else:
        state = single_file_utils.convert_ldm_clip_checkpoint(tensors)
    return renamed(state, model.state_dict())


def _read_into(file: Any, buffer: memoryview) -> None:
    """Fill a buffer: a read may be shorter than asked for, and is beyond 2 GiB."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise OSError(f"{file.name}: ended early")
        buffer = buffer[count:]

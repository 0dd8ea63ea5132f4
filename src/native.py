"""Kernels of our own for the CPU (``native.cpp``), compiled once for this processor by the C++ compiler that is installed.

On Linux with GCC or Clang on x86-64; elsewhere, and with ``SD_NATIVE=0`` in the environment, torch's own operators draw the
same, more slowly. The compiled library is kept in the user's cache folder (``$XDG_CACHE_HOME/text-to-image``).

Milliseconds on two cores of an AMD EPYC (Zen 5), bf16: the best that torch has, then these.

    attention, 4096 x 4096, 2 x 8 heads of 40        138    78
    attention, 1024 x 1024, 2 x 8 heads of 80         31     8
    attention, 4096 x 77, 2 x 8 heads of 40            8     3
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from src import files
from src.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC")
COMPILE_S = 60
DIGEST_BYTES = 32
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LANES, MAX_HEAD = 16, 256  # channels come in whole vectors; a head is held whole

_Shape = ctypes.c_int64 * 5
_Strides = ctypes.c_int64 * 12


class _Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "pixels", "channels", "groups")]
    _fields_ += [("epsilon", ctypes.c_double), ("with_silu", ctypes.c_int64)]


def problem() -> str | None:
    """Why the kernels are not used though this processor could, in one line; None where they are, or nothing can be done."""
    return None if _load()[0] is not None or not _is_offered() else _load()[1]


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these: on the CPU, of a precision that is there, with their last dimensions in one piece."""
    if not _knows(query.dtype) or key.dtype != query.dtype or value.dtype != query.dtype:
        return False
    width, parts = query.shape[-1], (query, key, value)
    return (
        width <= MAX_HEAD and width % 2 == 0 and min(query.shape[2], key.shape[2]) > 0
        and all(part.device.type == "cpu" and part.stride(-1) == 1 for part in parts)
    )  # fmt: skip


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of (B, H, L, d) and (B, H, S, d), without gradients; lies as (B, L, H, d).

    Products of the inputs as they are, sums and exponentials in float32. Raises MemoryError.
    """
    batch, heads, length, width = query.shape
    out = query.new_empty(batch, length, heads, width).transpose(1, 2)
    strides = [part.stride(axis) for part in (query, key, value, out) for axis in range(3)]
    _call("attend", query.dtype, query, key, value, out, _Strides(*strides), _Shape(batch, heads, length, key.shape[2], width))
    return out


def can_normalize(x: Tensor, layer: nn.GroupNorm) -> bool:
    """Whether `group_norm` takes these: (B, C, h, w) with channels last, C a multiple of 16, in the precision of the layer."""
    return (
        layer.weight is not None and x.ndim == 4 and x.shape[1] % LANES == 0 and x.numel() > 0 and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype and _knows(x.dtype) and x.is_contiguous(memory_format=torch.channels_last)
    )  # fmt: skip


def group_norm(
    x: Tensor, layer: nn.GroupNorm, *, shift: Tensor | None = None, with_silu: bool = False, out: Tensor | None = None
) -> Tensor:
    """``layer(x + shift)``, with SiLU if asked, without gradients: x (B, C, h, w), shift (B, C). ``out`` may be x itself.

    Means and variances in float32 over 64 pixels, then in float64. Raises MemoryError.
    """
    out = torch.empty_like(x, memory_format=torch.channels_last) if out is None else out
    shift = None if shift is None else shift.contiguous()
    sizes = _Norm(x.shape[0], x.shape[2] * x.shape[3], x.shape[1], layer.num_groups, layer.eps, with_silu)
    _call("normalize", x.dtype, x, out, layer.weight, layer.bias, shift, sizes)
    return out


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | ctypes.Array | ctypes.Structure | None) -> None:
    library, _ = _load()
    places = [
        argument.data_ptr() if isinstance(argument, Tensor) else argument and ctypes.byref(argument) for argument in arguments
    ]
    if getattr(library, f"{name}_{NAMES[dtype]}")(*places) != 0:
        raise MemoryError(f"no memory for {name}")


def _knows(dtype: torch.dtype) -> bool:
    library = _load()[0]
    return library is not None and (dtype == torch.float32 or (dtype == torch.bfloat16 and bool(library.knows_bf16())))


def _is_offered() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return sys.platform == "linux" and is_x86 and os.environ.get("SD_NATIVE") != "0"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    if not _is_offered():
        return None, "not offered here"
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    threads = _threading_library()
    features = _processor_features()
    if "avx2" not in features or threads is None:
        return None, "not offered here"
    source = SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, features.encode(), " ".join(OPTIONS).encode(), threads.encode()])).hexdigest()[:16]
    path = _cache_folder() / f"native-{key}.so"
    try:
        if (library := _open(path)) is not None:
            return _with_types(library), ""
        if compiler is None:
            return None, "no C++ compiler is installed; with one (apt install g++) a CPU draws a fifth faster"
        return _with_types(_build(compiler, threads, path)), ""
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        line = next((line for line in str(said).splitlines() if "error" in line), str(error))
        return None, f"{Path(compiler).name} did not compile the kernels ({line.strip()[:200]}); torch's own draw, more slowly"


def _open(path: Path) -> ctypes.CDLL | None:
    """The library that is kept there; None for a missing or damaged one, which the system would crash on."""
    try:
        data = path.read_bytes()
        return ctypes.CDLL(str(path)) if _sealed(data[:-DIGEST_BYTES]) == data else None
    except OSError:
        return None


def _sealed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()  # loaders do not read beyond what the headers name


def _build(compiler: str, threads: str, path: Path) -> ctypes.CDLL:
    """Compile and load. It is linked with the OpenMP library that torch has loaded: two pools of threads would fight."""
    with tempfile.TemporaryDirectory() as folder:
        compiled, library = f"{folder}/native.o", f"{folder}/native.so"
        _run([compiler, *OPTIONS, "-fopenmp", "-c", str(SOURCE), "-o", compiled])
        _run([compiler, "-shared", compiled, threads, "-o", library])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.publish_bytes(path, _sealed(Path(library).read_bytes()))
        except (UserError, OSError):  # a cache that cannot be written costs a second at each start
            return ctypes.CDLL(library)
    return ctypes.CDLL(str(path))


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S, stdin=subprocess.DEVNULL)


def _with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in NAMES.values():
        for function, count in (("attend", 6), ("normalize", 6)):
            if hasattr(library, f"{function}_{name}"):
                getattr(library, f"{function}_{name}").argtypes = [ctypes.c_void_p] * count
    return library


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "text-to-image"


def _processor_features() -> str:
    """What -march=native goes by: a home folder may be on several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return " ".join(line for line in dict.fromkeys(lines) if line.startswith(("flags", "cpu family", "model")))


def _threading_library() -> str | None:
    """The path of the OpenMP library of GCC that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line), None)

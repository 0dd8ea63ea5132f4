"""Kernels of our own for the CPU (``native.cpp``), compiled once for this processor by the GCC that is installed.

On Linux on x86-64 with AVX2; elsewhere, and with ``SD_NATIVE=0`` in the environment, torch's own operators draw the same, more
slowly. The compiled library is kept in the user's cache folder (``$XDG_CACHE_HOME/text-to-image``), and used from there only
if it is the user's own.

Milliseconds on two cores of an AMD EPYC (Zen 5), bf16, in one run: the best that torch has, then these. Where a CPU has AMX,
whose products are faster than those that are used here, attention stays torch's: that has not been measured.

    attention, 4096 x 4096, 2 x 8 heads of 40        138    81
    attention, 1024 x 1024, 2 x 8 heads of 80         31     9
    attention, 4096 x 77, 2 x 8 heads of 40            8     4
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from src import files
from src.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("g++", "c++")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC")
COMPILE_S = 60
DIGEST_BYTES = 32
KEPT_S = 90 * 86_400  # older libraries go when a new one comes
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LANES, MAX_HEAD = 16, 256  # channels come in whole vectors; a head is held whole

_Shape = ctypes.c_int64 * 5
_Strides = ctypes.c_int64 * 12


class _Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "pixels", "channels", "groups")]
    _fields_ += [("epsilon", ctypes.c_double), ("with_silu", ctypes.c_int64)]


def problem() -> str | None:
    """Why the kernels are not used though they could be, in one line; None where they are, or nothing can be done."""
    return _load()[1]


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these: (B, H, L, d), (B, H, S, d) and that again, with their last dimensions in one piece."""
    if torch.compiler.is_compiling() or not (_is_ours(query) and _is_ours(key, query) and _is_ours(value, query)):
        return False
    batch, heads, length, width = query.shape if query.ndim == 4 else (0, 0, 0, 0)
    others = key.shape[2] if key.ndim == 4 else 0
    return (
        min(batch, heads, length, others) > 0 and 0 < width <= MAX_HEAD and width % 2 == 0
        and key.shape == value.shape == (batch, heads, others, width)
        and all(part.stride(-1) == 1 for part in (query, key, value)) and not (query.dtype == torch.bfloat16 and _HAS_AMX)
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


def can_normalize(x: Tensor, layer: nn.GroupNorm, shift: Tensor | None = None, modulation: Tensor | None = None) -> bool:
    """Whether `group_norm` takes these: x (B, C, h, w) channels last, C a multiple of 16; (B, C) and (B, 2 C) beside it."""
    parameters = [part for part in (layer.weight, layer.bias, shift, modulation) if part is not None]
    return (
        layer.weight is not None and not torch.compiler.is_compiling() and _is_ours(x) and x.ndim == 4 and x.numel() > 0
        and x.shape[1] == layer.num_channels and x.shape[1] % LANES == 0
        and x.is_contiguous(memory_format=torch.channels_last) and all(_is_ours(part, x) for part in parameters)
        and (shift is None or shift.shape == x.shape[:2])
        and (modulation is None or modulation.shape == (x.shape[0], 2 * x.shape[1]))
    )  # fmt: skip


def group_norm(
    x: Tensor, layer: nn.GroupNorm, *, shift: Tensor | None = None, modulation: Tensor | None = None, with_silu: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``layer(x + shift) * (1 + m) + n``, with SiLU if asked, without gradients.

    x (B, C, h, w), ``shift`` (B, C), ``modulation`` m and after it n (B, 2 C); ``out`` may be x itself. Means and variances in
    float32 over 64 pixels, then in float64. Raises MemoryError.
    """
    out = torch.empty_like(x, memory_format=torch.channels_last) if out is None else out
    shift, modulation = (None if part is None else part.contiguous() for part in (shift, modulation))
    sizes = _Norm(x.shape[0], x.shape[2] * x.shape[3], x.shape[1], layer.num_groups, layer.eps, with_silu)
    _call("normalize", x.dtype, x, out, layer.weight, layer.bias, shift, modulation, sizes)
    return out


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | ctypes.Array | ctypes.Structure | None) -> None:
    library, _ = _load()
    places = [
        argument.data_ptr() if isinstance(argument, Tensor) else argument and ctypes.byref(argument) for argument in arguments
    ]
    if getattr(library, f"{name}_{NAMES[dtype]}")(*places) != 0:
        raise MemoryError(f"no memory for {name}")


def _is_ours(tensor: Tensor, like: Tensor | None = None) -> bool:
    """Whether it has numbers on the CPU, in a precision that is there (or that of ``like``): no subclass, no stand-in."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    if like is not None:
        return tensor.dtype == like.dtype
    library = _load()[0]
    return library is not None and (
        tensor.dtype == torch.float32 or (tensor.dtype == torch.bfloat16 and bool(library.knows_bf16()))
    )


def _is_offered(features: str) -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return sys.platform == "linux" and is_x86 and "avx2" in features and os.environ.get("SD_NATIVE") != "0"


def cpp_compiler() -> str | None:
    """The path of a C++ compiler, if one is installed."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library; without it the reason, where something can be done about it."""
    features, threads = _processor_features(), _threading_library()
    if not _is_offered(features) or threads is None:
        return None, None
    found = cpp_compiler()
    try:
        of_compiler = f"{found} {os.stat(found).st_mtime_ns}" if found else ""
        parts = [SOURCE.read_bytes(), *(text.encode() for text in (features, " ".join(OPTIONS), threads))]
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        folder = _cache_folder()
        if (library := _open(folder and folder / f"native-{key}.so")) is not None:
            return _with_types(library), None
        if found is None:
            return None, "no C++ compiler is installed; with one (apt install g++) a picture takes a sixth less time"
        failed = folder and folder / f"native-{key}.failed"
        if failed and _read_own(failed) == of_compiler.encode():
            return None, f"{found} could not compile the kernels when it was tried; delete {failed} to try again"
        return _compile(found, threads, folder, f"native-{key}", of_compiler)
    except (OSError, ValueError) as error:
        return None, f"the kernels for this CPU cannot be used ({error}); torch's own draw, a little slower"


def _compile(
    compiler: str, threads: str, folder: Path | None, stem: str, of_compiler: str
) -> tuple[ctypes.CDLL | None, str | None]:
    """Compile, load, and only then keep; a failure is kept as well, so that the next start does not try again."""
    try:
        with _workshop(folder) as temporary:
            path = _build(compiler, threads, Path(temporary))
            library, data = _with_types(ctypes.CDLL(str(path))), path.read_bytes()
    except subprocess.SubprocessError as error:
        stderr = getattr(error, "stderr", None) or str(error)
        said = (stderr if isinstance(stderr, str) else stderr.decode(errors="replace")).splitlines()  # bytes after a timeout
        line = next((line for line in said if "error" in line), said[-1] if said else "no message")
        if any(f"{SOURCE.name}:" in one and "error" in one for one in said):  # not a full disk, or a machine that was busy
            _keep(folder, f"{stem}.failed", of_compiler.encode())
        return None, f"{compiler} did not compile the kernels ({line.strip()[:200]}); torch's own draw, a little slower"
    _keep(folder, f"{stem}.so", _sealed(data))
    return library, None


def _workshop(folder: Path | None) -> tempfile.TemporaryDirectory:
    """Where it is compiled, and loaded from first: in the cache, for nothing may be run from many a temporary folder."""
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_own(folder):
                return tempfile.TemporaryDirectory(dir=folder, prefix="build-")
    return tempfile.TemporaryDirectory()


def _keep(folder: Path | None, name: str, data: bytes) -> None:
    """In the cache, where there is one that can be written; else the next start compiles again, in two seconds."""
    if folder is None:
        return
    with contextlib.suppress(UserError, OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_own(folder):
            for old in folder.glob("native-*"):
                if time.time() - old.stat().st_mtime > KEPT_S:
                    files.delete_files([old])
            files.publish_bytes(folder / name, data)


def _open(path: Path | None) -> ctypes.CDLL | None:
    """The library that is kept there; None for a missing or damaged one, which the system would crash on."""
    data = path and _read_own(path)
    try:
        return ctypes.CDLL(str(path)) if data and _sealed(data[:-DIGEST_BYTES]) == data else None
    except OSError:  # a disk from which nothing may be run
        return None


def _read_own(path: Path) -> bytes | None:
    """What is in a file that nobody else could have written."""
    try:
        return path.read_bytes() if _is_own(path) and _is_own(path.parent) else None
    except OSError:
        return None


def _is_own(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _sealed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()  # loaders do not read beyond what the headers name


def _build(compiler: str, threads: str, folder: Path) -> Path:
    """Compile. It is linked with the OpenMP library that torch works with: two pools of threads would fight."""
    compiled, library = folder / "native.o", folder / "native.so"
    _run([compiler, *OPTIONS, "-fopenmp", "-c", str(SOURCE), "-o", str(compiled)])
    _run([compiler, "-shared", str(compiled), threads, "-o", str(library)])
    return library


def _run(command: Sequence[str]) -> None:
    subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=COMPILE_S, stdin=subprocess.DEVNULL,
        env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip


def _with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in NAMES.values():
        for function, count in (("attend", 6), ("normalize", 7)):
            if hasattr(library, f"{function}_{name}"):
                getattr(library, f"{function}_{name}").argtypes = [ctypes.c_void_p] * count
    return library


def _cache_folder() -> Path | None:
    """None for a user without a home."""
    wanted = os.environ.get("XDG_CACHE_HOME", "")
    folder = wanted if os.path.isabs(wanted) else os.path.expanduser("~/.cache")  # a relative one is to be ignored
    return Path(folder, "text-to-image") if os.path.isabs(folder) else None


def _processor_features() -> str:
    """What -march=native goes by: a home folder may be on several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return " ".join(line for line in dict.fromkeys(lines) if line.startswith(("flags", "cpu family", "model")))


def _threading_library() -> str | None:
    """The path of the OpenMP library of GCC that torch's threads are from; None where they are from another one."""
    try:
        of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(of_torch.omp_get_max_threads, ctypes.c_void_p).value
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except (OSError, AttributeError):
        return None
    for line in lines:
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            path = line.split(maxsplit=5)[5]
            return path if "libgomp" in path and os.path.exists(path) else None
    return None


_HAS_AMX = "amx_bf16" in _processor_features()

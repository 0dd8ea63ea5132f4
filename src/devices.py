"""What this machine has, asked without torch: graphics cards, main memory, bf16 in the CPU; and what is drawn on by that.

The card is asked through NVML, the library inside NVIDIA's driver, so it costs milliseconds and creates no CUDA context.
Whoever loads a model asks torch again; these answers are for planning before that.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from src.errors import usage_error
from src.processes import CONTROL_GROUPS, Processes, control_groups, system_text

NVML_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
VECTORS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "asimd": "NEON",
}  # widest first


@dataclass(frozen=True)
class Card:
    """An NVIDIA card. ``free_bytes`` is what no other program uses right now; ``index`` is the driver's, in PCI order."""

    name: str
    total_bytes: int
    free_bytes: int
    index: int


class _NvmlMemory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _WindowsMemory(ctypes.Structure):
    """MEMORYSTATUSEX of kernel32."""

    _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
        (name, ctypes.c_ulonglong)
        for name in ("total", "available", "total_page", "available_page", "total_virtual", "available_virtual", "extended")
    ]


def detect_card(ordinal: int = 0, nvml: Any = None, visible: str | None = None) -> Card | None:
    """The ``ordinal``-th visible card in the driver's order, or None where there is no such card or no driver.

    The driver counts by PCI slot, and CUDA, unless CUDA_DEVICE_ORDER says PCI_BUS_ID, the fastest card first: on a machine
    with different cards torch may call another one ``cuda:ordinal``.

    ``visible`` stands for CUDA_VISIBLE_DEVICES, honoured where it lists numbers; with UUIDs in it the answer is None.
    ``nvml`` stands for the driver's library.
    """
    index = _driver_index(ordinal, os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible)
    if index is None:
        return None
    try:
        nvml = nvml or ctypes.CDLL(NVML_LIBRARY)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        return _read_card(nvml, index)
    finally:
        nvml.nvmlShutdown()


def detect_cards() -> list[Card]:
    """All visible cards, in the order of ``detect_card``."""
    return list(takewhile(bool, map(detect_card, count())))


def has_apple_gpu() -> bool:
    """Whether this is a Mac with Apple silicon, whose graphics processor torch calls ``mps``."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def pick_device(
    name: str, *, card_count: int, has_mps: bool, why_no_card: str = "no card is found", processes: Processes | None = None
) -> str:
    """``auto`` -> the first of cuda, mps and cpu that is there; a device that is named, as it is.

    Each of several ``processes`` on this machine has a card of its own. ``name`` has passed ``config.check_machine``.
    Raises UserError (usage) for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if card_count else "mps" if has_mps else "cpu"
    if name.startswith("cuda") and card_count and processes is not None and processes.local_count > 1:
        return _own_card(name, card_count, processes)
    kind, _, number = name.partition(":")
    if kind == "cuda" and not card_count:
        way_out = "use --device cpu, or install the torch for your card"
        raise usage_error(f"device '{name}' cannot be used: {why_no_card}; {way_out}")
    if kind == "cuda" and int(number or 0) >= card_count:
        raise usage_error(f"device '{name}' is not there; the cards are cuda:0 to cuda:{card_count - 1}")
    if kind == "mps" and not has_mps:
        raise usage_error("device 'mps' is only on Macs with Apple silicon; use --device cpu")
    return name


def _own_card(name: str, card_count: int, processes: Processes) -> str:
    """The card of one of several processes on this machine."""
    if ":" in name:
        raise usage_error(f"device '{name}' is one card for {processes.local_count} processes; say --device cuda, or nothing")
    if processes.local_count > card_count:
        raise usage_error(
            f"{processes.local_count} processes were started for {card_count} cards; "
            f"accelerate launch --num_processes {card_count} starts one a card, --device cpu draws without cards"
        )
    return f"cuda:{processes.local_index}"


def pick_precision(name: str, *, on_card: bool, cpu_bf16: bool) -> str:
    """``auto`` -> fp16 on a card; on a CPU bf16 where it computes in it, else fp32; a precision that is named, as it is.

    fp16 on a CPU is refused: it is emulated there, which is slower than fp32. ``name`` has passed ``config.check_machine``.
    Raises UserError (usage).
    """
    if name == "fp16" and not on_card:
        raise usage_error("precision fp16 needs a graphics card, a CPU is slower with it than with fp32; choose bf16 or fp32")
    if name != "auto":
        return name
    return "fp16" if on_card else "bf16" if cpu_bf16 else "fp32"


def total_memory_bytes(meminfo: str | None = None) -> int:
    """Main memory of this machine. ``meminfo`` stands for the text of /proc/meminfo."""
    if sys.platform == "win32":
        return _windows_memory().total
    total_bytes = _meminfo_bytes("MemTotal", meminfo)
    return total_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes(meminfo: str | None = None) -> int | None:
    """Main memory that programs can still get without swapping; None where the system does not say (macOS)."""
    if sys.platform == "win32":
        return _windows_memory().available
    found = [_meminfo_bytes("MemAvailable", meminfo), _container_bytes() if meminfo is None else None]
    return min((amount for amount in found if amount is not None), default=None)


def driver_spills() -> bool:
    """Whether a full card goes on in the machine's memory, a hundred times slower, in place of an error: Windows' driver,
    which is also that of Linux within Windows (WSL)."""
    return sys.platform == "win32" or "microsoft" in system_text(Path("/proc/sys/kernel/osrelease")).lower()


def cpu_has_bf16(cpuinfo: str | None = None) -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AMX-BF16 or AVX512-BF16), by the flags of /proc/cpuinfo.

    False where there is no such file: the model loader asks torch again, this answer only precedes it.
    """
    return not BF16_FLAGS.isdisjoint(_cpu_flags(cpuinfo))


def cpu_vectors(cpuinfo: str | None = None) -> str | None:
    """The widest arithmetic of the CPU by the flags of /proc/cpuinfo, such as "AVX2"; None where nothing says it."""
    flags = _cpu_flags(cpuinfo)
    return next((name for flag, name in VECTORS.items() if flag in flags), None)


def _cpu_flags(cpuinfo: str | None) -> set[str]:
    text = system_text(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    return set(
        next((line.partition(":")[2] for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
    )


def _driver_index(ordinal: int, visible: str | None) -> int | None:
    """The driver's number of the ``ordinal``-th visible card. As CUDA does, the list ends at its first invalid entry."""
    if visible is None:
        return ordinal
    numbers: list[int] = []
    for entry in visible.split(","):
        if not entry.strip().isdecimal():
            break
        numbers.append(int(entry))
    return numbers[ordinal] if ordinal < len(numbers) else None


def _read_card(nvml: Any, index: int) -> Card | None:
    handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(NAME_BYTES), _NvmlMemory()
    failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(NAME_BYTES))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    return None if failed else Card(name.value.decode("utf-8", "replace"), memory.total, memory.free, index)


def _meminfo_bytes(field: str, meminfo: str | None) -> int | None:
    text = system_text(Path("/proc/meminfo")) if meminfo is None else meminfo
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # the file says kB and means KiB
    return None


def _container_bytes(cgroup: str | None = None, root: Path = CONTROL_GROUPS) -> int | None:
    """What a container, or another control group, may still take of its limit; None where there is none.

    The arguments are those of ``control_groups``. Pages of files that the system gives back at once do not count as taken.
    """
    names = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
    for folder in control_groups("memory", cgroup, root):
        for limit, used in names.items():
            numbers = [system_text(folder / name).strip() for name in (limit, used)]
            if all(number.isdecimal() for number in numbers):  # "max": no limit
                stat = dict(line.split(" ", 1) for line in system_text(folder / "memory.stat").splitlines())
                return max(0, int(numbers[0]) - int(numbers[1]) + int(stat.get("inactive_file", "0")))
    return None


def _windows_memory() -> _WindowsMemory:
    memory = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
    ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(memory))
    return memory

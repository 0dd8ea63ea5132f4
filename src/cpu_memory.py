"""Main memory as glibc keeps it: what is freed goes back to the system, where that is worth it; elsewhere nothing is done.

The C library keeps freed memory for the next allocation, which is fast for activations, of the same sizes in every step.
Weights that are read, converted and packed among them leave holes as large as themselves: SD v1.5 in bf16 then takes 3.9 GB
for 2.1 GB of weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE_BYTES, _USUAL_BYTES = 1 << 18, 1 << 25  # the second, and twice that for trimming, is what glibc itself arrives at


def _c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


_LIBRARY = _c_library()


@contextlib.contextmanager
def for_weights() -> Iterator[None]:
    """Large allocations get pages of their own within this, and give them back when they are freed."""
    if _LIBRARY is None:
        yield
        return
    _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _USUAL_BYTES)
        _LIBRARY.mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_BYTES)


def give_back() -> None:
    """Hand pages that nothing is in to the system: between phases that need different sizes."""
    if _LIBRARY is not None:
        _LIBRARY.malloc_trim(ctypes.c_size_t(0))

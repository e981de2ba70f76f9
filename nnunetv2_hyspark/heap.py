"""Keeping freed memory in the process, for training and prediction on CPUs.

glibc gives large blocks back to the system as soon as they are freed, and the system clears every page anew when the
next layer asks for one. For networks on large 3D patches that takes as long as the arithmetic.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

# from malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4

LARGEST_KEPT = 2**30
"""Bytes; larger blocks are given back when they are freed, but for releases of glibc that take no such threshold."""

SET_BY_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed, for the rest of this process and its forks; a resident set then stays at its peak.

    Without effect, and harmless, where another allocator is loaded, such as jemalloc.

    Returns:
        Whether malloc was told: not where it is not glibc's, nor where the user has set one of ``SET_BY_USERS`` or any
        ``glibc.malloc`` entry of ``GLIBC_TUNABLES``.
    """
    if any(name in os.environ for name in SET_BY_USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = _function_of_glibc("mallopt")
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # older releases take no threshold as large as that; they keep blocks of every size
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) or mallopt(M_MMAP_MAX, 0)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Gives what is kept back to the system, once: before a fork, which would hold on to copies of it, or before memory
    is measured. Without effect where malloc is not glibc's."""
    trim = _function_of_glibc("malloc_trim")
    if trim is not None:
        trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
        trim(0)


def _function_of_glibc(name: str) -> Any:
    """None on other systems."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  musl and macOS have none
        return getattr(library, name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without a name
        return None

"""Keeping freed memory in the process, for training and prediction on CPUs.

glibc gives large blocks back to the system as soon as they are freed, and the system clears every page anew when the
next layer asks for one. For networks on large 3D patches that takes as long as the arithmetic.
"""

from __future__ import annotations

import ctypes
import os

# from malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4

LARGEST_KEPT = 2**30
"""Bytes; larger blocks are given back when they are freed."""

SET_BY_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed, for the rest of this process and its forks; a resident set then stays at its peak.

    Without effect, and harmless, where another allocator is loaded, such as jemalloc.

    Returns:
        Whether malloc was told: not where it is not glibc's, nor where the user has set its thresholds
        (``MALLOC_TRIM_THRESHOLD_`` and its like, or ``glibc.malloc`` in ``GLIBC_TUNABLES``).
    """
    if any(name in os.environ for name in SET_BY_USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  musl and macOS have none
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without a name
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # older releases take no threshold as large as that; they keep blocks of every size
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) or mallopt(M_MMAP_MAX, 0)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, -1))

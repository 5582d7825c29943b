"""Makes the C library keep freed memory for later allocations instead of returning it to the system.

A training step allocates and frees the same few hundred megabytes every time. By default glibc returns large
blocks to the system, and allocating them again costs a page fault per 4 KiB: up to a sixth of a step on a
CPU. The cost is that the process stays as large as its largest step.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc, malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc allows no more


def keep_freed_memory() -> bool:
    """Configure glibc's `malloc` for this process; returns False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    settings = {
        _MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD,
        _TRIM_THRESHOLD: (1 << 31) - 1,
        _TOP_PAD: 64 << 20,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())

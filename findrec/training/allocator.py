"""Freed memory is kept for the next tensor instead of being given back to the system.

A training step frees and asks for the same few hundred megabytes again and again. glibc hands larger pieces
back each time, and getting them anew costs a page fault for every 4 KiB: up to a sixth of a step on a CPU.
The price is that the process stays as large as its largest step.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc, malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc allows no more


def keep_freed_memory() -> bool:
    """Tell the C library so, for this process; returns whether it is one that can be told (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    settings = {
        _MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD,
        _TRIM_THRESHOLD: (1 << 31) - 1,
        _TOP_PAD: 64 << 20,
    }
    return all(tell(name, value) == 1 for name, value in settings.items())

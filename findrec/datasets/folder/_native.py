"""Bindings of the compiled history reader (`ops/csrc/histories.cpp`), which is built at first use.

Without a compiler, the slower numpy implementation next to each call is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from findrec.ops._build import BuildError, load_library
from findrec.progress import warn

_Empty = ctypes.c_char * 0
Impl = Literal["auto", "reference", "cpp"]
PROBLEMS = 8  # an error code is this times the row plus one of:
BAD_ITEM, BAD_TIME, BAD_SLICE = 2, 3, 4


def _fields(sizes: Sequence[str], pointers: Sequence[str]) -> list[tuple[str, Any]]:
    return [*((name, ctypes.c_int64) for name in sizes), *((name, ctypes.c_void_p) for name in pointers)]


class GatherArgs(ctypes.Structure):
    """Mirrors `GatherArgs` in the C++ source, field by field."""

    _fields_ = [
        *_fields(("rows", "users", "num_items", "shuffle"), ()),
        ("seed", ctypes.c_uint64),
        *_fields((), ("user", "start", "stop", "place", "sample_of", "first_of", "end_of")),
        *_fields((), ("item_at", "timestamp_at", "event_at", "item", "timestamp", "event")),
    ]


class PadArgs(ctypes.Structure):
    """Mirrors `PadArgs` in the C++ source, field by field."""

    _fields_ = [
        *_fields(("rows", "width", "held", "num_items"), ("item", "timestamp", "event", "offset", "skip")),
        *_fields((), ("out_item", "out_gap", "out_event", "out_index", "out_time", "length", "ids")),
        *_fields((), ("position", "target", "wait", "query_time")),
    ]


@cache
def _library() -> ctypes.CDLL | str:
    try:
        library = load_library("histories")
    except BuildError as error:
        return str(error)
    for name in ("gather_histories", "pad_histories"):
        getattr(library, name).restype = ctypes.c_int64
    return library


@cache
def _warn_once(problem: str) -> None:
    warn(f"Reading histories: {problem}.\nUsing the slower numpy implementation; batches are the same.")


def native(impl: Impl) -> ctypes.CDLL | None:
    """The library, or None if numpy is used; `ValueError` if `cpp` is requested but unavailable."""
    if impl not in ("auto", "reference", "cpp"):
        raise ValueError(f"impl={impl!r} is unknown: choose one of auto, reference, cpp")
    if impl == "reference":
        return None
    library = _library()
    if not isinstance(library, str):
        return library
    if impl == "cpp":
        raise ValueError(f"impl='cpp' cannot be used here: {library}; 'auto' picks an available one")
    _warn_once(library)
    return None


def pointer(values: NDArray[Any] | Tensor | None) -> int | None:
    """Address of the data of a contiguous array; None for None."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        return values.data_ptr()
    if not values.flags.writeable:
        address: int = values.__array_interface__["data"][0]
        return address
    # Six times faster than the above; raises for strided arrays.
    return ctypes.addressof(_Empty.from_buffer(values.data))


def contiguous_int64(values: Any) -> NDArray[np.int64]:
    """Convert to a contiguous int64 array, as the C++ code expects."""
    return np.ascontiguousarray(values, dtype=np.int64)

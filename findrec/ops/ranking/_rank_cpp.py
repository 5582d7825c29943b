"""Binding of the compiled ranking kernel (`csrc/target_rank.cpp`)."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from findrec.ops._build import BuildError, load_library

Kind = Literal["int16", "float32"]


class RankArgs(ctypes.Structure):
    """Mirrors `RankArgs` in the C++ source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "items", "width", "cases", "threads", "item_stride")),
        ("plain", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("users", "item", "start", "target", "since", "time")),
        *((name, ctypes.c_void_p) for name in ("greater", "equal", "doubtful")),
    ]


def cpp_rank_problem() -> str | None:
    """Why the compiled kernel is unavailable, or None. Builds the kernel on first use."""
    library = _library()
    return library if isinstance(library, str) else None


@cache
def _library() -> ctypes.CDLL | str:
    try:
        return load_library("target_rank")
    except BuildError as error:
        return str(error)


def cpp_count(
    users_Rd: Tensor,
    items_Td: Tensor,
    start: Tensor,
    t_C: Tensor,
    *,
    kind: Kind,
    since_T: Tensor | None = None,
    time_C: Tensor | None = None,
    plain: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Count the items that score above and equal to `t_C`, and the pairs that the screen left undecided.

    Args:
        users_Rd: float32 `[R, d]`.
        items_Td: float32 `[T, d]`.
        start: int64 `[R + 1]`, where each row's cases begin.
        t_C: float64 `[C]` scores to compare with, never NaN.
        kind: number format of the screen.
        since_T: int64 `[T]`, with `time_C`: an item counts in the cases with `time_C >= since_T`.
        time_C: int64 `[C]`.
        plain: score every pair in float64, with no screen.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    users_Rd, t_C, start = users_Rd.contiguous(), t_C.contiguous(), start.contiguous()
    if items_Td.stride(1) != 1:
        items_Td = items_Td.contiguous()
    greater, equal = torch.zeros_like(t_C, dtype=torch.int64), torch.zeros_like(t_C, dtype=torch.int64)
    doubtful = torch.zeros(1, dtype=torch.int64)
    since_T = None if since_T is None else since_T.contiguous()
    time_C = None if time_C is None else time_C.contiguous()
    args = RankArgs(
        rows=len(users_Rd),
        items=len(items_Td),
        width=users_Rd.shape[1],
        cases=len(t_C),
        threads=torch.get_num_threads(),
        item_stride=items_Td.stride(0),
        plain=int(plain),
        users=users_Rd.data_ptr(),
        item=items_Td.data_ptr(),
        start=start.data_ptr(),
        target=t_C.data_ptr(),
        since=None if since_T is None else since_T.data_ptr(),
        time=None if time_C is None else time_C.data_ptr(),
        greater=greater.data_ptr(),
        equal=equal.data_ptr(),
        doubtful=doubtful.data_ptr(),
    )
    getattr(library, f"count_{kind}")(ctypes.byref(args))
    return greater, equal, int(doubtful)

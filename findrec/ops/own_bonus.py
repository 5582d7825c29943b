"""Bonuses of the items a user met lately: five causal features of each, times weights of the asking position.

At a position, an item of the row counts as met when it occurred within the last `window` events, the current
one included. With `count` times met, `lag` events since the last time (0: just now) and `recent` times met
within the last `RECENT` events, all within that window, the features are

    phi = (1, log1p(count), log1p(lag) / 4, log1p(recent), exp(-lag / 16)),   zero where the item was not met,

and the bonus is `phi . weights`. The last two let a score rise some time after a purchase and fall again.

| impl        | where          | what                                                                       |
|-------------|----------------|----------------------------------------------------------------------------|
| `reference` | anywhere       | all features, any dtype: what the other is tested against                  |
| `cpp`       | CPU, needs g++ | one walk over the events for each direction, built at first use; keeps no  |
|             |                | features, and gives the same bits for any number of threads                |

Shape letters: B rows of events, E events of a row, T asked-for positions, N own items of a row, R features.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from findrec.ops._build import BuildError, load_library
from findrec.progress import say

NUM_REPEAT_FEATURES = 5
RECENT = 100  # events that "lately" looks back
JUST_NOW = 16.0  # events over which the "just now" feature fades: about a shopping basket
LAG_SCALE = 0.25  # log1p of a lag runs to about 7; the other features stay near 1
Impl = Literal["auto", "reference", "cpp"]
_BLOCK_ELEMENTS = 4 << 20  # of the reference's dense [rows, E, N] counts held at once


def own_bonus(
    weights_TR: Tensor,
    rank_BE: Tensor,
    row_T: Tensor,
    step_T: Tensor,
    *,
    num_own: int,
    window: int,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`bonus [T, N]`, zero for items not met, and `seen [T, N]` (bool): met within the window.

    Args:
        weights_TR: float, R = `NUM_REPEAT_FEATURES` weights of each asked-for position.
        rank_BE: int64, place of each event's item among the N own items of its row; N for padding.
        row_T: int64, the row of each asked-for position, ascending.
        step_T: int64, its event, ascending within a row.
        num_own: N.
        window: events that an item is remembered for, at least 1.
        impl: `auto` is `cpp` for float32 (and below) on a CPU where it can be built, else `reference`.

    Differentiable in the weights (`cpp`: once). Computed in float32 at least, and returned so. Raises
    `ValueError` for an unknown `impl`, for `cpp` where it cannot work, and for positions out of order.
    """
    if window < 1:
        raise ValueError(f"window={window}: an item must be remembered for at least 1 event")
    flat_T = row_T * rank_BE.shape[1] + step_T
    if bool((flat_T[1:] < flat_T[:-1]).any()):
        raise ValueError("asked-for positions must ascend: by row_T, within a row by step_T")
    weights_TR = weights_TR.to(torch.promote_types(weights_TR.dtype, torch.float32))
    if _choose(impl, weights_TR) == "cpp":
        result: tuple[Tensor, Tensor] = _FusedBonus.apply(  # type: ignore[no-untyped-call]
            weights_TR.contiguous(), rank_BE.contiguous(), row_T, step_T, num_own, window
        )
        return result
    features = own_features(rank_BE, row_T, step_T, num_own=num_own, window=window, dtype=weights_TR.dtype)
    return torch.einsum("trn,tr->tn", features[0].transpose(1, 2), weights_TR), features[1]


def own_features(
    rank_BE: Tensor,
    row_T: Tensor,
    step_T: Tensor,
    *,
    num_own: int,
    window: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`phi [T, N, R]` and `seen [T, N]` themselves; arguments as in `own_bonus`.

    Memory is about T x N x (R + 3) plus one bounded block of dense counts.
    """
    num_rows, events = rank_BE.shape
    device = rank_BE.device
    jump_BE = _jump_to_last(rank_BE)
    # Stored as [T, R, N]: that order makes the bonus of all pairs one batched matrix product.
    phi_TRN = torch.empty(len(row_T), NUM_REPEAT_FEATURES, num_own, dtype=dtype, device=device)
    seen_TN = torch.empty(len(row_T), num_own, dtype=torch.bool, device=device)
    block = max(1, _BLOCK_ELEMENTS // max(1, (events + 1) * (num_own + 1)))
    for lo in range(0, num_rows, block):
        hi = min(lo + block, num_rows)
        # Positions ascend, so those of a block of rows lie together.
        first, end = torch.searchsorted(row_T, torch.tensor([lo, hi], device=device)).tolist()
        row, step = row_T[first:end] - lo, step_T[first:end]
        met = _running_sum(rank_BE[lo:hi], torch.ones_like(jump_BE[lo:hi]), num_own)
        now = met[row, step + 1]
        recent = now - met[row, (step + 1 - min(RECENT, window)).clamp(min=0)]
        count = now - met[row, (step + 1 - window).clamp(min=0)]
        last = _running_sum(rank_BE[lo:hi], jump_BE[lo:hi], num_own)[row, step + 1]
        seen = torch.gt(count, 0, out=seen_TN[first:end])
        lag = (step[:, None] - last).to(dtype)
        _fill_features(phi_TRN[first:end], count.to(dtype), lag, recent.to(dtype), seen)
    return phi_TRN.transpose(1, 2), seen_TN


def repeat_features(count: Tensor, lag: Tensor, recent: Tensor) -> Tensor:
    """`[N, R]` features of N items a user has met, from float vectors `[N]`: times met, events since the last
    time (0: just now), times met within the last `RECENT` events.
    """
    phi_1RN = count.new_empty(1, NUM_REPEAT_FEATURES, len(count))
    met = torch.ones_like(count, dtype=torch.bool)
    count, lag, recent = (x.clone()[None] for x in (count, lag, recent))  # used up by what follows
    _fill_features(phi_1RN, count, lag, recent, met[None])
    return phi_1RN[0].t()


def _fill_features(phi: Tensor, count: Tensor, lag: Tensor, recent: Tensor, seen: Tensor) -> None:
    """Write the features `[T, R, N]`; `count`, `lag` and `recent` are used up."""
    there = seen.to(phi.dtype)
    phi[:, 0] = there
    phi[:, 1] = count.log1p_()  # zero where unseen, as is `recent`
    phi[:, 3] = recent.log1p_()
    torch.mul(lag.log1p(), there, out=phi[:, 2]).mul_(LAG_SCALE)
    torch.mul(lag.mul_(-1.0 / JUST_NOW).exp_(), there, out=phi[:, 4])


def _jump_to_last(rank_BE: Tensor) -> Tensor:
    """Steps from an item's previous event to this one (from 0 at its first): sums to its last place."""
    sorted_BE, order_BE = rank_BE.sort(dim=1, stable=True)
    jump_BE = order_BE.clone()
    same_BE = sorted_BE[:, 1:] == sorted_BE[:, :-1]
    jump_BE[:, 1:] -= torch.where(same_BE, order_BE[:, :-1], 0)
    return torch.empty_like(jump_BE).scatter_(1, order_BE, jump_BE).to(torch.float32)


def _running_sum(rank_bE: Tensor, value_bE: Tensor, num_own: int) -> Tensor:
    """`[b, E + 1, N]`: sums of the values of each item's events before an event. Whole numbers, so exact."""
    rows, events = rank_bE.shape
    dense = value_bE.new_zeros(rows, events + 1, num_own + 1)
    dense[:, 1:].scatter_(2, rank_bE[..., None], value_bE[..., None])
    return dense.cumsum_(1)[..., :num_own]


_LANES = 8  # of the C++ source
_SIZES = ("tokens", "events", "own", "window", "recent", "stride", "threads")
_POINTERS = ("rank", "row", "step", "weights", "tables", "bonus", "seen", "dbonus", "dweights")


class _OwnBonusArgs(ctypes.Structure):
    """Field by field the `OwnBonusArgs` of the C++ source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@cache
def _library() -> ctypes.CDLL | str:
    try:
        return load_library("own_bonus")
    except BuildError as error:
        return str(error)


@cache
def _warn_once(problem: str) -> None:
    say(f"Own-item bonus: {problem}.\nUsing the slower torch form; results are the same up to rounding.")


def _choose(impl: str, weights_TR: Tensor) -> str:
    if impl not in ("auto", "reference", "cpp"):
        raise ValueError(f"impl={impl!r} is unknown: choose one of auto, reference, cpp")
    if impl == "reference":
        return impl
    if weights_TR.device.type != "cpu" or weights_TR.dtype != torch.float32:
        if impl == "auto":
            return "reference"
        found = f"{weights_TR.dtype} on {weights_TR.device.type}"
        raise ValueError(f"impl='cpp' computes in float32 on a CPU, the weights are {found}; use 'auto'")
    library = _library()
    if not isinstance(library, str):
        return "cpp"
    if impl == "cpp":
        raise ValueError(f"impl='cpp' cannot be used here: {library}; 'auto' picks what works")
    _warn_once(library)
    return "reference"


@cache
def _tables(window: int) -> Tensor:
    """`[4, stride]` float32, of the numbers from 0 to at least `window`: log1p of a number of times, and the
    three features of a lag.
    """
    number = torch.arange(-(-(window + 1) // _LANES) * _LANES, dtype=torch.float64)
    log = number.log1p()
    return torch.stack([log, LAG_SCALE * log, (-number / JUST_NOW).exp(), torch.ones_like(log)]).float()


def _call(name: str, num_own: int, window: int, tensors: dict[str, Tensor]) -> None:
    """Run a function of the library on `tensors` (dense, by their names in `OwnBonusArgs`)."""
    library = _library()
    assert not isinstance(library, str), library
    tokens, events = len(tensors["row"]), tensors["rank"].shape[1]
    # Waking threads up costs as much as some ten thousand items.
    threads = torch.get_num_threads() if tokens * num_own > 2**14 else 1
    tables = _tables(window)
    sizes = (tokens, events, num_own, window, min(RECENT, window), tables.shape[1], threads)
    fields: dict[str, int] = dict(zip(_SIZES, sizes, strict=True))
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    getattr(library, name)(ctypes.byref(_OwnBonusArgs(**fields, **pointers, tables=tables.data_ptr())))


class _FusedBonus(torch.autograd.Function):
    """Keeps the events alone for the backward pass, which walks over them again."""

    @staticmethod
    def forward(
        ctx: Any,
        weights_TR: Tensor,
        rank_BE: Tensor,
        row_T: Tensor,
        step_T: Tensor,
        num_own: int,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        places = {"rank": rank_BE, "row": row_T.contiguous(), "step": step_T.contiguous()}
        bonus_TN = weights_TR.new_empty(len(row_T), num_own)
        seen_TN = torch.empty(len(row_T), num_own, dtype=torch.bool)
        outputs = {"bonus": bonus_TN, "seen": seen_TN}
        _call("own_bonus_forward", num_own, window, {**places, "weights": weights_TR, **outputs})
        ctx.save_for_backward(*places.values())
        ctx.num_own, ctx.window = num_own, window
        ctx.mark_non_differentiable(seen_TN)
        return bonus_TN, seen_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbonus_TN: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rank_BE, row_T, step_T = ctx.saved_tensors
        dbonus_TN = dbonus_TN.contiguous()
        dweights_TR = dbonus_TN.new_empty(len(row_T), NUM_REPEAT_FEATURES)
        tensors = {"rank": rank_BE, "row": row_T, "step": step_T}
        _call(
            "own_bonus_backward",
            ctx.num_own,
            ctx.window,
            {**tensors, "dbonus": dbonus_TN, "dweights": dweights_TR},
        )
        return dweights_TR, None, None, None, None, None

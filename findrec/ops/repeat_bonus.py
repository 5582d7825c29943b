"""Repeat consumption: a score bonus for the items in a user's recent history, from five causal features.

At a target position, an item of the history is a seen item if it occurred within the last `window` events,
the current one included. With `count` occurrences, `lag` events since the latest one (0: the current event)
and `recent` occurrences within the last `RECENT` events, all inside the window, the features are

    phi = (1, log1p(count), log1p(lag) / 4, log1p(recent), exp(-lag / 16)),   zero for items not seen,

and the bonus is `phi . weights`, with weights of the target position. The last two features allow a score
that rises some time after a purchase and then falls.

| impl        | where          | what                                                                       |
|-------------|----------------|----------------------------------------------------------------------------|
| `reference` | anywhere       | forms all features, any dtype; the other is tested against it              |
| `cpp`       | CPU, needs g++ | one pass over the events per direction, built at first use; stores no      |
|             |                | features; bit-identical for any number of threads                          |

Shape letters: B rows of events, E events of a row, T target positions, N distinct items of a row (its
repeat candidates), R features.
"""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from findrec.ops._build import BuildError, load_library
from findrec.ops._tiles import tile_bytes
from findrec.progress import warn

NUM_REPEAT_FEATURES = 5
RECENT = 100  # events covered by the `recent` feature
LAG_DECAY = 16.0  # decay length, in events, of the last feature: about a shopping basket
LAG_SCALE = 0.25  # log1p of a lag runs to about 7; the other features stay near 1
Impl = Literal["auto", "reference", "cpp"]
_BLOCK_BYTES = 16 << 20  # size limit of one block of the reference's dense [rows, E, N] float32 counts


def repeat_bonus(
    weights_TR: Tensor,
    rank_BE: Tensor,
    row_T: Tensor,
    step_T: Tensor,
    *,
    num_candidates: int,
    window: int,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `bonus [T, N]` (0 for items not seen) and `seen [T, N]` (bool: occurred within the window).

    Args:
        weights_TR: float, R = `NUM_REPEAT_FEATURES` weights of each target position.
        rank_BE: int64, index of each event's item among the N candidates of its row; N for padding.
        row_T: int64, the row of each target position, ascending.
        step_T: int64, its event within the row, ascending within a row.
        num_candidates: N.
        window: number of latest events in which an item counts as seen, at least 1.
        impl: `auto` is `cpp` for float32 (and below) on a CPU where it can be built, else `reference`.

    Differentiable in the weights (`cpp`: once). Computed and returned in at least
    float32. Raises `ValueError` for an unknown `impl`, for `cpp` where it is unavailable, and on a CPU for
    unsorted positions (a GPU would have to be waited for to find them).
    """
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1 event")
    if row_T.device.type == "cpu":
        flat_T = row_T * rank_BE.shape[1] + step_T
        if bool((flat_T[1:] < flat_T[:-1]).any()):
            raise ValueError("target positions must be sorted by row_T, then by step_T")
    weights_TR = weights_TR.to(torch.promote_types(weights_TR.dtype, torch.float32))
    if _choose(impl, weights_TR) == "cpp":
        result: tuple[Tensor, Tensor] = _FusedBonus.apply(  # type: ignore[no-untyped-call]
            weights_TR.contiguous(), rank_BE.contiguous(), row_T, step_T, num_candidates, window
        )
        return result
    features = repeat_features_of_history(
        rank_BE, row_T, step_T, num_candidates=num_candidates, window=window, dtype=weights_TR.dtype
    )
    return torch.einsum("trn,tr->tn", features[0].transpose(1, 2), weights_TR), features[1]


def repeat_features_of_history(
    rank_BE: Tensor,
    row_T: Tensor,
    step_T: Tensor,
    *,
    num_candidates: int,
    window: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute `phi [T, N, R]` and `seen [T, N]`; arguments as in `repeat_bonus`.

    Takes about T x N x (R + 3) elements of memory plus one bounded block of dense counts.
    """
    num_rows, events = rank_BE.shape
    device = rank_BE.device
    distance_BE = _distance_to_previous(rank_BE)
    # Stored as [T, R, N], so that the bonus is one batched matrix product.
    phi_TRN = torch.empty(len(row_T), NUM_REPEAT_FEATURES, num_candidates, dtype=dtype, device=device)
    seen_TN = torch.empty(len(row_T), num_candidates, dtype=torch.bool, device=device)
    block = max(1, tile_bytes(device, _BLOCK_BYTES) // (4 * (events + 1) * (num_candidates + 1)))
    # Positions are sorted by row, so those of a block of rows are contiguous.
    if block >= num_rows:
        ends = [0, len(row_T)]
    else:
        first_rows = torch.arange(0, num_rows + block, block, device=device)
        ends = torch.searchsorted(row_T, first_rows).tolist()
    for (first, end), lo in zip(pairwise(ends), range(0, num_rows, block), strict=False):
        hi = min(lo + block, num_rows)
        row = row_T[first:end] - lo if lo else row_T[first:end]
        step = step_T[first:end]
        end_T = step + 1
        occurrences = _running_sum(rank_BE[lo:hi], torch.ones_like(distance_BE[lo:hi]), num_candidates)
        total = occurrences[row, end_T]
        recent = total - occurrences[row, (end_T - min(RECENT, window)).clamp(min=0)]
        count = total - occurrences[row, (end_T - window).clamp(min=0)]
        last = _running_sum(rank_BE[lo:hi], distance_BE[lo:hi], num_candidates)[row, end_T]
        seen = torch.gt(count, 0, out=seen_TN[first:end])
        lag = (step[:, None] - last).to(dtype)
        _fill_features(phi_TRN[first:end], count.to(dtype), lag, recent.to(dtype), seen)
    return phi_TRN.transpose(1, 2), seen_TN


def repeat_features(count: Tensor, lag: Tensor, recent: Tensor) -> Tensor:
    """Compute the features `[N, R]` of N seen items.

    Args:
        count: float `[N]`, occurrences within the window.
        lag: float `[N]`, events since the latest occurrence (0: the current event).
        recent: float `[N]`, occurrences within the last `RECENT` events.
    """
    phi_1RN = count.new_empty(1, NUM_REPEAT_FEATURES, len(count))
    seen = torch.ones_like(count, dtype=torch.bool)
    _fill_features(phi_1RN, count[None], lag.clone()[None], recent[None], seen[None])
    return phi_1RN[0].t()


def _fill_features(phi: Tensor, count: Tensor, lag: Tensor, recent: Tensor, seen: Tensor) -> None:
    """Write the features `[T, R, N]` to `phi`; overwrites `lag`."""
    mask = seen.to(phi.dtype)
    phi[:, 0] = mask
    torch.log1p(count, out=phi[:, 1])  # zero where unseen, as is `recent`
    torch.log1p(recent, out=phi[:, 3])
    torch.mul(lag.log1p(), mask, out=phi[:, 2]).mul_(LAG_SCALE)
    torch.mul(lag.mul_(-1.0 / LAG_DECAY).exp_(), mask, out=phi[:, 4])


def _distance_to_previous(rank_BE: Tensor) -> Tensor:
    """Steps since the previous event of the item (at its first, since step 0); sums to its latest step."""
    sorted_BE, order_BE = rank_BE.sort(dim=1, stable=True)
    distance_BE = order_BE.clone()
    repeated_BE = sorted_BE[:, 1:] == sorted_BE[:, :-1]
    distance_BE[:, 1:] -= order_BE[:, :-1] * repeated_BE
    return torch.empty_like(distance_BE).scatter_(1, order_BE, distance_BE).to(torch.float32)


def _running_sum(rank_bE: Tensor, value_bE: Tensor, num_candidates: int) -> Tensor:
    """`[b, E + 1, N]`: per item, the sum of its values before each event. Exact: values are integers."""
    rows, events = rank_bE.shape
    dense = value_bE.new_zeros(rows, events + 1, num_candidates + 1)
    dense[:, 1:].scatter_(2, rank_bE[..., None], value_bE[..., None])
    return dense.cumsum_(1)[..., :num_candidates]


_LANES = 8  # kLanes in the C++ source
_SIZES = ("tokens", "events", "candidates", "window", "recent", "stride", "threads")
_POINTERS = ("rank", "row", "step", "weights", "tables", "bonus", "seen", "dbonus", "dweights")


class _RepeatBonusArgs(ctypes.Structure):
    """Mirrors `RepeatBonusArgs` in the C++ source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@cache
def _library() -> ctypes.CDLL | str:
    try:
        return load_library("repeat_bonus")
    except BuildError as error:
        return str(error)


@cache
def _warn_once(problem: str) -> None:
    warn(f"Repeat-consumption bonus: {problem}.\nUsing the slower torch form (same results up to rounding).")


def _choose(impl: str, weights_TR: Tensor) -> str:
    if impl not in ("auto", "reference", "cpp"):
        raise ValueError(f"impl={impl!r} is unknown: choose one of auto, reference, cpp")
    if impl == "reference":
        return impl
    if weights_TR.device.type != "cpu" or weights_TR.dtype != torch.float32:
        if impl == "auto":
            return "reference"
        given = f"{weights_TR.dtype} on {weights_TR.device.type}"
        raise ValueError(f"impl='cpp' computes in float32 on a CPU, the weights are {given}; use 'auto'")
    library = _library()
    if not isinstance(library, str):
        return "cpp"
    if impl == "cpp":
        raise ValueError(f"impl='cpp' cannot be used here: {library}; 'auto' picks an available one")
    _warn_once(library)
    return "reference"


@cache
def _tables(window: int) -> Tensor:
    """Lookup tables `[4, stride]`, float32, for the integers 0 to at least `window`.

    They hold log1p of a count, and the three features that depend only on the lag.
    """
    number = torch.arange(-(-(window + 1) // _LANES) * _LANES, dtype=torch.float64)
    log = number.log1p()
    return torch.stack([log, LAG_SCALE * log, (-number / LAG_DECAY).exp(), torch.ones_like(log)]).float()


def _call(name: str, num_candidates: int, window: int, tensors: dict[str, Tensor]) -> None:
    """Call a function of the library on `tensors` (contiguous, keyed by their names in `RepeatBonusArgs`)."""
    library = _library()
    assert not isinstance(library, str), library
    tokens, events = len(tensors["row"]), tensors["rank"].shape[1]
    # Waking the thread pool costs about as much as ten thousand items.
    threads = torch.get_num_threads() if tokens * num_candidates > 2**14 else 1
    tables = _tables(window)
    sizes = (tokens, events, num_candidates, window, min(RECENT, window), tables.shape[1], threads)
    fields: dict[str, int] = dict(zip(_SIZES, sizes, strict=True))
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    getattr(library, name)(ctypes.byref(_RepeatBonusArgs(**fields, **pointers, tables=tables.data_ptr())))


class _FusedBonus(torch.autograd.Function):
    """Saves only the events; the backward pass recomputes the features from them."""

    @staticmethod
    def forward(
        ctx: Any,
        weights_TR: Tensor,
        rank_BE: Tensor,
        row_T: Tensor,
        step_T: Tensor,
        num_candidates: int,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        positions = {"rank": rank_BE, "row": row_T.contiguous(), "step": step_T.contiguous()}
        bonus_TN = weights_TR.new_empty(len(row_T), num_candidates)
        seen_TN = torch.empty(len(row_T), num_candidates, dtype=torch.bool)
        outputs = {"bonus": bonus_TN, "seen": seen_TN}
        _call("repeat_bonus_forward", num_candidates, window, {**positions, "weights": weights_TR, **outputs})
        ctx.save_for_backward(*positions.values())
        ctx.num_candidates, ctx.window = num_candidates, window
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
            "repeat_bonus_backward",
            ctx.num_candidates,
            ctx.window,
            {**tensors, "dbonus": dbonus_TN, "dweights": dweights_TR},
        )
        return dweights_TR, None, None, None, None, None

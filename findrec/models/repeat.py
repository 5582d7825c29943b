"""Repeat consumption: what a user already had is often what comes next.

A tower gives each asked-for position R weights, and an item the user already met gets `phi . weights` added
to its score, where `phi` are causal features of that item in that history. Sums over the catalogue stay one
GEMM; only the items of a user's own history get the addition.

Shape letters: B users, L padded length, T asked-for positions, N most distinct items of one user, R features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from findrec.datasets.batch import Batch

NUM_REPEAT_FEATURES = 5
RECENT = 100  # events that "lately" looks back
JUST_NOW = 16.0  # events over which the "just now" feature fades: about a shopping basket
LAG_SCALE = 0.25  # log1p of a lag runs to about 7; the other features stay near 1
_BLOCK_ELEMENTS = 4 << 20  # of the dense [rows, L, N] counts held at once


@dataclass(frozen=True)
class OwnItems:
    """The items of each user's inputs, and their features at each asked-for position."""

    ids_BN: Tensor  # int64, distinct ids of the row's inputs, ascending, then zeros
    row_T: Tensor  # int64, the row of each asked-for position
    seen_TN: Tensor  # bool, the item occurred at or before that position
    phi_TNR: Tensor  # float32, zero where unseen


def own_items(batch: Batch) -> OwnItems:
    """Distinct items of every history and, at each asked-for position, R features of those met so far.

    The features are 1, log1p(times met), log1p(events since the last time) / 4, log1p(times met within the
    last 100 events) and exp(-events since / 16); the last two let a score rise some time after a purchase
    and fall again. Memory is about T x N x (R + 3) plus one bounded block of dense counts.
    """
    item_BL, (num_rows, length) = batch.item, batch.item.shape
    device = item_BL.device
    rank_BL, ids_BN = _rank_items(item_BL)
    jump_BL = _jump_to_last(rank_BL)
    num_own = ids_BN.shape[1]
    row_T = torch.div(batch.position, length, rounding_mode="floor")
    step_T = batch.position - row_T * length

    # Stored as [T, R, N]: that order makes the bonus of all pairs one batched matrix product.
    phi_TRN = torch.empty(len(row_T), NUM_REPEAT_FEATURES, num_own, device=device)
    seen_TN = torch.empty(len(row_T), num_own, dtype=torch.bool, device=device)
    block = max(1, _BLOCK_ELEMENTS // max(1, (length + 1) * (num_own + 1)))
    for lo in range(0, num_rows, block):
        hi = min(lo + block, num_rows)
        # Positions ascend, so those of a block of rows lie together.
        first, end = torch.searchsorted(row_T, torch.tensor([lo, hi], device=device)).tolist()
        row, step = row_T[first:end] - lo, step_T[first:end]
        met = _running_sum(rank_BL[lo:hi], torch.ones_like(jump_BL[lo:hi]), num_own)
        count = met[row, step + 1]
        recent = count - met[row, (step + 1 - RECENT).clamp(min=0)]
        last = _running_sum(rank_BL[lo:hi], jump_BL[lo:hi], num_own)[row, step + 1]
        seen = torch.gt(count, 0, out=seen_TN[first:end])
        _fill_features(phi_TRN[first:end], count, step[:, None] - last, recent, seen)
    return OwnItems(ids_BN, row_T, seen_TN, phi_TRN.transpose(1, 2))


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
    there = seen.to(torch.float32)
    phi[:, 0] = there
    phi[:, 1] = count.log1p_()  # zero where unseen, as is `recent`
    phi[:, 3] = recent.log1p_()
    torch.mul(lag.log1p(), there, out=phi[:, 2]).mul_(LAG_SCALE)
    torch.mul(lag.mul_(-1.0 / JUST_NOW).exp_(), there, out=phi[:, 4])


def _rank_items(item_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each event's item among the row's distinct items (padding: N), and those items."""
    # Padding sorts last as the largest id, so that real items get ranks 0, 1, ... in ascending order.
    largest = torch.iinfo(torch.int64).max
    sorted_BL, order_BL = item_BL.masked_fill(item_BL == 0, largest).sort(dim=1, stable=True)
    fresh_BL = torch.ones_like(sorted_BL, dtype=torch.bool)
    fresh_BL[:, 1:] = sorted_BL[:, 1:] != sorted_BL[:, :-1]
    place_BL = fresh_BL.cumsum(1) - 1
    real_BL = sorted_BL != largest
    num_own = max(1, int((fresh_BL & real_BL).sum(1).max())) if item_BL.numel() else 1
    place_BL = place_BL.masked_fill(~real_BL, num_own)
    ids = item_BL.new_zeros(item_BL.shape[0], num_own + 1)
    ids.scatter_(1, place_BL, sorted_BL.masked_fill(~real_BL, 0))
    rank_BL = torch.empty_like(place_BL).scatter_(1, order_BL, place_BL)
    return rank_BL, ids[:, :num_own].contiguous()


def _jump_to_last(rank_BL: Tensor) -> Tensor:
    """Steps from an item's previous event to this one (from 0 at its first): sums to its last place."""
    sorted_BL, order_BL = rank_BL.sort(dim=1, stable=True)
    jump_BL = order_BL.clone()
    same_BL = sorted_BL[:, 1:] == sorted_BL[:, :-1]
    jump_BL[:, 1:] -= torch.where(same_BL, order_BL[:, :-1], 0)
    return torch.empty_like(jump_BL).scatter_(1, order_BL, jump_BL).to(torch.float32)


def _running_sum(rank_bL: Tensor, value_bL: Tensor, num_own: int) -> Tensor:
    """`[b, L + 1, N]`: sums of the values of each item's events before step l. Whole numbers, so exact."""
    rows, length = rank_bL.shape
    dense = value_bL.new_zeros(rows, length + 1, num_own + 1)
    dense[:, 1:].scatter_(2, rank_bL[..., None], value_bL[..., None])
    return dense.cumsum_(1)[..., :num_own]


class RepeatHead(nn.Module):
    """User vector -> weights of the repeat features. Starts at zero: no bonus before it is learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weights = nn.Linear(dim, NUM_REPEAT_FEATURES)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, h_Td: Tensor) -> Tensor:
        """`[T, R]` weights."""
        weights: Tensor = self.weights(h_Td)
        return weights

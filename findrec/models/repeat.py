"""Repeat consumption: what a user already had is often what comes next.

A tower gives each asked-for position R weights, and an item the user met lately gets `phi . weights` added
to its score, where `phi` are causal features of that item in that history (findrec/ops/own_bonus.py). Sums
over the catalogue stay one GEMM; only the items of a user's own history get the addition.

"Lately" is the last `OWN_WINDOW` events, so that an event costs the same however long the history is. Rows
longer than that are cut into pieces that overlap: what a position sees depends on its own window alone.

Shape letters: B users, L padded length, T asked-for positions, P pieces of rows, E events of a piece, N most
distinct items of one piece, R features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from findrec.datasets.batch import Batch
from findrec.ops.linear_cross_entropy import OwnBonus
from findrec.ops.own_bonus import NUM_REPEAT_FEATURES, Impl, own_bonus

OWN_WINDOW = 1024  # events that an item counts as a user's own for
# A piece asks about a fourth of a window: its own items are then those of 1.25 windows, few of them unseen.
_PIECES_OF_A_WINDOW = 4


@dataclass(frozen=True)
class OwnItems:
    """The items each asked-for position may call its own."""

    ids_PN: Tensor  # int64, distinct ids of the piece's events, ascending, then zeros
    rank_PE: Tensor  # int64, place of each event's item in them; N for padding
    row_T: Tensor  # int64, the piece of each asked-for position, ascending
    step_T: Tensor  # int64, its event in that piece
    window: int  # events that an item is remembered for

    def bonus(self, weights_TR: Tensor, impl: Impl = "auto") -> OwnBonus:
        """What the catalogue's scores get added, differentiable in the weights; see `own_bonus`."""
        bonus_TN, seen_TN = own_bonus(
            weights_TR,
            self.rank_PE,
            self.row_T,
            self.step_T,
            num_own=self.ids_PN.shape[1],
            window=self.window,
            impl=impl,
        )
        return OwnBonus(self.ids_PN, self.row_T, seen_TN, bonus_TN)


def own_items(batch: Batch, window: int = OWN_WINDOW) -> OwnItems:
    """Distinct items of every history, or of each piece of it that is asked about.

    A row up to `window` events long is one piece. A longer one is cut into pieces of `window / 4` positions,
    each with the `window - 1` events before them; pieces without an asked-for position are left out, so
    asking for the last position alone costs O(window) a user.
    """
    num_rows, length = batch.item.shape
    row_T = torch.div(batch.position, length, rounding_mode="floor")
    step_T = batch.position - row_T * length
    asked, before = (length, 0) if length <= window else (max(1, window // _PIECES_OF_A_WINDOW), window - 1)
    pieces_of_row = -(-length // asked)
    key_T = row_T * pieces_of_row + torch.div(step_T, asked, rounding_mode="floor")
    key_P, piece_T = torch.unique_consecutive(key_T, return_inverse=True)
    if not len(key_P):  # nothing is asked: losses still need one row of own items
        key_P = key_T.new_zeros(min(1, num_rows))
    row_P = torch.div(key_P, pieces_of_row, rounding_mode="floor")
    first_P = (key_P - row_P * pieces_of_row) * asked - before  # negative where the row's start comes later
    event_PE = first_P[:, None] + torch.arange(before + asked, device=first_P.device)
    item_PE = batch.item[row_P[:, None], event_PE.clamp(0, max(0, length - 1))]
    item_PE = item_PE.masked_fill((event_PE < 0) | (event_PE >= length), 0)
    rank_PE, ids_PN = _rank_items(item_PE)
    return OwnItems(ids_PN, rank_PE, piece_T, step_T - first_P[piece_T], window)


def _rank_items(item_PE: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each event's item among the piece's distinct items (padding: N), and those items."""
    # Padding sorts last as the largest id, so that real items get ranks 0, 1, ... in ascending order.
    largest = torch.iinfo(torch.int64).max
    sorted_PE, order_PE = item_PE.masked_fill(item_PE == 0, largest).sort(dim=1, stable=True)
    fresh_PE = torch.ones_like(sorted_PE, dtype=torch.bool)
    fresh_PE[:, 1:] = sorted_PE[:, 1:] != sorted_PE[:, :-1]
    place_PE = fresh_PE.cumsum(1) - 1
    real_PE = sorted_PE != largest
    num_own = max(1, int((fresh_PE & real_PE).sum(1).max())) if item_PE.numel() else 1
    place_PE = place_PE.masked_fill(~real_PE, num_own)
    ids = item_PE.new_zeros(item_PE.shape[0], num_own + 1)
    ids.scatter_(1, place_PE, sorted_PE.masked_fill(~real_PE, 0))
    rank_PE = torch.empty_like(place_PE).scatter_(1, order_PE, place_PE)
    return rank_PE, ids[:, :num_own].contiguous()


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

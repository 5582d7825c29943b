"""Repeat consumption: a learned score bonus for the items in the recent history of a user.

The model predicts R weights per target position, and each item of the user's last `REPEAT_WINDOW` events (a
repeat candidate) gets the bonus `phi . weights`, where `phi` are causal features of the item in the history
(findrec/ops/repeat_bonus.py). The scores of the catalogue remain one GEMM; only the candidates are adjusted.

The window bounds the cost per event. Longer rows are cut into overlapping chunks, which does not change the
result: each position depends on the events of its window only.

Shape letters: B users, L padded length, T target positions, P chunks of rows, E events of a chunk, N largest
number of distinct items of a chunk, R features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.devices import is_cpu
from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.ops.repeat_bonus import NUM_REPEAT_FEATURES, Impl, repeat_bonus

REPEAT_WINDOW = 1024  # latest events whose items are repeat candidates
# Positions per chunk as a fraction of the window: a chunk then has the candidates of 1.25 windows.
_CHUNKS_PER_WINDOW = 4


@dataclass(frozen=True)
class RepeatCandidates:
    """The repeat candidates of each target position."""

    ids_PN: Tensor  # int64, distinct ids of the chunk's events, ascending, then zeros
    rank_PE: Tensor  # int64, index of each event's item among them; N for padding
    row_T: Tensor  # int64, the chunk of each target position, ascending
    step_T: Tensor  # int64, its event within the chunk
    window: int  # latest events whose items are candidates
    slot_T: Tensor | None = None  # index of each target position among all events of the chunks, if known

    def bonus(self, weights_TR: Tensor, impl: Impl = "auto") -> RepeatBonus:
        """The bonuses of the candidates, differentiable in the weights; see `repeat_bonus`."""
        bonus_TN, seen_TN = repeat_bonus(
            weights_TR,
            self.rank_PE,
            self.row_T,
            self.step_T,
            num_candidates=self.ids_PN.shape[1],
            window=self.window,
            impl=impl,
        )
        longest = max(1, self.rank_PE.shape[1])
        return RepeatBonus(self.ids_PN, self.row_T, seen_TN, bonus_TN, longest, self.slot_T)


def repeat_candidates(batch: Batch, window: int = REPEAT_WINDOW) -> RepeatCandidates:
    """The repeat candidates of the target positions of a batch.

    A row of up to `window` events is one chunk. A longer one is cut into chunks of `window / 4` positions,
    each with the `window - 1` events before it; chunks without a target position are left out, so predicting
    only at the last position costs O(window) per user.
    """
    num_rows, length = batch.item.shape
    row_T = torch.div(batch.position, length, rounding_mode="floor")
    step_T = batch.position - row_T * length
    if length <= window and not is_cpu(batch.item.device):
        # Sizes that the host knows: a GPU need not be waited for. On a CPU fewer candidates are less work.
        rank_BE, ids_BN = _rank_items(batch.item, max(1, length))
        return RepeatCandidates(ids_BN, rank_BE, row_T, step_T, window, batch.position)
    stride, before = (length, 0) if length <= window else (max(1, window // _CHUNKS_PER_WINDOW), window - 1)
    chunks_per_row = -(-length // stride)
    key_T = row_T * chunks_per_row + torch.div(step_T, stride, rounding_mode="floor")
    key_P, chunk_T = torch.unique_consecutive(key_T, return_inverse=True)
    if not len(key_P):  # no target positions: losses still need one row of candidates
        key_P = key_T.new_zeros(min(1, num_rows))
    row_P = torch.div(key_P, chunks_per_row, rounding_mode="floor")
    start_P = (
        key_P - row_P * chunks_per_row
    ) * stride - before  # negative if the window begins before the row
    event_PE = start_P[:, None] + torch.arange(before + stride, device=start_P.device)
    item_PE = batch.item[row_P[:, None], event_PE.clamp(0, max(0, length - 1))]
    item_PE = item_PE.masked_fill((event_PE < 0) | (event_PE >= length), 0)
    rank_PE, ids_PN = _rank_items(item_PE)
    return RepeatCandidates(ids_PN, rank_PE, chunk_T, step_T - start_P[chunk_T], window)


def _rank_items(item_PE: Tensor, num_candidates: int | None = None) -> tuple[Tensor, Tensor]:
    """Index of each event's item among the distinct items of its chunk (padding: N), and those items.

    N is `num_candidates`, by default the most distinct items of a chunk.
    """
    # Padding is replaced by the largest id to be sorted last, so that items get ranks 0, 1, ... in order.
    largest = torch.iinfo(torch.int64).max
    sorted_PE, order_PE = item_PE.masked_fill(item_PE == 0, largest).sort(dim=1, stable=True)
    padding_PE = sorted_PE == largest
    new_PE = torch.zeros_like(padding_PE)  # whether an event's item is another than the one before
    new_PE[:, 1:] = sorted_PE[:, 1:] != sorted_PE[:, :-1]
    index_PE = new_PE.cumsum(1)
    if num_candidates is None:
        num_candidates = 1
        if item_PE.numel():
            num_candidates += max(0, int(index_PE.masked_fill(padding_PE, -1).max()))
    index_PE = index_PE.masked_fill(padding_PE, num_candidates)
    ids = item_PE.new_zeros(item_PE.shape[0], num_candidates + 1)
    ids.scatter_(1, index_PE, sorted_PE.masked_fill(padding_PE, 0))
    rank_PE = torch.empty_like(index_PE).scatter_(1, order_PE, index_PE)
    return rank_PE, ids[:, :num_candidates].contiguous()


class RepeatHead(nn.Module):
    """Predicts the weights of the repeat features from user vectors; initially zero (no bonus)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weights = nn.Linear(dim, NUM_REPEAT_FEATURES)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, h_Td: Tensor) -> Tensor:
        """`[T, R]` weights."""
        weights: Tensor = self.weights(h_Td)
        return weights

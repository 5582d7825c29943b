"""The parts of `_sampled_tiles` for a GPU: dense masks and padded products, of sizes that the host knows.

A GPU that is asked how many samples coincide, or where the tokens of a user end, has to be waited for; more
work of a known size is faster.

Shape letters: T tokens, t tokens of a tile, d width, B users, N repeat candidates of a user, S samples, L
most tokens of a user.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUM_FLOATS = 5  # the differentiable fields of `Inputs` come first


class Inputs(NamedTuple):
    """Tensors that the sampled loss reads; those of repeat candidates are all None or none is."""

    h_Td: Tensor
    target_row_Td: Tensor
    sample_row_Sd: Tensor
    candidate_row_BNd: Tensor | None
    bonus_TN: Tensor | None
    target_T: Tensor
    sample_S: Tensor
    log_expected_S: Tensor | None
    ids_BN: Tensor | None
    row_T: Tensor | None
    seen_TN: Tensor | None


def candidates_of_samples(ids_BN: Tensor, sample_S: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, S]` each: the index of a sample among a user's candidates, and whether it is one of them."""
    # Candidate ids ascend, with padding zeros first or last; sorting makes the search independent of that.
    sorted_BN, order_BN = ids_BN.sort(1)
    num_users, width = sorted_BN.shape
    samples = sample_S.expand(num_users, -1).contiguous()
    index = torch.searchsorted(sorted_BN, samples).clamp_(max=width - 1)
    is_candidate_BS = sorted_BN.gather(1, index) == samples
    return order_BN.gather(1, index), is_candidate_BS


class SampleMask:
    """Samples that coincide with exact candidates: a token's target and its seen items."""

    def __init__(self, inputs: Inputs) -> None:
        self._sample_S, self._target_T = inputs.sample_S, inputs.target_T
        self._row_T, self._seen_TN = inputs.row_T, inputs.seen_TN
        if inputs.ids_BN is not None:
            self._column_BS, self._is_candidate_BS = candidates_of_samples(inputs.ids_BN, inputs.sample_S)

    def drop(self, logit_tS: Tensor, rows: slice) -> None:
        """Write -inf to the logits of samples that coincide with an exact candidate of their token."""
        drop_tS = self._target_T[rows, None] == self._sample_S
        if self._row_T is not None and self._seen_TN is not None:
            row_t = self._row_T[rows]
            seen_tS = self._seen_TN[rows].gather(1, self._column_BS[row_t])
            drop_tS |= seen_tS & self._is_candidate_BS[row_t]
        logit_tS.masked_fill_(drop_tS, -torch.inf)


class PaddedCandidates:
    """Products of tokens with the repeat candidates of their users: all users at once, padded to L tokens."""

    def __init__(
        self, candidate_row_BNd: Tensor, row_T: Tensor, longest: int | None, slot_T: Tensor | None
    ) -> None:
        """`longest` is L; None: it is counted, for which the host waits. `slot_T`: see `RepeatBonus`."""
        self._rows_BNd = candidate_row_BNd
        if slot_T is not None and longest is not None:
            self._longest, self._slot_T = longest, slot_T
            return
        num_users = len(candidate_row_BNd)
        start_B = torch.searchsorted(row_T, torch.arange(num_users, device=row_T.device))
        step_T = torch.arange(len(row_T), device=row_T.device) - start_B[row_T]
        if longest is None:
            longest = int(step_T.max()) + 1 if len(row_T) else 1
        self._longest = longest
        self._slot_T = row_T * longest + step_T  # distinct, so that padding is a copy

    def _pad(self, x_tX: Tensor, rows: slice) -> Tensor:
        num_users = len(self._rows_BNd)
        padded = x_tX.new_zeros(num_users * self._longest, x_tX.shape[1])
        return padded.index_copy_(0, self._slot_T[rows], x_tX).view(num_users, self._longest, -1)

    def _unpad(self, x_BLX: Tensor, rows: slice) -> Tensor:
        return x_BLX.flatten(0, 1).index_select(0, self._slot_T[rows])

    def _products(self, x_BLX: Tensor, y_BXY: Tensor, rows: slice) -> Tensor:
        out_BLY = x_BLX.new_empty(*x_BLX.shape[:2], y_BXY.shape[2])
        return self._unpad(torch.bmm(x_BLX, y_BXY, out=out_BLY), rows)  # `out=` is exempt from autocast

    def logits(self, h_td: Tensor, rows: slice, *, out: Tensor) -> None:
        """Write the products `[t, N]` of the tokens in `rows`."""
        out.copy_(self._products(self._pad(h_td, rows), self._rows_BNd.transpose(1, 2), rows))

    def add_gradients(
        self,
        dlogit_tN: Tensor,
        h_td: Tensor,
        rows: slice,
        dh_td: Tensor | None,
        dcandidate_BNd: Tensor | None,
    ) -> None:
        """Add `dlogit candidate` to `dh_td` and `dlogit^T h` to `dcandidate_BNd`."""
        dlogit_BLN = self._pad(dlogit_tN, rows)
        if dh_td is not None:
            dh_td += self._products(dlogit_BLN, self._rows_BNd, rows)
        if dcandidate_BNd is not None:
            dcandidate_BNd.baddbmm_(dlogit_BLN.transpose(1, 2), self._pad(h_td, rows))

"""Tiled implementation of `findrec.ops.losses.sampled_cross_entropy`: loss and gradients in one pass.

A tile holds the logits of t tokens, `[t, N + S + 1]`: repeat candidates, samples, target. Matrix products
write into it, all operations are in place, and the gradients are computed from its softmax.

Excluded candidates get a logit of -inf. Samples that hit a token's target or its seen items are few, so they
are looked up in the sorted samples: comparing all pairs of tokens and samples costs as much as the softmax.
`_sampled_batches` has the parts that a GPU needs otherwise.

Shape letters: T tokens, t tokens of a tile, d width, B users, N repeat candidates of a user, S samples,
K hits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from findrec.ops.losses._eager import Gradients
from findrec.ops.losses._sampled_batches import NUM_FLOATS, Inputs, PaddedCandidates, SampleMask

_CPU_ROWS = 512  # most tokens per tile: larger tiles are no faster


def walk_tiles(
    inputs: Inputs,
    tile_bytes: int,
    needs_grad: tuple[bool, ...],
    *,
    batched: bool = False,
    longest: int | None = None,
    slot_T: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """The loss, and the gradients that `needs_grad` selects, in the dtype of the computation.

    `batched` is the form for a GPU (`_sampled_batches`); no user has more than `longest` tokens,
    `slot_T` is as in `RepeatBonus`.
    """
    dtype = torch.promote_types(inputs.h_Td.dtype, inputs.sample_row_Sd.dtype)
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    h_Td, target_row_Td, sample_row_Sd, candidate_row_BNd, bonus_TN = (
        None if x is None else x.detach().to(dtype) for x in inputs[:NUM_FLOATS]
    )
    assert h_Td is not None
    assert target_row_Td is not None
    assert sample_row_Sd is not None
    # Gradients with a row for each token are written tile by tile, the others are summed over tiles.
    dh_Td, dtarget_Td, dsample_Sd, dcandidate_BNd, dbonus_TN = gradients = tuple(
        None if x is None or not need else torch.empty_like(x) if by_token else torch.zeros_like(x)
        for x, need, by_token in zip(
            (h_Td, target_row_Td, sample_row_Sd, candidate_row_BNd, bonus_TN),
            needs_grad,
            (True, True, False, False, True),
            strict=True,
        )
    )
    num_tokens, num_candidates = len(h_Td), 0 if bonus_TN is None else bonus_TN.shape[1]
    width = num_candidates + len(sample_row_Sd) + 1
    shift_S = h_Td.new_zeros(1) if inputs.log_expected_S is None else -inputs.log_expected_S.to(dtype)
    hits = SampleMask(inputs) if batched else _Hits(inputs)
    own: PaddedCandidates | _OwnCandidates | None = None
    if candidate_row_BNd is not None:
        assert inputs.row_T is not None
        own = (
            PaddedCandidates(candidate_row_BNd, inputs.row_T, longest, slot_T)
            if batched
            else _OwnCandidates(candidate_row_BNd, inputs.row_T)
        )
    tile = _tile_rows(num_tokens, width, h_Td, tile_bytes)
    buffer = h_Td.new_empty(tile, width)
    loss = h_Td.new_zeros((), dtype=torch.float64)
    # `out=` and in-place products are also exempt from autocast.
    for start in range(0, num_tokens, tile):
        rows = slice(start, min(start + tile, num_tokens))
        h, target_row = h_Td[rows], target_row_Td[rows]
        p = buffer[: len(h)]
        p_candidate, p_sample, p_target = p[:, :num_candidates], p[:, num_candidates:-1], p[:, -1]
        torch.addmm(shift_S, h, sample_row_Sd.t(), out=p_sample)
        torch.sum(h * target_row, 1, out=p_target)
        is_target = None
        if bonus_TN is not None and own is not None:
            assert inputs.ids_BN is not None
            assert inputs.row_T is not None
            assert inputs.seen_TN is not None
            row_t = inputs.row_T[rows]
            is_target = inputs.ids_BN[row_t] == inputs.target_T[rows, None]
            own.logits(h, rows, out=p_candidate)
            p_candidate += bonus_TN[rows]
            p_candidate.masked_fill_(~inputs.seen_TN[rows] | is_target, -torch.inf)
            # The bonus of an unseen target is 0, so its entry can be added in any case.
            p_target += (bonus_TN[rows] * is_target).sum(1)
        hits.drop(p_sample, rows)
        # In place: logits become exp(s - max), then (softmax - one-hot of the target) * total; dividing the
        # narrow operands by `total` is cheaper than dividing the tile.
        high = p.amax(1, keepdim=True)
        target_logit = p_target - high[:, 0]
        total = p.sub_(high).exp_().sum(1, keepdim=True)
        loss += (total.log()[:, 0] - target_logit).sum(dtype=torch.float64)
        p_target -= total[:, 0]
        scaled_h = h / total
        if dsample_Sd is not None:
            dsample_Sd.addmm_(p_sample.t(), scaled_h)
        if dtarget_Td is not None:
            torch.mul(scaled_h, p_target[:, None], out=dtarget_Td[rows])
        if dh_Td is not None:
            torch.mm(p_sample, sample_row_Sd, out=dh_Td[rows]).addcmul_(target_row, p_target[:, None])
        if own is not None:
            dh = None if dh_Td is None else dh_Td[rows]
            own.add_gradients(p_candidate, scaled_h, rows, dh, dcandidate_BNd)
        if dh_Td is not None:
            dh_Td[rows].div_(total)
        if dbonus_TN is not None and is_target is not None:
            torch.addcmul(p_candidate, is_target.to(dtype), p_target[:, None], out=dbonus_TN[rows]).div_(
                total
            )
    return loss.to(dtype), gradients


class _OwnCandidates:
    """Products of tokens with the repeat candidates of their users, one for each user of a tile."""

    def __init__(self, candidate_row_BNd: Tensor, row_T: Tensor) -> None:
        self._rows_BNd, self._row_T = candidate_row_BNd, row_T

    def logits(self, h_td: Tensor, rows: slice, *, out: Tensor) -> None:
        """Write the products `[t, N]` of the tokens in `rows`."""
        for user, tokens in _users(self._row_T[rows]):
            torch.mm(h_td[tokens], self._rows_BNd[user].t(), out=out[tokens])

    def add_gradients(
        self,
        dlogit_tN: Tensor,
        h_td: Tensor,
        rows: slice,
        dh_td: Tensor | None,
        dcandidate_BNd: Tensor | None,
    ) -> None:
        """Add `dlogit candidate` to `dh_td` and `dlogit^T h` to `dcandidate_BNd`."""
        for user, tokens in _users(self._row_T[rows]):
            if dh_td is not None:
                dh_td[tokens].addmm_(dlogit_tN[tokens], self._rows_BNd[user])
            if dcandidate_BNd is not None:
                dcandidate_BNd[user].addmm_(dlogit_tN[tokens].t(), h_td[tokens])


class _Hits:
    """Samples that coincide with exact candidates: a token's target and its seen items."""

    def __init__(self, inputs: Inputs) -> None:
        self._sorted_S, self._order_S = inputs.sample_S.sort()
        self._row_T, self._seen_TN = inputs.row_T, inputs.seen_TN
        self._target_T, self._target_count_T = self._find(inputs.target_T)
        if inputs.ids_BN is not None:
            self._candidate_BN, self._candidate_count_BN = self._find(inputs.ids_BN)

    def drop(self, logit_tS: Tensor, rows: slice) -> None:
        """Write -inf to the logits of samples that coincide with an exact candidate of their token."""
        row_K, column_K = self._of(rows)
        logit_tS[row_K, column_K] = -torch.inf

    def _of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Pairs `[K]` each of a token, counted from the first of `rows`, and a column of the samples."""
        first, count = self._target_T[rows, None], self._target_count_T[rows, None]
        if self._row_T is not None and self._seen_TN is not None:
            row_t = self._row_T[rows]
            first = torch.cat([first, self._candidate_BN[row_t]], 1)
            count = torch.cat([count, self._candidate_count_BN[row_t] * self._seen_TN[rows]], 1)
        token, column = count.nonzero(as_tuple=True)
        first_P, count_P = first[token, column], count[token, column]
        # Each candidate stands for a run of equal samples: count from the first index of the run.
        ends_P = count_P.cumsum(0)
        nth_K = torch.arange(int(count_P.sum()), device=count.device)
        nth_K -= (ends_P - count_P).repeat_interleave(count_P)
        column_K = self._order_S[first_P.repeat_interleave(count_P) + nth_K]
        return token.repeat_interleave(count_P), column_K

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """First index of each id in the sorted samples, and its number of occurrences."""
        ids = ids.contiguous()
        first = torch.searchsorted(self._sorted_S, ids)
        return first, torch.searchsorted(self._sorted_S, ids, right=True) - first


def _users(row_t: Tensor) -> Iterator[tuple[int, slice]]:
    """Each user of a tile with the slice of its tokens, which are contiguous."""
    users, counts = torch.unique_consecutive(row_t, return_counts=True)
    start = 0
    for user, count in zip(users.tolist(), counts.tolist(), strict=True):
        yield user, slice(start, start + count)
        start += count


def _tile_rows(num_tokens: int, width: int, like: Tensor, tile_bytes: int) -> int:
    rows = tile_bytes // (width * like.element_size())
    if like.device.type == "cpu":
        rows = min(rows, _CPU_ROWS)
    return max(1, min(num_tokens, rows))

"""The tiled sampled softmax behind `findrec.ops.sampled_cross_entropy`: loss and gradients in one walk.

A tile holds the logits of t tokens, `[t, N + S + 1]`: own items, samples, target. Products write into it, all
passes are in place, and while it holds the softmax the gradients of all operands are formed from it.

Candidates that must not count get a logit of -inf. Those among the samples (hits of a token's target or of
items it has seen) are few: they are found by searching the sorted samples and written one by one, where
comparing all pairs of tokens and samples would cost as much as the softmax.

Shape letters: T tokens, t tokens of a tile, d width, B users, N own items of a user, S samples, K hits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from findrec.ops._eager import Gradients

_CPU_ROWS = 512  # of a tile at most: more do not speed the products up
NUM_FLOATS = 5  # the differentiable fields of `Inputs` come first


class Inputs(NamedTuple):
    """What a walk reads; the own fields are None together."""

    h_Td: Tensor
    target_row_Td: Tensor
    sample_row_Sd: Tensor
    own_row_BNd: Tensor | None
    bonus_TN: Tensor | None
    target_T: Tensor
    sample_S: Tensor
    log_expected_S: Tensor | None
    ids_BN: Tensor | None
    row_T: Tensor | None
    seen_TN: Tensor | None


def walk_tiles(inputs: Inputs, tile_bytes: int, wanted: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
    """The loss and the `wanted` gradients, in the dtype that is computed in."""
    dtype = torch.promote_types(inputs.h_Td.dtype, inputs.sample_row_Sd.dtype)
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    h_Td, target_row_Td, sample_row_Sd, own_row_BNd, bonus_TN = (
        None if x is None else x.detach().to(dtype) for x in inputs[:NUM_FLOATS]
    )
    assert h_Td is not None
    assert target_row_Td is not None
    assert sample_row_Sd is not None
    dh_Td, dtarget_Td, dsample_Sd, down_BNd, dbonus_TN = gradients = tuple(
        None if x is None or not want else torch.zeros_like(x)
        for x, want in zip((h_Td, target_row_Td, sample_row_Sd, own_row_BNd, bonus_TN), wanted, strict=True)
    )
    num_tokens, num_own = len(h_Td), 0 if bonus_TN is None else bonus_TN.shape[1]
    width = num_own + len(sample_row_Sd) + 1
    shift_S = h_Td.new_zeros(1) if inputs.log_expected_S is None else -inputs.log_expected_S.to(dtype)
    hits = _Hits(inputs)
    tile = _tile_rows(num_tokens, width, h_Td, tile_bytes)
    buffer = h_Td.new_empty(tile, width)
    loss = h_Td.new_zeros((), dtype=torch.float64)
    # Products write into given tensors (`out=`, in place) also because autocast leaves such ones alone.
    for start in range(0, num_tokens, tile):
        rows = slice(start, min(start + tile, num_tokens))
        h, target_row = h_Td[rows], target_row_Td[rows]
        p = buffer[: len(h)]
        of_own, of_sample, of_target = p[:, :num_own], p[:, num_own:-1], p[:, -1]
        torch.addmm(shift_S, h, sample_row_Sd.t(), out=of_sample)
        torch.sum(h * target_row, 1, out=of_target)
        is_target = None
        if bonus_TN is not None and own_row_BNd is not None:
            assert inputs.ids_BN is not None
            assert inputs.row_T is not None
            assert inputs.seen_TN is not None
            row_t = inputs.row_T[rows]
            is_target = inputs.ids_BN[row_t] == inputs.target_T[rows, None]
            for user, part in _users(row_t):
                torch.mm(h[part], own_row_BNd[user].t(), out=of_own[part])
            of_own += bonus_TN[rows]
            of_own.masked_fill_(~inputs.seen_TN[rows] | is_target, -torch.inf)
            # The target's bonus is zero where it is new to the user, so its own entry serves as its logit.
            of_target += (bonus_TN[rows] * is_target).sum(1)
        row_K, column_K = hits.of(rows)
        of_sample[row_K, column_K] = -torch.inf
        # From here on the buffer turns from logits into exp(s - max), then into the softmax minus the
        # target's one-hot, times `total`: narrow operands are divided by it instead.
        high = p.amax(1, keepdim=True)
        target_logit = of_target - high[:, 0]
        total = p.sub_(high).exp_().sum(1, keepdim=True)
        loss += (total.log()[:, 0] - target_logit).sum(dtype=torch.float64)
        of_target -= total[:, 0]
        scaled_h = h / total
        if dsample_Sd is not None:
            dsample_Sd.addmm_(of_sample.t(), scaled_h)
        if dtarget_Td is not None:
            torch.mul(scaled_h, of_target[:, None], out=dtarget_Td[rows])
        if dh_Td is not None:
            torch.mm(of_sample, sample_row_Sd, out=dh_Td[rows]).addcmul_(target_row, of_target[:, None])
        if own_row_BNd is not None:
            for user, part in _users(row_t):
                if dh_Td is not None:
                    dh_Td[rows][part].addmm_(of_own[part], own_row_BNd[user])
                if down_BNd is not None:
                    down_BNd[user].addmm_(of_own[part].t(), scaled_h[part])
        if dh_Td is not None:
            dh_Td[rows].div_(total)
        if dbonus_TN is not None and is_target is not None:
            torch.addcmul(of_own, is_target.to(dtype), of_target[:, None], out=dbonus_TN[rows]).div_(total)
    return loss.to(dtype), gradients


class _Hits:
    """Where the samples hit candidates that count exactly: a token's target, and items it has seen."""

    def __init__(self, inputs: Inputs) -> None:
        self._sorted_S, self._order_S = inputs.sample_S.sort()
        self._row_T, self._seen_TN = inputs.row_T, inputs.seen_TN
        self._target_T, self._target_count_T = self._find(inputs.target_T)
        if inputs.ids_BN is not None:
            self._own_BN, self._own_count_BN = self._find(inputs.ids_BN)

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Pairs `[K]` each of a token, counted from the first of `rows`, and a column of the samples."""
        first, count = self._target_T[rows, None], self._target_count_T[rows, None]
        if self._row_T is not None and self._seen_TN is not None:
            row_t = self._row_T[rows]
            first = torch.cat([first, self._own_BN[row_t]], 1)
            count = torch.cat([count, self._own_count_BN[row_t] * self._seen_TN[rows]], 1)
        token, place = count.nonzero(as_tuple=True)
        first_P, count_P = first[token, place], count[token, place]
        # Each found candidate stands for a run of equal samples: count from its first place on.
        ends_P = count_P.cumsum(0)
        nth_K = torch.arange(int(count_P.sum()), device=count.device)
        nth_K -= (ends_P - count_P).repeat_interleave(count_P)
        column_K = self._order_S[first_P.repeat_interleave(count_P) + nth_K]
        return token.repeat_interleave(count_P), column_K

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """First place of each id among the sorted samples, and how often it is there."""
        ids = ids.contiguous()
        first = torch.searchsorted(self._sorted_S, ids)
        return first, torch.searchsorted(self._sorted_S, ids, right=True) - first


def _users(row_t: Tensor) -> Iterator[tuple[int, slice]]:
    """Each user of a tile and its tokens, which lie together."""
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

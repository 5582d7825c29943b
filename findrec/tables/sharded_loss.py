"""Softmax cross-entropy of the tokens of all workers against a catalogue sharded by rows.

Every worker gathers all tokens (one microbatch per worker) and processes them in tiles: logits of its local
rows, then the maximum and the sum of exponentials over all workers (two small all-reduces per tile), then the
gradients from the same tile. No worker stores tokens x items, or the rows of another worker. Reducing per
tile avoids a second product of tokens and rows; an all-reduce, unlike a gather, does not send more per token
with more workers.

Shape letters: T tokens of this worker, A tokens of all workers, t tokens of a tile, n rows of a worker, d
width, B rows of events, N repeat candidates of a row, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.ops.losses.linear_cross_entropy import RepeatBonus, tile_rows
from findrec.tables.exchange import Shards
from findrec.tables.row_sums import add_some_rows_


@dataclass(frozen=True)
class ShardedLoss:
    """Loss and gradients of the tokens of one worker, multiplied by `share`."""

    loss: Tensor  # []
    dh_Td: Tensor
    dbonus_TN: Tensor | None


def sharded_cross_entropy(
    shards: Shards,
    h_Td: Tensor,
    rows_nd: Tensor,
    target_T: Tensor,
    drows_nd: Tensor,
    *,
    share: float,
    blocked: Tensor,
    repeat: RepeatBonus | None,
    tile_bytes: int,
) -> ShardedLoss:
    """`share * sum_t (logsumexp_v s_tv - s_t,target)` with its gradients (a collective call).

    `rows_nd` are the vectors of the local rows; `blocked` are local indices that are not classes. The
    gradient in these vectors, from the tokens of all workers, is added to `drows_nd`. Extra memory: vectors
    and bonuses of all tokens, and a tile of logits (`tile_bytes`, as in `linear_cross_entropy`).
    """
    tokens = _gather(shards, h_Td, target_T, repeat)
    dh_Ad = torch.zeros_like(tokens.h_Ad)
    dbonus_AN = None if tokens.bonus_AN is None else torch.zeros_like(tokens.bonus_AN)
    loss_A = torch.zeros_like(tokens.h_Ad[:, 0])
    tile = tile_rows(len(loss_A), rows_nd, tile_bytes)
    buffer = rows_nd.new_empty(tile, len(rows_nd))
    for start in range(0, len(loss_A), tile):
        part = slice(start, start + tile)
        h = tokens.h_Ad[part]
        target, target_is_local = _local_index(tokens.target_A[part], shards)
        p = torch.mm(h, rows_nd.t(), out=buffer[: len(h)])
        if tokens.bonus_AN is not None:
            assert tokens.ids_BN is not None
            assert tokens.row_A is not None
            candidate_ids = tokens.ids_BN[tokens.row_A[part]]
            index, is_local = _local_index(candidate_ids, shards)
            p.scatter_add_(1, index, tokens.bonus_AN[part] * is_local)
        p.index_fill_(1, blocked, -torch.inf)
        logit = p.gather(1, target[:, None])[:, 0].masked_fill_(~target_is_local, 0.0)
        high = shards.all_reduce(p.amax(1), dist.ReduceOp.MAX)
        p.sub_(high[:, None]).exp_()
        total, logit = shards.all_reduce(torch.stack([p.sum(1), logit]), dist.ReduceOp.SUM)
        loss_A[part] = total.log() + (high - logit)
        # The softmax is `p * scale`; it is cheaper to scale the narrow operands than the tile.
        scale = (1.0 / total)[:, None]
        torch.mm(p, rows_nd, out=dh_Ad[part]).mul_(scale)
        dh_Ad[part] -= rows_nd[target] * target_is_local[:, None]
        drows_nd.addmm_(p.t(), h * (scale * share))
        add_some_rows_(drows_nd, target, h, target_is_local, -share)
        if dbonus_AN is not None:
            is_target = candidate_ids == tokens.target_A[part, None]
            dbonus_AN[part] = (p.gather(1, index).mul_(scale) - is_target.to(p.dtype)) * is_local
    first = sum(tokens.lengths[: shards.rank])
    loss = loss_A[first : first + len(h_Td)].sum(dtype=torch.float64) * share
    dh_Td = shards.scatter_sum(dh_Ad, tokens.lengths).mul_(share)
    if dbonus_AN is None or repeat is None:
        return ShardedLoss(loss.to(rows_nd.dtype), dh_Td.to(h_Td.dtype), None)
    dbonus_TN = shards.scatter_sum(dbonus_AN, tokens.lengths)[:, : repeat.bonus_TN.shape[1]] * share
    return ShardedLoss(loss.to(rows_nd.dtype), dh_Td.to(h_Td.dtype), dbonus_TN.to(repeat.bonus_TN.dtype))


@dataclass(frozen=True)
class _Tokens:
    """The tokens of all workers, in rank order."""

    lengths: list[int]
    h_Ad: Tensor
    target_A: Tensor
    bonus_AN: Tensor | None = None
    ids_BN: Tensor | None = None
    row_A: Tensor | None = None


def _gather(shards: Shards, h_Td: Tensor, target_T: Tensor, repeat: RepeatBonus | None) -> _Tokens:
    num_rows, num_candidates = (0, 0) if repeat is None else repeat.ids_BN.shape
    lengths, rows, candidates = shards.lengths(len(h_Td), num_rows, num_candidates, device=h_Td.device)
    h_Ad = shards.gather_uneven(h_Td.detach().float(), lengths)
    target_A = shards.gather_uneven(target_T, lengths)
    if repeat is None:
        return _Tokens(lengths, h_Ad, target_A)
    padding = (0, max(candidates) - num_candidates)  # padding items with a bonus of zero
    return _Tokens(
        lengths,
        h_Ad,
        target_A,
        shards.gather_uneven(torch.nn.functional.pad(repeat.bonus_TN.detach().float(), padding), lengths),
        shards.gather_uneven(torch.nn.functional.pad(repeat.ids_BN, padding), rows),
        shards.gather_uneven(repeat.row_T + sum(rows[: shards.rank]), lengths),
    )


def _local_index(ids: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """The index of each id among the local rows (0 if it is not local), and whether it is local."""
    index = ids - shards.local.start
    is_local = (index >= 0) & (index < len(shards.local))
    return index.masked_fill_(~is_local, 0), is_local

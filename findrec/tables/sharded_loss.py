"""Softmax cross-entropy against a catalogue whose rows lie on several workers, each with tokens of its own.

Every worker gathers all tokens of the round (one microbatch of each worker) and walks over tiles of them: the
logits of its own rows, maximum and then sum of exponentials over all workers (two small all-reduces a tile),
and the gradients from the very same tile. Nobody holds tokens x items, or the rows of another worker. To
reduce a tile at a time saves a second product of tokens and rows, which reducing all tokens at once would
need; an all-reduce, unlike a gather, sends no more for each token the more workers there are.

Shape letters: T tokens of this worker, A tokens of all workers, t tokens of a tile, n rows a worker, d width,
B rows of events, N own items of a row, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.ops.linear_cross_entropy import OwnBonus, tile_rows
from findrec.tables.exchange import Shards


@dataclass(frozen=True)
class ShardedLoss:
    """What one worker gets back; all are multiplied by `share`."""

    loss: Tensor  # [] of its own tokens
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
    own: OwnBonus | None,
    tile_bytes: int,
) -> ShardedLoss:
    """`share * sum_t (logsumexp_v s_tv - s_t,target)` with its gradients (a collective).

    `rows_nd` belong to the rows this worker holds, `blocked` are the places among them that are no class.
    The gradient in these rows, of the tokens of all workers, is added to `drows_nd`. Memory beside it: all
    tokens' vectors and bonuses, and a tile of logits (`tile_bytes`, as in `linear_cross_entropy`).
    """
    tokens = _gather(shards, h_Td, target_T, own)
    dh_Ad = torch.zeros_like(tokens.h_Ad)
    dbonus_AN = None if tokens.bonus_AN is None else torch.zeros_like(tokens.bonus_AN)
    loss_A = torch.zeros_like(tokens.h_Ad[:, 0])
    tile = tile_rows(len(loss_A), rows_nd, tile_bytes)
    buffer = rows_nd.new_empty(tile, len(rows_nd))
    for start in range(0, len(loss_A), tile):
        part = slice(start, start + tile)
        h = tokens.h_Ad[part]
        target, target_mine = _places(tokens.target_A[part], shards)
        p = torch.mm(h, rows_nd.t(), out=buffer[: len(h)])
        if tokens.bonus_AN is not None:
            assert tokens.ids_BN is not None
            assert tokens.row_A is not None
            own_ids = tokens.ids_BN[tokens.row_A[part]]
            place, mine = _places(own_ids, shards)
            p.scatter_add_(1, place, tokens.bonus_AN[part] * mine)
        p.index_fill_(1, blocked, -torch.inf)
        logit = p.gather(1, target[:, None])[:, 0].masked_fill_(~target_mine, 0.0)
        high = shards.all_reduce(p.amax(1), dist.ReduceOp.MAX)
        p.sub_(high[:, None]).exp_()
        total, logit = shards.all_reduce(torch.stack([p.sum(1), logit]), dist.ReduceOp.SUM)
        loss_A[part] = total.log() + (high - logit)
        # The softmax is `p * scale`: narrow operands are multiplied by it instead of the tile.
        scale = (1.0 / total)[:, None]
        torch.mm(p, rows_nd, out=dh_Ad[part]).mul_(scale)
        dh_Ad[part] -= rows_nd[target] * target_mine[:, None]
        drows_nd.addmm_(p.t(), h * (scale * share))
        drows_nd.index_add_(0, target[target_mine], h[target_mine], alpha=-share)
        if dbonus_AN is not None:
            is_target = own_ids == tokens.target_A[part, None]
            dbonus_AN[part] = (p.gather(1, place).mul_(scale) - is_target.to(p.dtype)) * mine
    first = sum(tokens.lengths[: shards.rank])
    loss = loss_A[first : first + len(h_Td)].sum(dtype=torch.float64) * share
    dh_Td = shards.scatter_sum(dh_Ad, tokens.lengths).mul_(share)
    if dbonus_AN is None or own is None:
        return ShardedLoss(loss.to(rows_nd.dtype), dh_Td.to(h_Td.dtype), None)
    dbonus_TN = shards.scatter_sum(dbonus_AN, tokens.lengths)[:, : own.bonus_TN.shape[1]] * share
    return ShardedLoss(loss.to(rows_nd.dtype), dh_Td.to(h_Td.dtype), dbonus_TN.to(own.bonus_TN.dtype))


@dataclass(frozen=True)
class _Tokens:
    """The tokens of all workers, in rank order."""

    lengths: list[int]
    h_Ad: Tensor
    target_A: Tensor
    bonus_AN: Tensor | None = None
    ids_BN: Tensor | None = None
    row_A: Tensor | None = None


def _gather(shards: Shards, h_Td: Tensor, target_T: Tensor, own: OwnBonus | None) -> _Tokens:
    num_rows, num_own = (0, 0) if own is None else own.ids_BN.shape
    lengths, rows, owns = shards.lengths(len(h_Td), num_rows, num_own, device=h_Td.device)
    h_Ad = shards.gather_uneven(h_Td.detach().float(), lengths)
    target_A = shards.gather_uneven(target_T, lengths)
    if own is None:
        return _Tokens(lengths, h_Ad, target_A)
    wider = (0, max(owns) - num_own)  # the padding item with a bonus of zero
    return _Tokens(
        lengths,
        h_Ad,
        target_A,
        shards.gather_uneven(torch.nn.functional.pad(own.bonus_TN.detach().float(), wider), lengths),
        shards.gather_uneven(torch.nn.functional.pad(own.ids_BN, wider), rows),
        shards.gather_uneven(own.row_T + sum(rows[: shards.rank]), lengths),
    )


def _places(ids: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """The place of each id among this worker's rows, 0 where another holds it, and whether it is here."""
    place = ids - shards.own.start
    mine = (place >= 0) & (place < len(shards.own))
    return place.masked_fill_(~mine, 0), mine

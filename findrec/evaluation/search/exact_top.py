"""Top-k lists by exact scores over parts of a catalogue, and merging of such lists.

Scores are those of `findrec.ops.ranking.target_rank`: float64 sums, in a fixed order, of products of the
stored float32 numbers. Items are ordered by descending score, then by id, so lists do not depend on tiles,
shards or blocks. A float32 product proposes more than k items. All other items score below the last proposal
plus an error bound; users whose k-th exact score is not above that (usually because of duplicates) are scored
completely in float64.

Shape letters: B users, V items, T items of a tile, m proposals, d width, N items with a bonus or excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from findrec.ops.ranking._rank_special import Specials
from findrec.ops.ranking._rank_torch import SAFE_NORM, grid64, score_pairs
from findrec.ops.ranking.item_rows import ItemRows
from findrec.ops.ranking.target_rank import dot64

_SPARE = 32  # proposals beyond k
_BLOCK = 256  # users per product
_TILE = 4096  # items per product
# Iterates over parts of a catalogue: id of the first item, vectors [T, d].
Tiles = Callable[[], Iterable[tuple[int, Tensor]]]
Top = tuple[Tensor, Tensor]  # ids [B, k] int64 (0: padding), scores [B, k] float64 (-inf for padding)


def exact_top(
    users_Bd: Tensor, tiles: Tiles, k: int, *, since_V: Tensor | None = None, time_B: Tensor | None = None
) -> Top:
    """The best k of the items of `tiles()`; items with a score of NaN or -inf are not listed.

    `users_Bd` is `[B, d]`, or `[B, K, d]`: the score is the largest of the K inner products. With `since_V`
    `[V + 1]` and `time_B`, item v is listed for users with `time_B >= since_V[v]` only.
    """
    ids_Bm, near_Bm, vectors_Bmd, norm = _propose(users_Bd, tiles, k + _SPARE, since_V, time_B)
    num_users, m = ids_Bm.shape
    flat = torch.arange(num_users).repeat_interleave(m)
    exact_Bm = torch.cat(
        [
            score_pairs(
                users_Bd[flat[lo : lo + _TILE]], vectors_Bmd.reshape(num_users * m, -1)[lo : lo + _TILE]
            )
            for lo in range(0, num_users * m, _TILE)
        ]
        or [torch.zeros(0, dtype=torch.float64)]
    ).view(num_users, m)
    exact_Bm = exact_Bm.masked_fill(near_Bm == -torch.inf, -torch.inf)
    ids_Bk, scores_Bk = best((ids_Bm, exact_Bm), k)
    if m < k + _SPARE:
        open_B = torch.zeros(num_users, dtype=torch.bool)  # everything was proposed
    else:
        width = users_Bd.shape[-1]
        norm_B = torch.linalg.vector_norm(users_Bd, dim=-1, dtype=torch.float64).view(num_users, -1).amax(1)
        gamma = 2 * width * 2.0**-24 / (1 - width * 2.0**-24)
        bound_B = gamma * norm_B * norm + width * 2.0**-120 * (1 + norm_B + norm)
        last_B = near_Bm.double().amin(1) if m else norm_B
        # Written so that open_B is true for NaN.
        sure_B = (scores_Bk[:, -1] > last_B + bound_B) & (norm_B < SAFE_NORM) & (norm < SAFE_NORM)
        open_B = ~(sure_B | ((last_B == -torch.inf) & (norm_B < SAFE_NORM) & (norm < SAFE_NORM)))
    rows = open_B.nonzero()[:, 0]
    if len(rows):
        time_b = None if time_B is None else time_B[rows]
        ids_bk, scores_bk = _slow_top(users_Bd[rows], tiles, k, since_V, time_b)
        ids_Bk[rows], scores_Bk[rows] = 0, -torch.inf
        ids_Bk[rows, : ids_bk.shape[1]], scores_Bk[rows, : ids_bk.shape[1]] = ids_bk, scores_bk
    return ids_Bk, scores_Bk


def best(top: Top, k: int) -> Top:
    """The best k of some ids and scores, by descending score, then by id."""
    ids_Bm, scores_Bm = top
    scores_Bm = scores_Bm.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ids_Bm = torch.where(scores_Bm == -torch.inf, 0, ids_Bm)
    by_id = ids_Bm.argsort(dim=1, stable=True)
    ids_Bm, scores_Bm = ids_Bm.gather(1, by_id), scores_Bm.gather(1, by_id)
    scores_Bm, order_Bm = scores_Bm.sort(dim=1, descending=True, stable=True)
    return ids_Bm.gather(1, order_Bm)[:, :k], scores_Bm[:, :k]


def with_specials(top: Top, users_Bd: Tensor, items: ItemRows, special: Specials, k: int) -> Top:
    """The best k of a list after adding bonuses and removing excluded items (`special`).

    `top` must have at least k items more than any user has special items.
    """
    ids_Bm, scores_Bm = top
    score_S = dot64(users_Bd, items, special.row, special.item) + special.bonus
    score_S = score_S.masked_fill(~special.counted, -torch.inf)
    size_B = special.start[1:] - special.start[:-1]
    wide = int(size_B.max()) if len(size_B) else 0
    ids_BN = ids_Bm.new_zeros(len(ids_Bm), wide)
    scores_BN = scores_Bm.new_full((len(ids_Bm), wide), -torch.inf)
    column_S = torch.arange(len(special.row)) - special.start[special.row]
    ids_BN[special.row, column_S], scores_BN[special.row, column_S] = special.item, score_S
    # Ids ascend in each row, then 0: remove the special items from the list by binary search.
    sorted_BN = torch.where(ids_BN == 0, torch.iinfo(torch.int64).max, ids_BN)
    at_Bm = torch.searchsorted(sorted_BN, ids_Bm.contiguous()).clamp(max=max(0, wide - 1))
    if wide:
        scores_Bm = scores_Bm.masked_fill(sorted_BN.gather(1, at_Bm) == ids_Bm, -torch.inf)
    return best((torch.cat([ids_Bm, ids_BN], 1), torch.cat([scores_Bm, scores_BN], 1)), k)


def _late(lo: int, count: int, since_V: Tensor | None, time_B: Tensor | None) -> Tensor | None:
    if since_V is None or time_B is None:
        return None
    return since_V[lo : lo + count] > time_B[:, None]


def _propose(
    users_Bd: Tensor, tiles: Tiles, m: int, since_V: Tensor | None, time_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Ids, float32 scores and vectors of the m best items, and the largest norm of all items."""
    num_users, width = len(users_Bd), users_Bd.shape[-1]
    ids_Bm = torch.zeros(num_users, 0, dtype=torch.int64)
    near_Bm, vectors_Bmd = torch.zeros(num_users, 0), torch.zeros(num_users, 0, width)
    norm = torch.zeros((), dtype=torch.float64)
    for begin, items_Td in tiles():
        for a in range(0, len(items_Td), _TILE):
            tile_td, lo = items_Td[a : a + _TILE], begin + a
            norms_t = torch.linalg.vector_norm(tile_td, dim=1, dtype=torch.float64)
            norm = torch.maximum(norm, norms_t.max())  # NaN stays
            parts = []
            for b in range(0, num_users, _BLOCK):
                near_bt = users_Bd[b : b + _BLOCK] @ tile_td.T
                near_bt = near_bt.amax(1) if near_bt.dim() == 3 else near_bt
                time_b = None if time_B is None else time_B[b : b + _BLOCK]
                if (late_bt := _late(lo, len(tile_td), since_V, time_b)) is not None:
                    near_bt.masked_fill_(late_bt, -torch.inf)
                near_bt.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
                parts.append(near_bt.topk(min(m, near_bt.shape[1])))
            near_Bt, index_Bt = (torch.cat(both) for both in zip(*parts, strict=True))
            both_Bm = torch.cat([near_Bm, near_Bt], dim=1)
            kept = both_Bm.topk(min(m, both_Bm.shape[1]))
            old = ids_Bm.shape[1]
            ids_Bm = torch.cat([ids_Bm, index_Bt + lo], dim=1).gather(1, kept.indices)
            # Copy the vectors of the proposals: tiles of a file are overwritten.
            fresh_Bm = kept.indices >= old
            new_Bmd = torch.empty(*kept.indices.shape, width)
            new_Bmd[fresh_Bm] = tile_td[(ids_Bm - lo)[fresh_Bm]]
            row_Bm = torch.arange(num_users)[:, None].expand_as(kept.indices)
            new_Bmd[~fresh_Bm] = vectors_Bmd[row_Bm[~fresh_Bm], kept.indices[~fresh_Bm]]
            near_Bm, vectors_Bmd = kept.values, new_Bmd
    return ids_Bm, near_Bm, vectors_Bmd, float(norm)


def _slow_top(users_bd: Tensor, tiles: Tiles, k: int, since_V: Tensor | None, time_b: Tensor | None) -> Top:
    """The same as `exact_top` with every pair scored in float64."""
    top = torch.zeros(len(users_bd), 0, dtype=torch.int64), torch.zeros(len(users_bd), 0, dtype=torch.float64)
    for begin, items_Td in tiles():
        for a in range(0, len(items_Td), _TILE):
            tile_td, lo = items_Td[a : a + _TILE], begin + a
            scores_bt = grid64(users_bd, tile_td)
            if (late_bt := _late(lo, len(tile_td), since_V, time_b)) is not None:
                scores_bt.masked_fill_(late_bt, -torch.inf)
            ids_bt = torch.arange(lo, lo + len(tile_td)).expand_as(scores_bt)
            top = best((torch.cat([top[0], ids_bt], 1), torch.cat([top[1], scores_bt], 1)), k)
    return top

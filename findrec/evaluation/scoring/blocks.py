"""Scorers that compute arbitrary scores for ranges of items.

Scores are compared after rounding to float32; ties are broken by training popularity.

Shape letters: B users, T items of a tile, M seen items of a user, k items of a list.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.scoring.base import Query, Scorer, Top
from findrec.evaluation.scoring.users import IntArray, UserBlock
from findrec.ops.ranking.counting import EXCLUDED, rank_dense, too_late

_TILE_BYTES = 64 << 20
_KEYS_PER_TILE = (64 << 20) // 24 - 1  # maximum of `rank_dense`


class BlockScorer(Scorer):
    """Base class of scorers that score ranges of items."""

    popularity: IntArray  # [V + 1] dense rank of the training counts, which breaks ties

    @abstractmethod
    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """Scores `[B, hi - lo]` of the items lo..hi-1 (ids start at 1)."""

    def keys(self, block: UserBlock, lo: int, hi: int) -> Tensor:
        """`[B, hi - lo]` int64 keys in the order of (float32 score, popularity)."""
        return order_keys(self.score_block(block, lo, hi), self.popularity[lo:hi])

    def rank(self, query: Query) -> BlockRanking:
        """See `Scorer`."""
        return BlockRanking(self, query)

    def block_size(self, users_per_block: int, num_items: int) -> int:
        """See `Scorer`: the keys of a block for the whole catalogue must fit in one tile."""
        return max(1, min(users_per_block, _KEYS_PER_TILE // num_items))


@dataclass(frozen=True)
class BlockRanking:
    """The ranking of a query by scores of ranges."""

    scorer: BlockScorer
    query: Query

    def counts(self) -> tuple[Tensor, Tensor]:
        """See `Ranking`."""
        scorer, query = self.scorer, self.query
        return rank_dense(
            lambda lo, hi: scorer.keys(query.block, lo, hi),
            len(scorer.popularity) - 1,
            query.cases.row,
            query.cases.target,
            num_users=len(query.block.user),
            exclude_ids_BN=query.seen_BM,
            since_V=query.since_V,
            time_C=None if query.since_V is None else query.cases.time,
        )

    def top(self, k: int) -> Top:
        """See `Ranking`; scores are float32."""
        scorer, block, seen_BM = self.scorer, self.query.block, self.query.seen_BM
        times = self.query.list_times
        num_items = len(scorer.popularity) - 1
        tile = max(1, _TILE_BYTES // (24 * len(block.user)))
        keys_Bk = torch.zeros(len(block.user), 0, dtype=torch.int64)
        ids_Bk = keys_Bk.clone()
        for lo in range(1, num_items + 1, tile):
            hi = min(lo + tile, num_items + 1)
            keys_BT = scorer.keys(block, lo, hi)
            if seen_BM is not None:
                row, column = ((seen_BM >= lo) & (seen_BM < hi)).nonzero(as_tuple=True)
                keys_BT[row, seen_BM[row, column] - lo] = EXCLUDED
            if times is not None and (late_BT := too_late(times.since_V[lo:hi], times.time_B)) is not None:
                keys_BT.masked_fill_(late_BT, EXCLUDED)
            best = keys_BT.topk(min(k, hi - lo))
            keys_Bk = torch.cat([keys_Bk, best.values], dim=1)
            ids_Bk = torch.cat([ids_Bk, best.indices + lo], dim=1)
            merged = keys_Bk.topk(min(k, keys_Bk.shape[1]))
            keys_Bk, ids_Bk = merged.values, ids_Bk.gather(1, merged.indices)
        sortable = (keys_Bk >> 32).to(torch.int32)
        scores_Bk = torch.where(sortable < 0, sortable ^ 0x7FFFFFFF, sortable).view(torch.float32)
        return torch.where(keys_Bk == EXCLUDED, 0, ids_Bk), scores_Bk


def order_keys(scores: NDArray[np.float64], popularity: IntArray) -> Tensor:
    """Encode (score as float32, popularity < 2^31) as integers of the same order; NaN comes last."""
    single = scores.astype(np.float32)
    bits = single.view(np.int32)
    if np.isnan(single).any() or bits.min(initial=0) < 0:
        single[np.isnan(single)] = -np.inf
        single += np.float32(0)  # -0.0 becomes 0.0
        # IEEE floats of one sign sort like their bits, negative ones in reverse.
        bits = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    keys: IntArray = bits.astype(np.int64)
    keys <<= 32
    keys |= popularity
    return torch.from_numpy(keys)


def popularity_rank(folder: DataFolder) -> IntArray:
    """Dense rank `[V + 1]` of the training counts: 0 for the rarest; equal counts share a rank."""
    return np.unique(folder.train_count, return_inverse=True)[1].reshape(-1).astype(np.int64)

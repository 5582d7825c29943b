"""The first k items of each user: through FAISS where a score is a plain inner product, else through torch.

Lists are for coverage and for showing; they are float32 results and no rank is ever read off them.

Shape letters: B users, V items, d width, N own or excluded items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from findrec.evaluation.candidates import Candidates
from findrec.evaluation.faiss_library import import_faiss
from findrec.evaluation.scorers import BlockScorer, Queries, Scorer, UserBlock
from findrec.ops.counting import EXCLUDED, too_late

_TILE_BYTES = 64 << 20

Top = tuple[Tensor, Tensor]  # item ids [B, k] int64 (0: no more), their scores [B, k] float32
Late = tuple[Tensor, Tensor]  # times [V + 1] from which items compete, times [B] of the users


class TopItems:
    """Lists the best items of users for one scorer; holds the FAISS index of its vectors, built when needed.

    FAISS searches exactly (`IndexFlatIP`). Where a bonus or a filter changes single scores, or FAISS is not
    installed, torch scores tiles of users instead.
    """

    def __init__(self, scorer: Scorer, candidates: Candidates | None = None) -> None:
        self._scorer, self._candidates = scorer, candidates or Candidates(None)
        self._index: Any = None

    def of(self, block: UserBlock, k: int, *, mask_seen: bool, queries: Queries | None = None) -> Top:
        """The first min(k, V) items of a block's users; `queries` spares running a model again."""
        seen_BN = block.padded_items() if mask_seen else None
        late = self._candidates.late(block.cases, len(block.user))
        scorer = self._scorer
        if isinstance(scorer, BlockScorer):
            return _top_keys(scorer, block, k, seen_BN, late)
        queries = queries if queries is not None else scorer.queries(block)
        k = min(k, len(scorer.items_Vd) - 1)
        if queries.own_ids_BN is None and seen_BN is None and late is None:
            self._index = self._index or _flat_index(scorer.items_Vd)
            if self._index is not None:
                scores, place = self._index.search(np.ascontiguousarray(queries.users_Bd.cpu().numpy()), k)
                return torch.from_numpy(place + 1), torch.from_numpy(scores)
        return exact_top(queries, scorer.items_Vd, k, seen_BN, late)


def _flat_index(items_Vd: Tensor) -> Any:
    faiss = import_faiss()
    if faiss is None:
        return None
    index = faiss.IndexFlatIP(items_Vd.shape[1])
    index.add(np.ascontiguousarray(items_Vd[1:].cpu().numpy()))
    return index


def exact_top(
    queries: Queries, items_Vd: Tensor, k: int, seen_BN: Tensor | None = None, late: Late | None = None
) -> Top:
    """The first k <= V items by every item's score: bonuses added, seen and late items left out.

    `queries` and `items_Vd` are on one device; a score that is no number counts as the lowest.
    """
    step = max(1, _TILE_BYTES // (4 * len(items_Vd)))
    parts = []
    for lo in range(0, len(queries.users_Bd), step):
        scores_bV = queries.users_Bd[lo : lo + step] @ items_Vd.T
        if queries.own_ids_BN is not None and queries.own_bonus_BN is not None:
            ids, bonus = queries.own_ids_BN[lo : lo + step], queries.own_bonus_BN[lo : lo + step]
            scores_bV.scatter_add_(
                1, ids, bonus.to(scores_bV.dtype)
            )  # what lands on padding is dropped below
        if seen_BN is not None:
            scores_bV.scatter_(1, seen_BN[lo : lo + step].to(scores_bV.device), -torch.inf)
        if late is not None:
            since_V, time_B = (times.to(scores_bV.device) for times in late)
            scores_bV.masked_fill_(since_V > time_B[lo : lo + step, None], -torch.inf)
        scores_bV[:, 0] = -torch.inf
        best = scores_bV.nan_to_num_(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf).topk(k)
        ids = torch.where(best.values == -torch.inf, 0, best.indices)
        parts.append((ids.cpu(), best.values.cpu()))
    return torch.cat([ids for ids, _ in parts]), torch.cat([scores for _, scores in parts])


def _top_keys(
    scorer: BlockScorer, block: UserBlock, k: int, seen_BN: Tensor | None, late: Late | None
) -> Top:
    num_items = len(scorer.popularity) - 1
    tile = max(1, _TILE_BYTES // (24 * len(block.user)))
    keys_Bk = torch.zeros(len(block.user), 0, dtype=torch.int64)
    ids_Bk = keys_Bk.clone()
    for lo in range(1, num_items + 1, tile):
        hi = min(lo + tile, num_items + 1)
        keys_BT = scorer.keys(block, lo, hi)
        if seen_BN is not None:
            row, column = ((seen_BN >= lo) & (seen_BN < hi)).nonzero(as_tuple=True)
            keys_BT[row, seen_BN[row, column] - lo] = EXCLUDED
        if late is not None and (late_BT := too_late(late[0][lo:hi], late[1])) is not None:
            keys_BT.masked_fill_(late_BT, EXCLUDED)
        best = keys_BT.topk(min(k, hi - lo))
        keys_Bk = torch.cat([keys_Bk, best.values], dim=1)
        merged = keys_Bk.topk(min(k, keys_Bk.shape[1]))
        keys_Bk, ids_Bk = (
            merged.values,
            torch.cat([ids_Bk, best.indices + lo], dim=1).gather(1, merged.indices),
        )
    sortable = (keys_Bk >> 32).to(torch.int32)
    scores_Bk = torch.where(sortable < 0, sortable ^ 0x7FFFFFFF, sortable).view(torch.float32)
    return torch.where(keys_Bk == EXCLUDED, 0, ids_Bk), scores_Bk

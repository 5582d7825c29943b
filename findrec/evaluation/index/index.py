"""Top-k lists from a FAISS index of item vectors, without scoring the whole catalogue.

Any FAISS factory string is supported, with the inner product. An index cannot filter per user, so k + n items
are fetched for a user with n seen items and repeat candidates, of which at least k remain. Items that no user
of the batch may be shown (not available yet, not on the allow-list) are excluded from the search if the index
supports it, otherwise additional items are fetched. Repeat candidates are scored separately, as their bonus
is not an inner product. Results of an index with compressed vectors are scored again with the model's
vectors. Lists of an exact index are therefore exact; a list that the index cannot fill is made by exact
search.

Shape letters: B users, V items, d width, I indexed items, K fetched, M excluded, N repeat candidates or seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.folder.data_folder import ALWAYS, NEVER
from findrec.errors import FindRecError
from findrec.evaluation.index.search_batch import (
    Floats,
    Ints,
    SearchBatch,
    among,
    as_array,
    best,
    count_distinct,
)
from findrec.evaluation.scoring.base import Query, Scorer, Times, Top
from findrec.evaluation.scoring.inner_product import InnerProductRanking, InnerProductScorer
from findrec.evaluation.scoring.user_vectors import UserVectors, top_items
from findrec.evaluation.search.faiss_library import (
    GPU_MOST,
    Gpus,
    copy_to_gpus,
    keeps_vectors,
    need_faiss,
    reason,
    search_only,
)

_TILE_BYTES = 64 << 20


class ItemIndex:
    """A searchable index of item vectors, made by `build_index` or loaded by `index.store`.

    `max_fetch` is the largest number of items that one search returns. A list that needs more, or that the
    index cannot fill, is made by exact search; `num_exact` counts these lists.
    """

    def __init__(
        self, raw: Any, items_Vd: Tensor, since_V: Tensor | None, factory: str, gpus: Gpus = "none"
    ) -> None:
        self.raw, self.items_Vd, self.factory, self.setting = raw, items_Vd, factory, ""
        self.ids_I = held_items(len(items_Vd) - 1, since_V)
        self.num_exact, self.max_fetch = 0, len(self.ids_I)
        self._vectors_Vd = as_array(items_Vd)
        self._ids = np.append(self.ids_I, 0)  # FAISS returns -1 for "no more": id 0
        self._held_V = np.zeros(len(items_Vd), dtype=bool)
        self._held_V[self.ids_I] = True
        self._searcher, self._space = raw, need_faiss().ParameterSpace
        self._selects: bool | None = None  # not tried yet
        self._exact_scores = keeps_vectors(raw)
        if gpus != "none" and (on_gpus := copy_to_gpus(raw, gpus)) is not None:
            self._searcher, self._space = on_gpus, need_faiss().GpuParameterSpace
            self.max_fetch, self._selects = min(self.max_fetch, GPU_MOST), False

    @property
    def on_gpu(self) -> bool:
        """Whether the index is searched on GPUs."""
        return self._searcher is not self.raw

    def set(self, setting: str) -> None:
        """Set search parameters, e.g. `nprobe=8`; raises `FindRecError` for unknown ones."""
        if setting:
            try:
                self._space().set_index_parameters(self._searcher, setting)
            except RuntimeError as error:
                raise FindRecError(
                    f"index {self.factory!r} cannot be searched with {setting!r}: {reason(error)}. Settings "
                    "look like nprobe=8 (IVF) or efSearch=64 (HNSW)"
                ) from None
        self.setting = setting

    def top(
        self, queries: UserVectors, k: int, *, seen_BN: Tensor | None = None, times: Times | None = None
    ) -> Top:
        """The first min(k, V) items of each user; by exact search for users with several vectors.

        Items with a bonus and seen items must be distinct within a row. Items that are not in the index are
        never listed. A user vector that is not finite gets an empty list.

        Raises:
            FindRecError: if the vectors have another width than the index.
            ValueError: if k < 1.
        """
        if k < 1:
            raise ValueError(f"k={k}: a list needs at least one item")
        width = queries.users_Bd.shape[-1]
        if width != self.raw.d:
            raise FindRecError(
                f"user vectors have width {width}, index {self.factory!r} has width {self.raw.d}: search it "
                "with the model it was built from"
            )
        if queries.users_Bd.dim() == 3 and queries.users_Bd.shape[1] > 1:
            # The k nearest items of one vector of a user need not be those of the largest product.
            self.num_exact += len(queries.users_Bd)
            all_rows = torch.arange(len(queries.users_Bd))
            return self._exact(queries, all_rows, min(k, len(self.items_Vd) - 1), seen_BN, times)
        batch = SearchBatch.of(queries, seen_BN, times)
        num_users, k = len(batch.users_Bd), min(k, len(self.items_Vd) - 1)
        ids_Bk = np.zeros((num_users, k), dtype=np.int64)
        scores_Bk = np.full((num_users, k), -np.inf, dtype=np.float32)
        removed_BM = batch.removed()
        available_I = self._available(batch)
        params = None if available_I is None else search_only(self.raw, available_I)
        for rows, fetch in self._groups(batch, removed_BM, available_I, k):
            removed = removed_BM if removed_BM is None or len(rows) == num_users else removed_BM[rows]
            ids, scores = self._list(batch.rows(rows), removed, fetch, k, params)
            ids_Bk[rows, : ids.shape[1]], scores_Bk[rows, : ids.shape[1]] = ids, scores
        top_ids, top_scores = torch.from_numpy(ids_Bk), torch.from_numpy(scores_Bk)
        short = np.flatnonzero(ids_Bk[:, -1] == 0)  # best first: padding is at the end
        if len(short):
            short = short[(ids_Bk[short] > 0).sum(1) < np.minimum(k, self._possible(batch.rows(short)))]
        if len(short):
            self.num_exact += len(short)
            rows_B = torch.from_numpy(short)
            top_ids[rows_B], top_scores[rows_B] = self._exact(queries, rows_B, k, seen_BN, times)
        return top_ids, top_scores

    def _available(self, batch: SearchBatch) -> NDArray[np.bool_] | None:
        """Items `[I]` available to any user of the batch; None if all are, or if the index cannot select."""
        if batch.since_V is None or batch.time_B is None or not len(batch.time_B) or self._selects is False:
            return None
        available_I: NDArray[np.bool_] = batch.since_V[self.ids_I] <= batch.time_B.max()
        if available_I.all():
            return None
        if self._selects is None:
            try:
                probe = np.zeros((1, self.raw.d), dtype=np.float32)
                self.raw.search(probe, 1, params=search_only(self.raw, available_I))
                self._selects = True
            except RuntimeError:
                self._selects = False
        return available_I if self._selects else None

    def _groups(
        self, batch: SearchBatch, removed_BM: Ints | None, available_I: NDArray[np.bool_] | None, k: int
    ) -> Iterator[tuple[Ints, int]]:
        """Yield rows to search together and the number of items to fetch; skips rows for exact search."""
        searched_I = self.ids_I if available_I is None else self.ids_I[available_I]
        fetch_B = np.full(len(batch.users_Bd), k)
        if removed_BM is not None:
            fetch_B += count_distinct(removed_BM, self._held_V)
        if batch.since_V is not None and batch.time_B is not None:
            one_time = available_I is not None and bool((batch.time_B == batch.time_B[0]).all())
            if not one_time:
                since_I = np.sort(batch.since_V[searched_I])
                fetch_B += len(since_I) - np.searchsorted(since_I, batch.time_B, side="right")
        fetch_B = np.minimum(fetch_B, len(searched_I))
        searchable_B = (fetch_B <= self.max_fetch) & (fetch_B > 0) & np.isfinite(batch.users_Bd).all(1)
        # Group by power of two, so that one long history does not increase the cost of all users.
        power_B = np.where(searchable_B, np.ceil(np.log2(np.maximum(fetch_B, 1))), -1)
        for power in np.unique(power_B[searchable_B]):
            rows = np.flatnonzero(power_B == power)
            yield rows, int(fetch_B[rows].max())

    def _list(
        self, batch: SearchBatch, removed_BM: Ints | None, fetch: int, k: int, params: Any
    ) -> tuple[Ints, Floats]:
        """The best k of the `fetch` nearest items that may be listed and of the items with a bonus."""
        options = {} if params is None else {"params": params}
        scores_BK, row_BK = self._searcher.search(batch.users_Bd, fetch, **options)
        ids_BK = self._ids[row_BK]
        if not self._exact_scores:
            scores_BK = self._scores(batch.users_Bd, ids_BK)
        drop_BK = (ids_BK == 0) | batch.too_late(ids_BK)
        if removed_BM is not None:
            drop_BK |= among(ids_BK, removed_BM, len(self._held_V))
        scores_BK[drop_BK] = -np.inf
        if batch.own_BN is not None:
            ids_BK = np.concatenate([ids_BK, batch.own_BN], axis=1)
            scores_BK = np.concatenate([scores_BK, self._history_scores(batch)], axis=1)
        return best(ids_BK, scores_BK, k)

    def _history_scores(self, batch: SearchBatch) -> Floats:
        """Exact scores `[B, N]` of the items with a bonus, bonus included; -inf for excluded items."""
        own_BN, bonus_BN = batch.own_BN, batch.bonus_BN
        assert own_BN is not None
        assert bonus_BN is not None
        scores_BN = self._scores(batch.users_Bd, own_BN) + bonus_BN
        drop_BN = ~self._held_V[own_BN] | batch.too_late(own_BN)  # `_held_V` is False for padding
        if batch.seen_BM is not None:
            drop_BN |= among(own_BN, batch.seen_BM, len(self._held_V))
        scores_BN[drop_BN] = -np.inf
        return scores_BN

    def _scores(self, users_Bd: Floats, ids_BN: Ints) -> Floats:
        """Inner products `[B, N]` of users and the items in their rows."""
        step = max(1, _TILE_BYTES // (4 * max(1, ids_BN.shape[1] * users_Bd.shape[1])))
        scores_BN = np.empty(ids_BN.shape, dtype=np.float32)
        for lo in range(0, len(ids_BN), step):
            vectors = self._vectors_Vd[ids_BN[lo : lo + step]]
            scores_BN[lo : lo + step] = (vectors @ users_Bd[lo : lo + step, :, None])[:, :, 0]
        return scores_BN

    def _possible(self, batch: SearchBatch) -> Ints:
        """Number `[B]` of items that can be listed: in the index, available and not seen."""
        available_B = np.full(len(batch.users_Bd), len(self.ids_I))
        if batch.since_V is not None and batch.time_B is not None:
            since_I = np.sort(batch.since_V[self.ids_I])
            available_B = np.searchsorted(since_I, batch.time_B, side="right")
        if batch.seen_BM is None:
            return np.asarray(available_B)
        seen_BM = self._held_V[batch.seen_BM] & ~np.asarray(batch.too_late(batch.seen_BM))
        return np.asarray(available_B - seen_BM.sum(1))

    def _exact(
        self, queries: UserVectors, rows: Tensor, k: int, seen_BN: Tensor | None, times: Times | None
    ) -> Top:
        device = self.items_Vd.device
        users = queries.to(device).rows(rows.to(device))
        seen = None if seen_BN is None else seen_BN.cpu()[rows]
        row_times = None if times is None else times.to(torch.device("cpu")).rows(rows)
        if times is None and len(self.ids_I) < len(self.items_Vd) - 1:  # list no items outside the index
            since_V = torch.from_numpy(np.where(self._held_V, ALWAYS, NEVER))
            row_times = Times(since_V, torch.zeros(len(rows), dtype=torch.int64))
        return top_items(users, self.items_Vd, k, seen, row_times)


class IndexedScorer(Scorer):
    """A scorer whose lists come from an index of its item vectors; its counts are exact."""

    def __init__(self, scorer: InnerProductScorer, index: ItemIndex) -> None:
        self.name, self._scorer, self.index = scorer.name, scorer, index

    def rank(self, query: Query) -> IndexedRanking:
        """See `Scorer`."""
        return IndexedRanking(self._scorer.rank(query), self.index)


@dataclass(frozen=True)
class IndexedRanking:
    """An exact ranking whose lists come from an index."""

    exact: InnerProductRanking
    index: ItemIndex

    def counts(self) -> tuple[Tensor, Tensor]:
        """See `Ranking`."""
        return self.exact.counts()

    def top(self, k: int) -> Top:
        """See `Ranking`."""
        query = self.exact.query
        return self.index.top(self.exact.vectors, k, seen_BN=query.seen_BM, times=query.list_times)


def build_index(
    items_Vd: Tensor, factory: str, since_V: Tensor | None = None, *, gpus: Gpus = "none"
) -> ItemIndex:
    """Train and fill an index.

    Args:
        items_Vd: float32 `[V + 1, d]`; row 0 is padding.
        factory: a FAISS factory string, such as `Flat`, `IVF256,Flat` or `HNSW32`.
        since_V: times from which items are available (`Candidates.since_V`); items that never are available
            are left out.
        gpus: whether and how to search on GPUs.

    Raises:
        FindRecError: if vectors are not finite, or if the factory string is unknown or does not fit the
            catalogue (more lists than items, indivisible width).
    """
    faiss = need_faiss()
    _check_finite(items_Vd)
    ids_I = held_items(len(items_Vd) - 1, since_V)
    if not len(ids_I):
        raise FindRecError("no item of the catalogue is available: there is nothing to index")
    vectors = np.ascontiguousarray(as_array(items_Vd)[ids_I], dtype=np.float32)
    try:
        raw = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        raw.train(vectors)
        raw.add(vectors)
    except RuntimeError as error:
        raise FindRecError(
            f"FAISS cannot build an index {factory!r} of {len(ids_I):,} items of width {vectors.shape[1]}: "
            f"{reason(error)}. Examples: Flat; IVF64,Flat (no more lists than items); HNSW32"
        ) from None
    return ItemIndex(raw, items_Vd, since_V, factory, gpus)


def held_items(num_items: int, since_V: Tensor | None) -> Ints:
    """Ids of the items that are ever available, ascending: row i of an index is the i-th of them."""
    if since_V is None:
        return np.arange(1, num_items + 1)
    return np.flatnonzero(since_V.cpu().numpy()[1:] != NEVER) + 1


def _check_finite(items_Vd: Tensor) -> None:
    bad = (~torch.isfinite(items_Vd[1:]).all(1)).nonzero().squeeze(1) + 1
    if len(bad):
        raise FindRecError(
            f"cannot build an index: {len(bad):,} of {len(items_Vd) - 1:,} item vectors are not finite (NaN "
            f"or infinity), the first is that of item {int(bad[0])}. The training has diverged: train again "
            "with a lower training.optim.lr"
        )

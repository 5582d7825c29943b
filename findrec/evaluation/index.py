"""An index of item vectors: the first items of a user without scoring the whole catalogue.

Any FAISS factory string is taken, by inner product. An index knows nothing of single users, so what has to go
from a list is asked for in addition: a user of whom n items are seen or the user's own gets k + n items, of
which at least k stay. Items that may be shown to nobody (not on offer yet, not on the allow-list) are not
searched at all where the kind of index can select; elsewhere they are asked for in addition, too. A user's
own items are scored apart, as their bonus is no inner product: of the others no more than k are needed, and
the first k of those are among the k + n. What an index finds by shortened vectors is scored again by those
of the model. So over an index that searches exactly, lists are exact; and a list that an index leaves short
is made by exact search, so that every list is as long as it can be.

Shape letters: B users, V items, d width, I items in the index, K fetched, M left out, N own or seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.folder import ALWAYS, NEVER
from findrec.errors import FindRecError
from findrec.evaluation.faiss_library import (
    GPU_MOST,
    Gpus,
    copy_to_gpus,
    keeps_vectors,
    need_faiss,
    reason,
    search_only,
)
from findrec.evaluation.index_asked import Asked, Floats, Ints, among, as_array, best, count_distinct
from findrec.evaluation.scorers import Queries
from findrec.evaluation.topk import Late, Top, exact_top

_TILE_BYTES = 64 << 20


class ItemIndex:
    """Searches item vectors; `build_index` makes one, `findrec.evaluation.index_store` keeps it.

    `most` is the largest number of items that one search returns; a list that needs more is made by exact
    search, as is one that the index cannot fill. `num_exact` counts those lists.
    """

    def __init__(
        self, raw: Any, items_Vd: Tensor, since_V: Tensor | None, factory: str, gpus: Gpus = "none"
    ) -> None:
        self.raw, self.items_Vd, self.factory, self.setting = raw, items_Vd, factory, ""
        self.ids_I = held_items(len(items_Vd) - 1, since_V)
        self.num_exact, self.most = 0, len(self.ids_I)
        self._vectors_Vd = as_array(items_Vd)
        self._ids = np.append(self.ids_I, 0)  # FAISS says -1 for "no more": id 0
        self._held_V = np.zeros(len(items_Vd), dtype=bool)
        self._held_V[self.ids_I] = True
        self._searcher, self._space = raw, need_faiss().ParameterSpace
        self._selects: bool | None = None  # not tried yet
        self._scores_stand = keeps_vectors(raw)
        if gpus != "none" and (there := copy_to_gpus(raw, gpus)) is not None:
            self._searcher, self._space = there, need_faiss().GpuParameterSpace
            self.most, self._selects = min(self.most, GPU_MOST), False

    @property
    def on_gpu(self) -> bool:
        """Whether GPUs search it."""
        return self._searcher is not self.raw

    def set(self, setting: str) -> None:
        """Search with e.g. `nprobe=8` from now on; raises `FindRecError` for what the index does not have."""
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
        self, queries: Queries, k: int, *, seen_BN: Tensor | None = None, late: Late | None = None
    ) -> Top:
        """The first min(k, V) items of users, as `exact_top` gives them as far as the index finds them.

        Own and seen items are distinct within a row. Items the index was built without never appear. A user
        vector that is not finite gets what scores that are no number give: no items. Raises `FindRecError`
        for users of another width, `ValueError` for k < 1.
        """
        if k < 1:
            raise ValueError(f"k={k}: a list has one place or more")
        if queries.users_Bd.shape[1] != self.raw.d:
            raise FindRecError(
                f"users are vectors of width {queries.users_Bd.shape[1]}, index {self.factory!r} is of width "
                f"{self.raw.d}: search it with the model whose items it holds"
            )
        asked = Asked.of(queries, seen_BN, late)
        num_users, k = len(asked.users_Bd), min(k, len(self.items_Vd) - 1)
        ids_Bk = np.zeros((num_users, k), dtype=np.int64)
        scores_Bk = np.full((num_users, k), -np.inf, dtype=np.float32)
        removed_BM = asked.removed()
        among_I = self._on_offer(asked)
        params = None if among_I is None else search_only(self.raw, among_I)
        for rows, fetch in self._groups(asked, removed_BM, among_I, k):
            gone = removed_BM if removed_BM is None or len(rows) == num_users else removed_BM[rows]
            ids, scores = self._list(asked.rows(rows), gone, fetch, k, params)
            ids_Bk[rows, : ids.shape[1]], scores_Bk[rows, : ids.shape[1]] = ids, scores
        found = torch.from_numpy(ids_Bk), torch.from_numpy(scores_Bk)
        short = np.flatnonzero(ids_Bk[:, -1] == 0)  # best first: gaps are at the end
        if len(short):
            short = short[(ids_Bk[short] > 0).sum(1) < np.minimum(k, self._possible(asked.rows(short)))]
        if len(short):
            self.num_exact += len(short)
            rows_B = torch.from_numpy(short)
            found[0][rows_B], found[1][rows_B] = self._exact(queries, rows_B, k, seen_BN, late)
        return found

    def _on_offer(self, asked: Asked) -> NDArray[np.bool_] | None:
        """`[I]` items that anyone asking may be shown; None where these are all, or cannot be selected."""
        if asked.since_V is None or asked.time_B is None or not len(asked.time_B) or self._selects is False:
            return None
        among_I: NDArray[np.bool_] = asked.since_V[self.ids_I] <= asked.time_B.max()
        if among_I.all():
            return None
        if self._selects is None:
            try:
                probe = np.zeros((1, self.raw.d), dtype=np.float32)
                self.raw.search(probe, 1, params=search_only(self.raw, among_I))
                self._selects = True
            except RuntimeError:
                self._selects = False
        return among_I if self._selects else None

    def _groups(
        self, asked: Asked, removed_BM: Ints | None, among_I: NDArray[np.bool_] | None, k: int
    ) -> Iterator[tuple[Ints, int]]:
        """Rows that are searched together and how many items are fetched for them; none that cannot be."""
        searched_I = self.ids_I if among_I is None else self.ids_I[among_I]
        fetch_B = np.full(len(asked.users_Bd), k)
        if removed_BM is not None:
            fetch_B += count_distinct(removed_BM, self._held_V)
        if asked.since_V is not None and asked.time_B is not None:
            one_time = among_I is not None and bool((asked.time_B == asked.time_B[0]).all())
            if not one_time:
                since_I = np.sort(asked.since_V[searched_I])
                fetch_B += len(since_I) - np.searchsorted(since_I, asked.time_B, side="right")
        fetch_B = np.minimum(fetch_B, len(searched_I))
        able_B = (fetch_B <= self.most) & (fetch_B > 0) & np.isfinite(asked.users_Bd).all(1)
        # Users of one power of two go together: one long history does not make all fetch as much.
        power_B = np.where(able_B, np.ceil(np.log2(np.maximum(fetch_B, 1))), -1)
        for power in np.unique(power_B[able_B]):
            rows = np.flatnonzero(power_B == power)
            yield rows, int(fetch_B[rows].max())

    def _list(
        self, asked: Asked, removed_BM: Ints | None, fetch: int, k: int, params: Any
    ) -> tuple[Ints, Floats]:
        """The first k of the `fetch` nearest items that count, and of the own items."""
        how = {} if params is None else {"params": params}
        scores_BK, place_BK = self._searcher.search(asked.users_Bd, fetch, **how)
        ids_BK = self._ids[place_BK]
        if not self._scores_stand:
            scores_BK = self._scores(asked.users_Bd, ids_BK)
        drop_BK = (ids_BK == 0) | asked.too_late(ids_BK)
        if removed_BM is not None:
            drop_BK |= among(ids_BK, removed_BM, len(self._held_V))
        scores_BK[drop_BK] = -np.inf
        if asked.own_BN is not None:
            ids_BK = np.concatenate([ids_BK, asked.own_BN], axis=1)
            scores_BK = np.concatenate([scores_BK, self._own(asked)], axis=1)
        return best(ids_BK, scores_BK, k)

    def _own(self, asked: Asked) -> Floats:
        """`[B, N]` exact scores of own items, bonus included; -inf for those that do not count."""
        own_BN, bonus_BN = asked.own_BN, asked.bonus_BN
        assert own_BN is not None
        assert bonus_BN is not None
        scores_BN = self._scores(asked.users_Bd, own_BN) + bonus_BN
        drop_BN = ~self._held_V[own_BN] | asked.too_late(own_BN)  # padding is not held either
        if asked.seen_BM is not None:
            drop_BN |= among(own_BN, asked.seen_BM, len(self._held_V))
        scores_BN[drop_BN] = -np.inf
        return scores_BN

    def _scores(self, users_Bd: Floats, ids_BN: Ints) -> Floats:
        """`[B, N]` inner products of users and items of theirs."""
        step = max(1, _TILE_BYTES // (4 * max(1, ids_BN.shape[1] * users_Bd.shape[1])))
        scores_BN = np.empty(ids_BN.shape, dtype=np.float32)
        for lo in range(0, len(ids_BN), step):
            vectors = self._vectors_Vd[ids_BN[lo : lo + step]]
            scores_BN[lo : lo + step] = (vectors @ users_Bd[lo : lo + step, :, None])[:, :, 0]
        return scores_BN

    def _possible(self, asked: Asked) -> Ints:
        """`[B]` how many items there are to show: held, on offer, not seen."""
        num_users = len(asked.users_Bd)
        offered_B = np.full(num_users, len(self.ids_I))
        if asked.since_V is not None and asked.time_B is not None:
            since_I = np.sort(asked.since_V[self.ids_I])
            offered_B = np.searchsorted(since_I, asked.time_B, side="right")
        if asked.seen_BM is None:
            return np.asarray(offered_B)
        counts_BM = self._held_V[asked.seen_BM] & ~np.broadcast_to(
            asked.too_late(asked.seen_BM), asked.seen_BM.shape
        )
        return np.asarray(offered_B - counts_BM.sum(1))

    def _exact(
        self, queries: Queries, rows: Tensor, k: int, seen_BN: Tensor | None, late: Late | None
    ) -> Top:
        device = self.items_Vd.device
        parts = (queries.users_Bd, queries.own_ids_BN, queries.own_bonus_BN)
        users, own, bonus = (None if part is None else part.to(device)[rows.to(device)] for part in parts)
        assert users is not None
        seen = None if seen_BN is None else seen_BN.cpu()[rows]
        some_late = None if late is None else (late[0].cpu(), late[1].cpu()[rows])
        if late is None and len(self.ids_I) < len(self.items_Vd) - 1:  # what is not held is never shown
            since_V = torch.from_numpy(np.where(self._held_V, ALWAYS, NEVER))
            some_late = since_V, torch.zeros(len(rows), dtype=torch.int64)
        return exact_top(Queries(users, own, bonus), self.items_Vd, k, seen, some_late)


def build_index(
    items_Vd: Tensor, factory: str, since_V: Tensor | None = None, *, gpus: Gpus = "none"
) -> ItemIndex:
    """Train and fill an index by a FAISS factory string (`Flat`, `IVF256,Flat`, `HNSW32`, ...).

    `items_Vd` is float32 `[V + 1, d]`, row 0 padding. `since_V` are the times from which items are on offer
    (`Candidates.since_V`): items that never are stay out. `gpus` says whether, and how, it is searched there.
    Raises `FindRecError` for vectors that are not finite, an unknown factory, and one that does not fit the
    catalogue (more lists than items, a width that cannot be divided).
    """
    faiss = need_faiss()
    _check_finite(items_Vd)
    ids_I = held_items(len(items_Vd) - 1, since_V)
    if not len(ids_I):
        raise FindRecError("no item of the catalogue is on offer: there is nothing to index")
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
    """The ids of the items that are ever on offer, ascending: row i of an index is the i-th of them."""
    if since_V is None:
        return np.arange(1, num_items + 1)
    return np.flatnonzero(since_V.cpu().numpy()[1:] != NEVER) + 1


def _check_finite(items_Vd: Tensor) -> None:
    bad = (~torch.isfinite(items_Vd[1:]).all(1)).nonzero().squeeze(1) + 1
    if len(bad):
        raise FindRecError(
            f"{len(bad):,} of {len(items_Vd) - 1:,} item vectors are not finite (NaN or infinity), the first "
            f"that of item {int(bad[0])}: no index can be built of them. The training has "
            "diverged: train again with a lower training.optim.lr"
        )

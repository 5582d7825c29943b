"""An index of item vectors: the first items of a user without scoring the whole catalogue.

Any FAISS factory string is taken (Douze et al., "The Faiss library", arXiv 2401.08281), by inner product.
An index knows nothing of single users, so what has to go from a list is asked for in addition: a user of
whom n items are seen, not on offer yet, or the user's own gets k + n items, of which at least k stay. A
user's own items are scored apart, as their bonus is no inner product. Of the other items no more than k are
needed, and the first k of those are among the k + n: over an index that searches exactly, lists are exact.

Shape letters: B users, V items, d width, I items in the index, K fetched, M left out, N own or seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.folder import ALWAYS, NEVER
from findrec.errors import FindRecError
from findrec.evaluation.scorers import Queries
from findrec.evaluation.topk import Late, Top, exact_top, import_faiss

GPU_MOST = 2048  # items that FAISS's GPU indexes can return
_TILE_BYTES = 64 << 20

Ints = NDArray[np.int64]
Gpus = Literal["none", "replicate", "shard"]


def need_faiss() -> Any:
    """The `faiss` module; raises `FindRecError` where it is not installed."""
    faiss = import_faiss()
    if faiss is None:
        raise FindRecError(
            "FAISS is not installed, and indexes are built with it: pip install faiss-cpu (on a CUDA machine "
            "faiss-gpu; never both, as they own the same files)"
        )
    return faiss


def choose_gpus(asked: str | None = None) -> Gpus:
    """How indexes are searched: as asked, or `replicate` where FAISS finds a GPU and `none` where not.

    Raises `FindRecError` where GPUs are asked for and this FAISS has none.
    """
    faiss = need_faiss()
    there = bool(hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus())
    if asked == "none" or (asked is None and not there):
        return "none"
    if asked not in (None, "replicate", "shard"):
        raise FindRecError(f"--gpus {asked}: give none, replicate or shard")
    if not there:
        raise FindRecError(
            f"--gpus {asked}, but FAISS finds no GPU here. On a CUDA machine: pip uninstall faiss-cpu, then pip "
            "install faiss-gpu; without one leave --gpus out"
        )
    return "shard" if asked == "shard" else "replicate"


@dataclass(frozen=True)
class _Asked:
    """What some users ask for, on the CPU. NumPy: a single query is short, and torch slow to begin with."""

    users_Bd: NDArray[np.float32]
    own_BN: Ints | None
    bonus_BN: NDArray[np.float32] | None
    seen_BM: Ints | None  # ascending
    since_V: Ints | None
    time_B: Ints | None

    @staticmethod
    def of(queries: Queries, seen_BN: Tensor | None, late: Late | None) -> _Asked:
        own, bonus = queries.own_ids_BN, queries.own_bonus_BN
        with_own = own is not None and bonus is not None
        return _Asked(
            np.ascontiguousarray(_array(queries.users_Bd), dtype=np.float32),
            _array(own) if with_own else None,
            _array(bonus) if with_own else None,
            None if seen_BN is None else np.sort(_array(seen_BN), axis=1),
            None if late is None else _array(late[0]),
            None if late is None else _array(late[1]),
        )

    def rows(self, rows: Ints) -> _Asked:
        """The same for some of the users."""
        parts = (self.users_Bd, self.own_BN, self.bonus_BN, self.seen_BM)
        users, own, bonus, seen = (None if part is None else part[rows] for part in parts)
        assert users is not None
        return _Asked(
            users, own, bonus, seen, self.since_V, None if self.time_B is None else self.time_B[rows]
        )

    def too_late(self, ids_BK: Ints) -> NDArray[np.bool_] | bool:
        """`[B, K]` whether an item comes too late for its user; False where none does."""
        if self.since_V is None or self.time_B is None:
            return False
        return np.asarray(self.since_V[ids_BK] > self.time_B[:, None])

    def removed(self) -> Ints | None:
        """`[B, M]` ids to leave out of what is fetched, ascending: seen and own items."""
        own = None if self.own_BN is None else np.sort(self.own_BN, axis=1)
        if own is None or self.seen_BM is None:
            return own if self.seen_BM is None else self.seen_BM
        return np.sort(np.concatenate([self.seen_BM, own], axis=1), axis=1)


class ItemIndex:
    """Searches item vectors; `build_index` makes one, `findrec.evaluation.index_store` keeps it.

    `most` is the largest number of items that one search returns; a list that needs more, or that the index
    cannot fill, is made by exact search. `num_exact` counts those lists.
    """

    def __init__(
        self, raw: Any, items_Vd: Tensor, since_V: Tensor | None, factory: str, gpus: Gpus = "none"
    ) -> None:
        self.raw, self.items_Vd, self.factory, self.setting = raw, items_Vd, factory, ""
        self.ids_I = held_items(len(items_Vd) - 1, since_V)
        self.num_exact, self.most = 0, len(self.ids_I)
        self._vectors_Vd = _array(items_Vd)
        self._ids = np.append(self.ids_I, 0)  # FAISS says -1 for "no more": id 0
        self._held_V = np.zeros(len(items_Vd), dtype=bool)
        self._held_V[self.ids_I] = True
        self._searcher, self._space = raw, need_faiss().ParameterSpace
        if gpus != "none":
            self._move(gpus)

    def _move(self, gpus: Gpus) -> None:
        """Copy the index to all GPUs, whole or in parts; what has no GPU form (HNSW) stays where it is."""
        faiss = need_faiss()
        options = faiss.GpuMultipleClonerOptions()
        options.shard = gpus == "shard"
        try:
            self._searcher = faiss.index_cpu_to_all_gpus(self.raw, co=options)
        except RuntimeError:
            return
        self.most, self._space = min(self.most, GPU_MOST), faiss.GpuParameterSpace

    def set(self, setting: str) -> None:
        """Search with e.g. `nprobe=8` from now on; raises `FindRecError` for what the index does not have."""
        if setting:
            try:
                self._space().set_index_parameters(self._searcher, setting)
            except RuntimeError as error:
                raise FindRecError(
                    f"index {self.factory!r} cannot be searched with {setting!r}: {_reason(error)}. Settings "
                    "look like nprobe=8 (IVF) or efSearch=64 (HNSW)"
                ) from None
        self.setting = setting

    def top(
        self, queries: Queries, k: int, *, seen_BN: Tensor | None = None, late: Late | None = None
    ) -> Top:
        """The first min(k, V) items of users, as `exact_top` gives them as far as the index finds them.

        Own and seen items are distinct within a row. Items the index was built without never appear. Raises
        `FindRecError` for users of another width.
        """
        if queries.users_Bd.shape[1] != self.raw.d:
            raise FindRecError(
                f"users are vectors of width {queries.users_Bd.shape[1]}, index {self.factory!r} is of width "
                f"{self.raw.d}: search it with the model whose items it holds"
            )
        late = self._lateness(late, len(queries.users_Bd))
        asked = _Asked.of(queries, seen_BN, late)
        num_users, k = len(asked.users_Bd), min(k, len(self.items_Vd) - 1)
        ids_Bk = np.zeros((num_users, k), dtype=np.int64)
        scores_Bk = np.full((num_users, k), -np.inf, dtype=np.float32)
        removed_BM = asked.removed()
        for rows, fetch in self._groups(asked, removed_BM, k):
            some = asked if len(rows) == num_users else asked.rows(rows)
            gone = removed_BM if removed_BM is None or some is asked else removed_BM[rows]
            ids, scores = self._list(some, gone, fetch, k)
            ids_Bk[rows, : ids.shape[1]], scores_Bk[rows, : ids.shape[1]] = ids, scores
        found = torch.from_numpy(ids_Bk), torch.from_numpy(scores_Bk)
        short = torch.from_numpy(np.flatnonzero(ids_Bk[:, -1] == 0))  # best first: gaps are at the end
        if len(short):
            self.num_exact += len(short)
            found[0][short], found[1][short] = self._exact(queries, short, k, seen_BN, late)
        return found

    def _groups(self, asked: _Asked, removed_BM: Ints | None, k: int) -> Iterator[tuple[Ints, int]]:
        """Rows that are searched together and how many items are fetched for them; none that cannot be."""
        fetch_B = np.full(len(asked.users_Bd), k)
        if removed_BM is not None:
            counts = self._held_V[removed_BM]
            counts[:, 1:] &= removed_BM[:, 1:] != removed_BM[:, :-1]
            fetch_B += counts.sum(1)
        if asked.since_V is not None:
            since_I = np.sort(asked.since_V[self._held_V])
            fetch_B += len(since_I) - np.searchsorted(since_I, asked.time_B, side="right")
        fetch_B = np.minimum(fetch_B, len(self.ids_I))
        able_B = (fetch_B <= self.most) & (fetch_B > 0) & np.isfinite(asked.users_Bd).all(1)
        # Users of one power of two go together: one long history does not make all fetch as much.
        power_B = np.where(able_B, np.ceil(np.log2(np.maximum(fetch_B, 1))), -1)
        for power in np.unique(power_B[able_B]):
            rows = np.flatnonzero(power_B == power)
            yield rows, int(fetch_B[rows].max())

    def _list(
        self, asked: _Asked, removed_BM: Ints | None, fetch: int, k: int
    ) -> tuple[Ints, NDArray[np.float32]]:
        """The first k of the `fetch` nearest items that count, and of the own items."""
        scores_BK, place_BK = self._searcher.search(asked.users_Bd, fetch)
        ids_BK = self._ids[place_BK]
        drop_BK = (ids_BK == 0) | asked.too_late(ids_BK)
        if removed_BM is not None:
            drop_BK |= _among(ids_BK, removed_BM, len(self._held_V))
        scores_BK[drop_BK] = -np.inf
        if asked.own_BN is not None:
            ids_BK = np.concatenate([ids_BK, asked.own_BN], axis=1)
            scores_BK = np.concatenate([scores_BK, self._own(asked)], axis=1)
        return _best(ids_BK, scores_BK, k)

    def _own(self, asked: _Asked) -> NDArray[np.float32]:
        """`[B, N]` exact scores of own items, bonus included; -inf for those that do not count."""
        own_BN, bonus_BN = asked.own_BN, asked.bonus_BN
        assert own_BN is not None and bonus_BN is not None
        step = max(1, _TILE_BYTES // (4 * max(1, own_BN.shape[1] * asked.users_Bd.shape[1])))
        scores_BN = np.empty(own_BN.shape, dtype=np.float32)
        for lo in range(0, len(own_BN), step):
            vectors = self._vectors_Vd[own_BN[lo : lo + step]]
            scores_BN[lo : lo + step] = (vectors @ asked.users_Bd[lo : lo + step, :, None])[:, :, 0]
        scores_BN += bonus_BN
        drop_BN = ~self._held_V[own_BN] | asked.too_late(own_BN)  # padding is not held either
        if asked.seen_BM is not None:
            drop_BN |= _among(own_BN, asked.seen_BM, len(self._held_V))
        scores_BN[drop_BN] = -np.inf
        return scores_BN

    def _exact(
        self, queries: Queries, rows: Tensor, k: int, seen_BN: Tensor | None, late: Late | None
    ) -> Top:
        device = self.items_Vd.device
        parts = (queries.users_Bd, queries.own_ids_BN, queries.own_bonus_BN)
        users, own, bonus = (None if part is None else part.to(device)[rows.to(device)] for part in parts)
        assert users is not None
        seen = None if seen_BN is None else seen_BN.cpu()[rows]
        some_late = None if late is None else (late[0].cpu(), late[1].cpu()[rows])
        return exact_top(Queries(users, own, bonus), self.items_Vd, k, seen, some_late)

    def _lateness(self, late: Late | None, num_users: int) -> Late | None:
        """Where no `late` is given, what the index was built without is late for all."""
        if late is not None or len(self.ids_I) == len(self.items_Vd) - 1:
            return late
        since_V = torch.from_numpy(np.where(self._held_V, ALWAYS, NEVER))
        return since_V, torch.zeros(num_users, dtype=torch.int64)


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
    check_finite(items_Vd)
    ids_I = held_items(len(items_Vd) - 1, since_V)
    if not len(ids_I):
        raise FindRecError("no item of the catalogue is on offer: there is nothing to index")
    vectors = np.ascontiguousarray(items_Vd.detach().cpu().numpy()[ids_I], dtype=np.float32)
    try:
        raw = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        raw.train(vectors)
        raw.add(vectors)
    except RuntimeError as error:
        raise FindRecError(
            f"FAISS cannot build an index {factory!r} of {len(ids_I):,} items of width {vectors.shape[1]}: "
            f"{_reason(error)}. Examples: Flat; IVF64,Flat (fewer lists than items); HNSW32"
        ) from None
    return ItemIndex(raw, items_Vd, since_V, factory, gpus)


def held_items(num_items: int, since_V: Tensor | None) -> NDArray[np.int64]:
    """The ids of the items that are ever on offer, ascending: row i of an index is the i-th of them."""
    if since_V is None:
        return np.arange(1, num_items + 1)
    return np.flatnonzero(since_V.cpu().numpy()[1:] != NEVER) + 1


def check_finite(items_Vd: Tensor) -> None:
    """Raise `FindRecError` where item vectors hold NaN or infinity."""
    bad = (~torch.isfinite(items_Vd[1:]).all(1)).nonzero().squeeze(1) + 1
    if len(bad):
        raise FindRecError(
            f"{len(bad):,} of {len(items_Vd) - 1:,} item vectors are not finite (NaN or infinity), the first "
            f"that of item {int(bad[0])}: no index can be built of them. The training has "
            "diverged: train again with a lower training.optim.lr"
        )


def _reason(error: RuntimeError) -> str:
    """What FAISS says without where in its source it says it."""
    told = str(error).strip().splitlines()[-1].rsplit(" failed: ", 1)[-1]
    return told.split(".cpp:")[-1].lstrip("0123456789: ")


def _array(values: Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy()


def _among(ids_BK: Ints, sorted_BM: Ints, stride: int) -> NDArray[np.bool_]:
    """`[B, K]` whether each id, below `stride`, is in its row of `sorted_BM`."""
    if not sorted_BM.size:
        return np.zeros(ids_BK.shape, dtype=bool)
    first_B = stride * np.arange(len(ids_BK))[:, None]
    known, asked = (sorted_BM + first_B).ravel(), ids_BK + first_B
    return np.asarray(known[np.minimum(np.searchsorted(known, asked), known.size - 1)] == asked)


def _best(ids_BK: Ints, scores_BK: NDArray[np.float32], k: int) -> tuple[Ints, NDArray[np.float32]]:
    """The first k columns by score, best first; id 0 where the score is -inf or no number."""
    np.nan_to_num(scores_BK, copy=False, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    k = min(k, ids_BK.shape[1])
    if k < ids_BK.shape[1]:
        place = np.argpartition(scores_BK, -k, axis=1)[:, -k:]
        ids_BK, scores_BK = (np.take_along_axis(values, place, 1) for values in (ids_BK, scores_BK))
    order = np.argsort(-scores_BK, axis=1, kind="stable")
    ids_BK, scores_BK = (np.take_along_axis(values, order, 1) for values in (ids_BK, scores_BK))
    return np.where(scores_BK == -np.inf, 0, ids_BK), scores_BK

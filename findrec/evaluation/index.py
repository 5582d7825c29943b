"""An index of item vectors: the first items of a user without scoring the whole catalogue.

Any FAISS factory string is taken (Douze et al., "The Faiss library", arXiv 2401.08281), by inner product.
An index knows nothing of single users, so what has to go from a list is asked for in addition: a user of
whom n items are seen, not on offer yet, or the user's own gets k + n items, of which at least k stay. A
user's own items are scored apart, as their bonus is no inner product. Of the other items no more than k are
needed, and the first k of those are among the k + n: over an index that searches exactly, lists are exact.

Shape letters: B users, b some of them, V items, d width, I items in the index, K fetched, M removed, N own.
"""

from __future__ import annotations

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


def default_gpus() -> Gpus:
    """`replicate` where FAISS was built for GPUs and finds one, else `none`."""
    faiss = need_faiss()
    return "replicate" if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() else "none"


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
        self._since_V = None if since_V is None else since_V.cpu()
        self._ids = torch.from_numpy(np.append(self.ids_I, 0))  # FAISS says -1 for "no more": id 0
        self._held_V = torch.zeros(len(items_Vd), dtype=torch.bool)
        self._held_V[self.ids_I] = True
        self._searcher, self._space = raw, need_faiss().ParameterSpace
        if gpus != "none":
            self._move(gpus)

    def _move(self, gpus: Gpus) -> None:
        """Copy the index to all GPUs, whole or in parts; one that GPUs cannot hold (HNSW) stays where it is."""
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

        Own and seen items are distinct within a row. Items the index was built without never appear.
        """
        users_Bd, own_BN = queries.users_Bd.to(self.items_Vd.device), _cpu(queries.own_ids_BN)
        seen_BN, late = _cpu(seen_BN), self._lateness(late, len(users_Bd))
        k = min(k, len(self.items_Vd) - 1)
        removed_BM = _sorted_ids([ids for ids in (seen_BN, own_BN) if ids is not None], len(users_Bd))
        fetch_B = k + (self._held_V[removed_BM]).sum(1) + self._num_late(late, len(users_Bd))
        fetch_B = fetch_B.clamp(max=len(self.ids_I))

        ids_Bk = torch.zeros(len(users_Bd), k, dtype=torch.int64)
        scores_Bk = torch.full((len(users_Bd), k), -torch.inf)
        able_B = torch.isfinite(users_Bd).all(1).cpu() & (fetch_B <= self.most) & (fetch_B > 0)
        # Users of one power of two go together: one long history does not make all fetch as much.
        power_B = torch.where(able_B, fetch_B.double().log2().ceil(), -1)
        for power in power_B[able_B].unique().tolist():
            rows = (power_B == power).nonzero().squeeze(1)
            found = self._search(
                users_Bd[rows], int(fetch_B[rows].max()), removed_BM[rows], _rows(late, rows)
            )
            if own_BN is not None and queries.own_bonus_BN is not None:
                seen = None if seen_BN is None else seen_BN[rows]
                own = self._own(
                    users_Bd[rows], own_BN[rows], queries.own_bonus_BN[rows], seen, _rows(late, rows)
                )
                found = torch.cat([found[0], own_BN[rows]], 1), torch.cat([found[1], own], 1)
            ids, scores = _best(*found, k)
            ids_Bk[rows, : ids.shape[1]], scores_Bk[rows, : ids.shape[1]] = ids, scores
        short = (ids_Bk == 0).any(1).nonzero().squeeze(1)
        if len(short):
            self.num_exact += len(short)
            ids_Bk[short], scores_Bk[short] = self._exact(queries, short, k, seen_BN, late)
        return ids_Bk, scores_Bk

    def _search(self, users_bd: Tensor, fetch: int, removed_bM: Tensor, late: Late | None) -> Top:
        """The `fetch` nearest items of each user; -inf for those that do not count."""
        query = np.ascontiguousarray(users_bd.cpu().numpy(), dtype=np.float32)
        scores, place = self._searcher.search(query, fetch)
        ids_bK = self._ids[torch.from_numpy(place)]
        drop_bK = (ids_bK == 0) | _among(ids_bK, removed_bM)
        if late is not None:
            drop_bK |= late[0][ids_bK] > late[1][:, None]
        return ids_bK, torch.from_numpy(scores).masked_fill_(drop_bK, -torch.inf)

    def _own(
        self, users_bd: Tensor, own_bN: Tensor, bonus_bN: Tensor, seen_bN: Tensor | None, late: Late | None
    ) -> Tensor:
        """`[b, N]` exact scores of own items, bonus included; -inf for those that do not count."""
        step = max(1, _TILE_BYTES // (4 * max(1, own_bN.shape[1] * users_bd.shape[1])))
        parts = []
        for lo in range(0, len(users_bd), step):
            vectors = self.items_Vd[own_bN[lo : lo + step].to(users_bd.device)]
            parts.append((vectors @ users_bd[lo : lo + step, :, None]).squeeze(2).cpu())
        scores_bN = torch.cat(parts) + bonus_bN.cpu().float()
        drop_bN = ~self._held_V[own_bN]  # padding is not held either
        if seen_bN is not None:
            drop_bN |= _among(own_bN, _sorted_ids([seen_bN], len(seen_bN)))
        if late is not None:
            drop_bN |= late[0][own_bN] > late[1][:, None]
        return scores_bN.masked_fill_(drop_bN, -torch.inf)

    def _exact(
        self, queries: Queries, rows: Tensor, k: int, seen_BN: Tensor | None, late: Late | None
    ) -> Top:
        device = self.items_Vd.device
        own, bonus = queries.own_ids_BN, queries.own_bonus_BN
        some = Queries(
            queries.users_Bd.to(device)[rows],
            None if own is None else own.to(device)[rows],
            None if bonus is None else bonus.to(device)[rows],
        )
        return exact_top(
            some, self.items_Vd, k, None if seen_BN is None else seen_BN[rows], _rows(late, rows)
        )

    def _lateness(self, late: Late | None, num_users: int) -> Late | None:
        """`late` on the CPU; where none is given, what the index was built without is late for all."""
        if late is not None:
            return late[0].cpu(), late[1].cpu()
        if len(self.ids_I) == len(self.items_Vd) - 1:
            return None
        since_V = torch.full((len(self._held_V),), NEVER).masked_fill_(self._held_V, ALWAYS)
        return since_V, torch.zeros(num_users, dtype=torch.int64)

    def _num_late(self, late: Late | None, num_users: int) -> Tensor:
        """`[B]` how many items of the index are not on offer yet."""
        if late is None:
            return torch.zeros(num_users, dtype=torch.int64)
        since_I = late[0][self._held_V].sort().values
        return len(since_I) - torch.searchsorted(since_I, late[1], right=True)


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
            f"that of item {int(bad[0])}: no index can be searched for them. Evaluate an earlier checkpoint, or "
            "train again with a lower training.optim.lr"
        )


def _reason(error: RuntimeError) -> str:
    """What FAISS says without where in its source it says it."""
    return (
        str(error)
        .strip()
        .splitlines()[-1]
        .rsplit(" failed: ", 1)[-1]
        .split(".cpp:")[-1]
        .lstrip("0123456789: ")
    )


def _cpu(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.cpu()


def _rows(late: Late | None, rows: Tensor) -> Late | None:
    return None if late is None else (late[0], late[1][rows])


def _sorted_ids(parts: list[Tensor], num_rows: int) -> Tensor:
    """`[B, M]` the distinct ids of each row, ascending, with zeros (for repeated ones too) before them."""
    if not parts:
        return torch.zeros(num_rows, 0, dtype=torch.int64)
    ids_BM = torch.cat(parts, dim=1).sort(dim=1).values
    if len(parts) == 1:
        return ids_BM
    ids_BM[:, 1:] = ids_BM[:, 1:].masked_fill(ids_BM[:, 1:] == ids_BM[:, :-1], 0)
    return ids_BM.sort(dim=1).values


def _among(ids_bK: Tensor, sorted_bM: Tensor) -> Tensor:
    """`[b, K]` whether each id is in its row of `sorted_bM`."""
    if not sorted_bM.shape[1]:
        return torch.zeros_like(ids_bK, dtype=torch.bool)
    place = torch.searchsorted(sorted_bM, ids_bK).clamp_(max=sorted_bM.shape[1] - 1)
    return sorted_bM.gather(1, place) == ids_bK


def _best(ids_bK: Tensor, scores_bK: Tensor, k: int) -> Top:
    best = scores_bK.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)
    values, place = best.topk(min(k, best.shape[1]))
    return torch.where(values == -torch.inf, 0, ids_bK.gather(1, place)), values

"""Scorers by inner product: `score = max_k u_k . (s * e_item)`, plus a bonus for some items of a user.

Ranks are counted exactly by `findrec.ops.ranking.target_rank`; lists are computed by FAISS or torch in
float32. The signs s (+1 or -1 per coordinate) express a Lorentzian product `-x_0 y_0 + x_1 y_1 + ...` as an
inner product without rounding error.

Shape letters: B users, K vectors of a user, V items, d width, N items of a user with a bonus.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.devices import is_cpu
from findrec.evaluation.scoring.base import Query, Scorer, Top
from findrec.evaluation.scoring.user_vectors import UserVectors, top_items
from findrec.evaluation.scoring.users import UserBlock
from findrec.evaluation.search.faiss_library import import_faiss
from findrec.evaluation.search.ray_rows import ShardedRows, sharded
from findrec.models.base import Model, Out, SequenceModel
from findrec.models.capabilities import SignedScores
from findrec.models.parts.repeat import repeat_candidates
from findrec.ops.ranking.rules import Rules
from findrec.ops.ranking.target_rank import target_rank


class InnerProductScorer(Scorer):
    """Score = the largest inner product of a user's vectors with the item's vector (plus bonuses)."""

    items_Vd: Tensor  # float32 [V + 1, d], row 0 is padding
    signs_d: Tensor | None = None  # +1 or -1 for each coordinate; None: all +1
    _index: Any = None  # FAISS index of `items_Vd`, built when needed

    @abstractmethod
    def queries(self, block: UserBlock) -> UserVectors:
        """The vectors of a block's users, on the device of `items_Vd`, without `signs_d`."""

    def signed_queries(self, block: UserBlock) -> UserVectors:
        """The vectors whose inner products with `items_Vd` are the scores."""
        queries = self.queries(block)
        return queries if self.signs_d is None else queries.times(self.signs_d)

    def rank(self, query: Query) -> InnerProductRanking:
        """See `Scorer`; runs the model."""
        return InnerProductRanking(self, query, self.signed_queries(query.block))

    @contextmanager
    def distributed(self, folder: Path | None, shards: int) -> Iterator[Scorer]:
        """See `Scorer`."""
        if not shards:
            yield self
            return
        assert folder is not None, "vectors are passed to the workers through a file"
        with sharded(self.items_Vd, folder, shards) as rows:
            yield _DistributedScorer(self, rows)

    def flat_index(self) -> Any:
        """An exact FAISS index of the items; None if FAISS is not installed."""
        if self._index is None and (faiss := import_faiss()) is not None:
            self._index = faiss.IndexFlatIP(self.items_Vd.shape[1])
            self._index.add(np.ascontiguousarray(self.items_Vd[1:].cpu().numpy()))
        return self._index


@dataclass(frozen=True)
class InnerProductRanking:
    """The ranking of a query by inner products."""

    scorer: InnerProductScorer
    query: Query
    vectors: UserVectors

    def counts(self) -> tuple[Tensor, Tensor]:
        """See `Ranking`."""
        users, cases, device = self.vectors, self.query.cases, self.vectors.device
        rules = users.add_bonus(self.query.rules.to(device))
        row_C, target_C = cases.row.to(device), cases.target.to(device)
        return target_rank(users.users_Bd, self.scorer.items_Vd, row_C, target_C, rules=rules)

    def top(self, k: int) -> Top:
        """See `Ranking`; scores are float32.

        Uses FAISS if a score is a plain inner product, nothing is filtered and the items are on the CPU (its
        index would be there); otherwise torch, where the items are.
        """
        scorer, users, query = self.scorer, self.vectors, self.query
        k = min(k, len(scorer.items_Vd) - 1)
        unfiltered = query.seen_BM is None and query.list_times is None
        if users.is_plain and unfiltered and is_cpu(scorer.items_Vd.device):
            index = scorer.flat_index()
            if index is not None:
                vectors = users.single()
                scores, row = index.search(np.ascontiguousarray(vectors.cpu().numpy()), k)
                return torch.from_numpy(row + 1), torch.from_numpy(scores)
        return top_items(users, scorer.items_Vd, k, query.seen_BM, query.list_times)


class _DistributedScorer(Scorer):
    """A scorer whose item vectors are distributed over Ray workers; lists are by exact scores."""

    def __init__(self, scorer: InnerProductScorer, rows: ShardedRows) -> None:
        self.name, self.rows, self._scorer = scorer.name, rows, scorer

    def rank(self, query: Query) -> _DistributedRanking:
        return _DistributedRanking(self.rows, query, self._scorer.signed_queries(query.block).cpu())


@dataclass(frozen=True)
class _DistributedRanking:
    rows: ShardedRows
    query: Query
    vectors: UserVectors

    def counts(self) -> tuple[Tensor, Tensor]:
        users, cases = self.vectors, self.query.cases
        rules = users.add_bonus(self.query.rules)
        return target_rank(users.users_Bd, self.rows, cases.row, cases.target, rules=rules)

    def top(self, k: int) -> Top:
        users, times = self.vectors, self.query.list_times
        since_V = None if times is None else times.since_V
        rules = users.add_bonus(Rules(exclude_ids_BN=self.query.seen_BM, since_V=since_V))
        time_B = None if times is None else times.time_B
        return self.rows.top(users.users_Bd, min(k, self.rows.num_items), rules, time_B)


class ModelScorer(InnerProductScorer):
    """A trained sequence model with its item table.

    Args:
        model: called as `model(batch, x_items, features)`; put into evaluation mode.
        table_weight: rows of the item table, float32 `[V + 1, d]`.
        catalogue: features of the model's modalities.
        max_length: the length histories are cut to (informative: blocks are already cut).
        device: the model's device; the table is moved to it.
        name: the model's name in result rows.

    Attributes:
        rows_Vd: rows of the item table, the input of histories.
        items_Vd: vectors that items are scored by.
    """

    def __init__(
        self,
        model: SequenceModel,
        table_weight: Tensor,
        catalogue: Catalogue,
        max_length: int,
        device: torch.device | str,
        *,
        name: str,
    ) -> None:
        self.name = name
        self.max_length = max_length
        self.model, self.catalogue = model.eval(), catalogue
        self.rows_Vd = table_weight.detach().to(device=device, dtype=torch.float32)
        if not is_cpu(device) and not catalogue.is_on_gpu:
            catalogue.keep_on(device)
        self.items_Vd = model.item_vectors(self.rows_Vd, catalogue)
        self.signs_d = signs_of(model, self.items_Vd.device)

    def with_catalogue(self, catalogue: Catalogue) -> ModelScorer:
        """The same model and table with other item features."""
        return ModelScorer(
            self.model, self.rows_Vd, catalogue, self.max_length, self.items_Vd.device, name=self.name
        )

    @torch.no_grad()
    def queries(self, block: UserBlock) -> UserVectors:
        """Run the model on the block; `Out.repeat` becomes a bonus for repeat candidates."""
        self.model.eval()
        batch = block.batch.to(self.items_Vd.device)
        return make_queries(
            self.model(batch, self.rows_Vd[batch.ids], self.catalogue.features(batch.ids)), batch
        )


def signs_of(model: Model[Any], device: torch.device) -> Tensor | None:
    """The signs of a model's coordinates (`SignedScores`); None if all are +1."""
    return model.score_signs.to(device) if isinstance(model, SignedScores) else None


def make_queries(out: Out, batch: Batch) -> UserVectors:
    """Convert a model's output to user vectors with repeat-consumption bonuses, one row per target position.

    `out.h` is `[T, d]`, or `[T, K, d]` for K vectors per position.
    """
    if out.repeat is None:
        return UserVectors(out.h.float())
    own = repeat_candidates(batch).bonus(out.repeat.float())
    ids_TN = torch.where(own.seen_TN, own.ids_BN[own.row_T], 0)
    return UserVectors(out.h.float(), ids_TN, own.bonus_TN)


class TextKNN(InnerProductScorer):
    """Cosine between an item's features and the mean features of the user's last `last` items."""

    def __init__(
        self,
        folder: DataFolder,
        modality: str = "text",
        last: int = 5,
        catalogue: Catalogue | None = None,
    ) -> None:
        self.name = f"{modality}_knn"
        catalogue = catalogue or Catalogue(folder, [modality])
        rows = catalogue.features(torch.arange(folder.num_items + 1))[modality]
        unit = torch.nn.functional.normalize(rows.values.float(), dim=1)
        self.items_Vd = torch.where(rows.present[:, None], unit, 0.0)
        self._last = last

    def queries(self, block: UserBlock) -> UserVectors:
        """The sum of unit vectors; its length does not affect the order of the items."""
        total = torch.zeros(len(block.user), self.items_Vd.shape[1])
        for age in range(self._last):  # the order of summation is independent of the block
            event = block.offset[1:] - 1 - age
            item = np.where(event >= block.offset[:-1], block.item[np.maximum(event, 0)], 0)
            total += self.items_Vd[torch.from_numpy(item)]
        return UserVectors(total)

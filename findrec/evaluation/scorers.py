"""Who is evaluated: two kinds of scorers behind the same exact ranker.

A `VectorScorer` scores by inner product (plus a bonus for a user's own items): counted by
`findrec.ops.target_rank`, listed by FAISS. A `BlockScorer` gives any score for a range of items; its scores
are compared after rounding to float32, ties broken by training popularity. Models and popularity are fitted
on training events only; the history before the test targets includes the validation events.

Shape letters: B users, V items, d width, N own items, R repeat features, C cases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batch import Batch
from findrec.datasets.batches import Cases, Part, evaluation_batch, moments
from findrec.datasets.catalogue import Catalogue
from findrec.datasets.folder import DataFolder
from findrec.models.base import Out, SequenceModel
from findrec.models.repeat import own_items

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class UserBlock:
    """Some users at the moments their targets are asked for: one row each, or several where every target has
    a history of its own.
    """

    user: IntArray  # [B] rows of the data folder
    batch: Batch  # their last `max_length` events
    cases: Cases
    item: IntArray  # [N] their whole histories, one after the other, oldest event first
    offset: IntArray  # [B + 1] user b owns item[offset[b]:offset[b + 1]]

    @staticmethod
    def read(folder: DataFolder, split: Part, users: IntArray, max_length: int) -> UserBlock:
        """Everything before the split's targets of `users` (`split` is `valid` or `test`)."""
        batch, cases = evaluation_batch(folder, split, users, max_length)
        asked = moments(folder, split, users)
        past = folder.histories(asked.user, np.zeros(len(asked.user), dtype=np.int64), asked.first)
        return UserBlock(asked.user, batch, cases, past.item, past.offset)

    def row(self) -> IntArray:
        """`[N]` the place in `user` each event of `item` belongs to."""
        return np.repeat(np.arange(len(self.user)), np.diff(self.offset))

    def shortened(self, length: int) -> UserBlock:
        """The same block, of each whole history only the last `length` events (the batch stays as it is)."""
        size, row = np.diff(self.offset), self.row()
        kept = np.arange(len(row)) >= self.offset[1:][row] - length
        offset = np.concatenate([[0], np.cumsum(np.minimum(size, length))]).astype(np.int64)
        return replace(self, item=self.item[kept], offset=offset)

    def padded_items(self) -> Tensor:
        """`[B, N]` distinct items of each whole history, ascending, 0-padded: what a seen filter removes."""
        stride = int(self.item.max(initial=0)) + 1
        key = np.unique(self.row() * stride + self.item)
        row, item = key // stride, key % stride
        size = np.bincount(row, minlength=len(self.user))
        start = np.cumsum(size) - size
        padded: IntArray = np.zeros((len(self.user), int(size.max(initial=0))), dtype=np.int64)
        padded[row, np.arange(len(row)) - start[row]] = item
        return torch.from_numpy(padded)


@dataclass(frozen=True)
class Queries:
    """User vectors and, where the model has a repeat head, the bonuses of their own items."""

    users_Bd: Tensor  # float32
    own_ids_BN: Tensor | None = None  # int64, 0-padded
    own_bonus_BN: Tensor | None = None  # float32

    def cpu(self) -> Queries:
        """The same where workers of other machines can take it from."""
        own = (None if x is None else x.cpu() for x in (self.own_ids_BN, self.own_bonus_BN))
        return Queries(self.users_Bd.cpu(), *own)


class VectorScorer(ABC):
    """Score = inner product of a user vector and an item vector (+ the bonus of own items)."""

    name: str
    items_Vd: Tensor  # float32 [V + 1, d], row 0 is padding

    @abstractmethod
    def queries(self, block: UserBlock) -> Queries:
        """The vectors of a block's users, on the device of `items_Vd`."""


class BlockScorer(ABC):
    """Any other score. `popularity` breaks ties: a dense rank of the training counts, `[V + 1]` int64."""

    name: str
    popularity: IntArray

    @abstractmethod
    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """Scores `[B, hi - lo]` of the items lo..hi-1 (ids start at 1)."""

    def keys(self, block: UserBlock, lo: int, hi: int) -> Tensor:
        """`[B, hi - lo]` int64 keys in the order of (float32 score, popularity)."""
        return order_keys(self.score_block(block, lo, hi), self.popularity[lo:hi])


Scorer = VectorScorer | BlockScorer


def order_keys(scores: NDArray[np.float64], popularity: IntArray) -> Tensor:
    """One integer that sorts as the pair (score as float32, popularity below 2^31) does; NaN comes last."""
    single = scores.astype(np.float32)
    bits = single.view(np.int32)
    if np.isnan(single).any() or bits.min(initial=0) < 0:
        single[np.isnan(single)] = -np.inf
        single += np.float32(0)  # -0.0 becomes 0.0
        # IEEE floats of one sign sort like their bits; negative ones the other way round.
        bits = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    keys: IntArray = bits.astype(np.int64)
    keys <<= 32
    keys |= popularity
    return torch.from_numpy(keys)


def popularity_rank(folder: DataFolder) -> IntArray:
    """`[V + 1]` dense rank of the training counts: 0 for the rarest, equal counts share a rank."""
    return np.unique(folder.train_count, return_inverse=True)[1].reshape(-1).astype(np.int64)


class ModelScorer(VectorScorer):
    """A trained sequence model with its item table.

    Args:
        model: called as `model(batch, x_items, features)`; put into evaluation mode here.
        table_weight: float32 `[V + 1, d]` rows of the item table.
        catalogue: the features of the modalities the model was built with.
        max_length: the events a history is cut to (kept for the record: blocks come cut already).
        device: where the model lives; the table is moved there.
        name: the model's name in result rows.

    `rows_Vd` are the table's rows, which histories are made of; `items_Vd` what items are scored by.
    """

    def __init__(
        self,
        model: SequenceModel,
        table_weight: Tensor,
        catalogue: Catalogue,
        max_length: int,
        device: torch.device | str,
        name: str = "findrec",
    ) -> None:
        self.name = name
        self.max_length = max_length
        self.model, self.catalogue = model.eval(), catalogue
        self.rows_Vd = table_weight.detach().to(device=device, dtype=torch.float32)
        self.items_Vd = model.item_vectors(self.rows_Vd, catalogue)

    @torch.no_grad()
    def queries(self, block: UserBlock) -> Queries:
        """Run the model over the block; `Out.repeat` becomes a bonus for the items each user has met."""
        self.model.eval()
        batch = block.batch.to(self.items_Vd.device)
        return make_queries(
            self.model(batch, self.rows_Vd[batch.ids], self.catalogue.features(batch.ids)), batch
        )


def make_queries(out: Out, batch: Batch) -> Queries:
    """What a model's output asks of the catalogue: one query for each asked-for position of the batch."""
    if out.repeat is None:
        return Queries(out.h.float())
    own = own_items(batch).bonus(out.repeat.float())
    ids_TN = torch.where(own.seen_TN, own.ids_BN[own.row_T], 0)
    return Queries(out.h.float(), ids_TN, own.bonus_TN)


class TextKNN(VectorScorer):
    """Cosine between an item's features and the mean of the last `last` items' (missing ones left out)."""

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

    def queries(self, block: UserBlock) -> Queries:
        """The unnormalised sum of unit vectors: its length is the same for all items of a user."""
        total = torch.zeros(len(block.user), self.items_Vd.shape[1])
        for age in range(self._last):  # one event of every user at a time: no order of summation to depend on
            place = block.offset[1:] - 1 - age
            there = place >= block.offset[:-1]
            item = np.where(there, block.item[np.maximum(place, 0)], 0)
            total += self.items_Vd[torch.from_numpy(item)]
        return Queries(total)

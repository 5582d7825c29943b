"""Ranks items by inner products with vectors of users, for models that learn a vector for each user.

Shape letters: B users, N events, V items, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from findrec.datasets.batches.catalogue import Catalogue
from findrec.devices import is_cpu
from findrec.errors import FindRecError
from findrec.evaluation.scoring.inner_product import InnerProductScorer, signs_of
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.scoring.users import UserBlock
from findrec.models.base import Model
from findrec.models.capabilities import RanksUsers
from findrec.tables.base import USERS
from findrec.tables.row_sums import add_rows_


class UserItemScorer(InnerProductScorer):
    """A trained model that is a `RanksUsers`.

    A user with training events has the vector of training, whatever happened later. Others, and visitors,
    get a vector from the distinct items of their history.

    Args:
        model: put into evaluation mode.
        tables: rows of all tables of the model by name, float32.
        catalogue: features of the model's modalities.
        max_length: not used; histories of visitors are complete.
        device: the model's device; the vectors are computed there.
        name: the model's name in result rows.
    """

    reads_all_tables = True

    def __init__(
        self,
        model: Model[Any],
        tables: Mapping[str, Tensor],
        catalogue: Catalogue,
        max_length: int,
        device: torch.device | str,
        *,
        name: str,
    ) -> None:
        """Raises `FindRecError` if the rows of the users were left out (`findrec export`)."""
        assert isinstance(model, RanksUsers)
        if tables and USERS not in tables:  # without tables, its vectors are those of an earlier stage
            raise FindRecError(
                f"{name} ranks by a learned vector of each user, and there is no table of users: it "
                "cannot be used without the users it was trained with"
            )
        self.name, model = name, model.eval()
        if not is_cpu(device) and not catalogue.is_on_gpu:
            catalogue.keep_on(device)
        weights = {
            table: rows.detach().to(device=device, dtype=torch.float32) for table, rows in tables.items()
        }
        with torch.no_grad():
            self._vectors = model.user_item_vectors(weights, catalogue)
        self.items_Vd = self._vectors.items_Vd
        self.signs_d = signs_of(model, self.items_Vd.device)

    @torch.no_grad()
    def queries(self, block: UserBlock) -> UserVectors:
        """See `InnerProductScorer`."""
        vectors, device = self._vectors, self.items_Vd.device
        user_B = torch.from_numpy(block.user + 1).to(device)  # row 0, the padding, is an unknown user
        known_B = vectors.known_U[user_B]
        row_N = torch.from_numpy(block.row())
        new_N = ~known_B.cpu()[row_N]
        pair_N2 = torch.stack([row_N, torch.from_numpy(block.item)], dim=1)[new_N]
        distinct_n2 = torch.unique(pair_N2, dim=0).to(device)
        row_n, item_n = distinct_n2.unbind(1)
        total_Be = vectors.folded_Ve.new_zeros(len(user_B), vectors.folded_Ve.shape[1])
        add_rows_(total_Be, row_n, vectors.folded_Ve[item_n])
        count_B = torch.bincount(row_n, minlength=len(user_B)).float()
        folded_Bd = vectors.fold_in(total_Be, count_B)
        return UserVectors(torch.where(known_B[:, None], vectors.users_Ud[user_B], folded_Bd))

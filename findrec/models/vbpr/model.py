"""VBPR: matrix factorisation with factors of ids and of content.

He & McAuley 2016, "VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback", arXiv 1510.01784.
Equations are numbered as there. Without modalities it is BPR-MF (Rendle et al. 2009, arXiv 1205.2618).

Shape letters: U rows of the table of users, V rows of the table of items, n edges, N negatives, d width of
the factors of ids, c width of the factors of content, e = d + c.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.batches.edges import EdgeExamples, Edges
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Microbatch, Model, StepLoss, TableShape
from findrec.models.capabilities import UserItemVectors
from findrec.models.parts.pairwise import bpr, squared_norms
from findrec.models.vbpr.config import VBPRConfig
from findrec.tables.base import ITEMS, USERS
from findrec.tables.view import Tables

_RIDGE = 1e-2  # of the map that folds visitors in, relative to the mean square of its inputs


class VBPR(Model[Edges]):
    """An item is `[gamma_i, E f_i, beta_i + beta' f_i]`, a user `[gamma_u, theta_u, 1]`.

    Rows of the table of items are `[gamma_i, beta_i]`, those of users `[gamma_u, theta_u]`.
    """

    Config = VBPRConfig

    def __init__(self, config: VBPRConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.graph = facts.interaction_graph()
        # One output more than c: the bias of content (beta').
        self.project = nn.ModuleDict(
            {
                name: nn.Linear(width, config.content_dim + 1, bias=False)
                for name, width in facts.feature_dims.items()
            }
        )

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> EdgeExamples:
        """See `Model`: the distinct user-item pairs of the training events."""
        assert isinstance(config.model, VBPRConfig)
        return EdgeExamples(config, folder, negatives=config.model.negatives)

    @classmethod
    def tables(cls, config: VBPRConfig, facts: DataFacts) -> dict[str, TableShape]:
        """See `Model`."""
        content = config.content_dim if facts.feature_dims else 0
        return {
            ITEMS: TableShape(facts.num_items, config.dim + 1),
            USERS: TableShape(facts.num_users, config.dim + content),
        }

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return self.graph.describe()

    def loss(self, microbatch: Microbatch[Edges], tables: Tables) -> StepLoss:
        """See `Model`: BPR (equation 7), with a penalty on the rows."""
        edges = microbatch.examples
        candidates_nM = torch.cat([edges.item[:, None], edges.negative], dim=1)  # M = 1 + N
        ids_m, index_nM = torch.unique(candidates_nM, return_inverse=True)
        rows_me = tables[ITEMS].rows(ids_m)
        vectors_me = self.item_vectors(rows_me, microbatch.features.features(ids_m))
        user_ne, item_nMe = tables[USERS].embed(edges.user), F.embedding(index_nM, vectors_me)
        score_nM = (with_one(user_ne)[:, None] * item_nMe).sum(2)
        pairwise_n = bpr(score_nM[:, 0], score_nM[:, 1:])
        row_nMe = F.embedding(index_nM, rows_me)
        norm_n = squared_norms(user_ne, row_nMe[:, 0], row_nMe[:, 1:])
        loss = pairwise_n.sum() / microbatch.num_targets
        penalty = norm_n.sum() / microbatch.num_targets
        return StepLoss(loss + self.config.l2 * penalty, loss.detach(), {"l2": penalty.detach()})

    def item_vectors(self, rows_me: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """`[m, d + c + 1]` of m items, from `[m, d + 1]` rows and features (equations 3 and 4)."""
        factor_md, bias_m1 = rows_me[:, :-1], rows_me[:, -1:]
        if not self.project:
            return rows_me
        content_mc = torch.stack([self._content(name, features[name]) for name in self.project]).sum(0)
        return torch.cat([factor_md, content_mc[:, :-1], bias_m1 + content_mc[:, -1:]], dim=1)

    def _content(self, name: str, rows: ModalRows) -> Tensor:
        """`[m, c + 1]` of one modality, whose features are scaled to length 1; 0 where they are missing."""
        projected_mc: Tensor = self.project[name](F.normalize(rows.values, dim=1))
        return torch.where(rows.present[:, None], projected_mc, 0.0)

    def user_item_vectors(self, tables: Mapping[str, Tensor], features: ItemFeatures) -> UserItemVectors:
        """See `RanksUsers`: a visitor's factors are a linear map of the mean of the items' factors.

        The map is the ridge regression that predicts the factors of the users of training in this way. Items
        without training events have their content alone.
        """
        users_Ue = tables[USERS]
        self.graph.check_users(len(users_Ue), self.config.title)
        rows_Ve = torch.where(self.graph.item_degree[:, None] > 0, tables[ITEMS], 0.0)
        items_Ve = self.item_vectors(rows_Ve, features.all_features(rows_Ve.device))
        known_U = self.graph.user_degree > 0
        factors_Ve = items_Ve[:, :-1].contiguous()
        mean_Ue = self.graph.sums_of_items(factors_Ve) / self.graph.user_degree.clamp(min=1)[:, None]
        return UserItemVectors(
            users_Ud=with_one(users_Ue),
            items_Vd=items_Ve,
            known_U=known_U,
            folded_Ve=factors_Ve,
            fold_in=partial(_visitors, map_ee=ridge_map(mean_Ue[known_U], users_Ue[known_U])),
        )


def with_one(user_ne: Tensor) -> Tensor:
    """The rows with a last coordinate of 1, by which the biases of items are added."""
    return F.pad(user_ne, (0, 1), value=1.0)


def ridge_map(inputs_ne: Tensor, outputs_ne: Tensor) -> Tensor:
    """`W` `[e, e]` that minimises `|X W - Y|^2 + r n |W|^2`; r is 1 % of the mean square of X's entries."""
    x, y = inputs_ne.double(), outputs_ne.double()
    gram_ee = x.T @ x
    gram_ee.diagonal().add_(_RIDGE * gram_ee.diagonal().mean() + torch.finfo(torch.float64).tiny)
    solution: Tensor = torch.linalg.solve(gram_ee, x.T @ y)
    return solution.float()


def _visitors(total_Be: Tensor, count_B: Tensor, *, map_ee: Tensor) -> Tensor:
    return with_one(total_Be / count_B.clamp(min=1)[:, None] @ map_ee)

"""LightGCN: rows of users and items, smoothed along the graph of their interactions.

He et al. 2020, "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
arXiv 2002.02126. Equations are numbered as there.

Shape letters: U rows of the table of users, V rows of the table of items, n edges, N negatives, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.batches.edges import EdgeExamples, Edges
from findrec.datasets.folder.data_folder import DataFolder
from findrec.models.base import DataFacts, Microbatch, Model, StepLoss, TableShape
from findrec.models.capabilities import UserItemVectors
from findrec.models.lightgcn.config import LightGCNConfig
from findrec.models.parts.pairwise import bpr, squared_norms
from findrec.tables.base import ITEMS, USERS
from findrec.tables.view import Tables

_Nodes = tuple[Tensor, Tensor]  # [U, d] and [V, d]


class LightGCN(Model[Edges]):
    """The mean of layers 0..K of normalised propagation; there are no weights besides the tables."""

    Config = LightGCNConfig

    user_scale: Tensor
    item_scale: Tensor

    def __init__(self, config: LightGCNConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.graph = facts.interaction_graph()
        for name, degree in (("user_scale", self.graph.user_degree), ("item_scale", self.graph.item_degree)):
            scale = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), 0.0)[:, None]
            self.register_buffer(name, scale, persistent=False)  # [U, 1], [V, 1]: degree ** -0.5
        self._known: tuple[_Nodes, _Nodes] | None = None  # the rows of the last microbatch, propagated

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> EdgeExamples:
        """See `Model`: the distinct user-item pairs of the training events."""
        assert isinstance(config.model, LightGCNConfig)
        return EdgeExamples(config, folder, negatives=config.model.negatives)

    @classmethod
    def tables(cls, config: LightGCNConfig, facts: DataFacts) -> dict[str, TableShape]:
        """See `Model`."""
        return {
            ITEMS: TableShape(facts.num_items, config.dim),
            USERS: TableShape(facts.num_users, config.dim),
        }

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return self.graph.describe()

    def loss(self, microbatch: Microbatch[Edges], tables: Tables) -> StepLoss:
        """See `Model`: BPR over the propagated vectors (equation 15), with a penalty on the rows."""
        edges, device = microbatch.examples, self.user_scale.device
        rows_Ud, rows_Vd = (
            tables[name].rows(torch.arange(len(scale), device=device))
            for name, scale in ((USERS, self.user_scale), (ITEMS, self.item_scale))
        )
        users_Ud, items_Vd = self.propagated(rows_Ud, rows_Vd)
        user_nd = F.embedding(edges.user, users_Ud)
        candidates_nM = torch.cat([edges.item[:, None], edges.negative], dim=1)  # M = 1 + N
        score_nM = (F.embedding(candidates_nM, items_Vd) @ user_nd[:, :, None]).squeeze(2)
        pairwise_n = bpr(score_nM[:, 0], score_nM[:, 1:])
        row_nMd = F.embedding(candidates_nM, rows_Vd)
        norm_n = squared_norms(F.embedding(edges.user, rows_Ud), row_nMd[:, 0], row_nMd[:, 1:])
        loss = pairwise_n.sum() / microbatch.num_targets
        penalty = norm_n.sum() / microbatch.num_targets
        total = loss + self.config.l2 * penalty
        return StepLoss(total, loss.detach(), {"l2": penalty.detach()})

    def propagated(self, rows_Ud: Tensor, rows_Vd: Tensor) -> _Nodes:
        """The final vectors of users and items, differentiable."""
        vectors: _Nodes = _Propagation.apply(self, rows_Ud, rows_Vd)  # type: ignore[no-untyped-call]
        return vectors

    def step(self, users_Ud: Tensor, items_Vd: Tensor) -> _Nodes:
        """One layer: sums over neighbours divided by the roots of both degrees (equation 3)."""
        of_items, of_users = self.item_scale * items_Vd, self.user_scale * users_Ud
        return (
            self.user_scale * self.graph.sums_of_items(of_items),
            self.item_scale * self.graph.sums_of_users(of_users),
        )

    def mean_of_layers(self, users_Ud: Tensor, items_Vd: Tensor) -> _Nodes:
        """The mean of layers 0..K (equation 4 with the paper's weights 1 / (K + 1)), without a gradient."""
        total_Ud, total_Vd = users_Ud, items_Vd
        for _ in range(self.config.layers):
            users_Ud, items_Vd = self.step(users_Ud, items_Vd)
            total_Ud, total_Vd = total_Ud + users_Ud, total_Vd + items_Vd
        count = self.config.layers + 1
        return total_Ud / count, total_Vd / count

    def mean_of_known(self, rows_Ud: Tensor, rows_Vd: Tensor) -> _Nodes:
        """`mean_of_layers`, computed once for equal rows: those of all microbatches of a step are equal."""
        if self._known is not None:
            (users_Ud, items_Vd), vectors = self._known
            if torch.equal(users_Ud, rows_Ud) and torch.equal(items_Vd, rows_Vd):
                return vectors
        rows = rows_Ud.detach().clone(), rows_Vd.detach().clone()  # the caller may change its own
        self._known = rows, self.mean_of_layers(*rows)
        return self._known[1]

    def user_item_vectors(self, tables: Mapping[str, Tensor], features: ItemFeatures) -> UserItemVectors:
        """See `RanksUsers`: a visitor is one more user, without a row, who leaves the items as they are."""
        self.graph.check_users(len(tables[USERS]), self.config.title)
        trained_V1 = self.item_scale > 0
        users_Ud, items_Vd = tables[USERS], torch.where(trained_V1, tables[ITEMS], 0.0)
        final_Ud, final_Vd = self.mean_of_layers(users_Ud, items_Vd)
        total_Vd = torch.zeros_like(items_Vd)
        for _ in range(self.config.layers):  # layers 0..K - 1 of the items reach layers 1..K of a user
            total_Vd = total_Vd + items_Vd
            users_Ud, items_Vd = self.step(users_Ud, items_Vd)
        return UserItemVectors(
            users_Ud=final_Ud,
            items_Vd=final_Vd,
            known_U=self.graph.user_degree > 0,
            folded_Ve=self.item_scale * total_Vd / (self.config.layers + 1),
            fold_in=_visitors,
        )


class _Propagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model: LightGCN, rows_Ud: Tensor, rows_Vd: Tensor) -> _Nodes:
        ctx.model = model
        users_Ud, items_Vd = model.mean_of_known(rows_Ud, rows_Vd)
        return users_Ud.clone(), items_Vd.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        # The normalised adjacency matrix is symmetric, and so is the mean of its powers: the gradient is the
        # same function of the gradient, and no layer is stored.
        return None, *ctx.model.mean_of_layers(*grads)


def _visitors(total_Be: Tensor, count_B: Tensor) -> Tensor:
    return total_Be * count_B.clamp(min=1).rsqrt()[:, None]

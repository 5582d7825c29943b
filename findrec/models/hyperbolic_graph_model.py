"""The base class of models that learn points of the hyperboloid from the user-item graph.

The equations are in `findrec/models/parts/hyperbolic_graph.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.batches.edges import EdgeExamples, Edges
from findrec.datasets.folder.data_folder import DataFolder
from findrec.models.base import DataFacts, Microbatch, Model, StepLoss, TableShape
from findrec.models.capabilities import UserItemVectors
from findrec.models.parts.hyperbolic_config import HyperbolicGraphConfig
from findrec.models.parts.hyperbolic_graph import (
    edge_points,
    fold_in,
    hinge,
    measures,
    propagate,
    ranked_points,
    score_signs,
)
from findrec.ops.lorentz import exp_origin
from findrec.tables.base import ITEMS, USERS
from findrec.tables.view import Tables


class HyperbolicGraphModel(Model[Edges]):
    """Rows of users and items are tangent vectors, one narrower than `dim`; there are no other weights."""

    Config = HyperbolicGraphConfig

    score_signs: Tensor

    def __init__(self, config: HyperbolicGraphConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.graph = facts.interaction_graph()
        self.register_buffer("score_signs", score_signs(config.dim), persistent=False)

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> EdgeExamples:
        """See `Model`: the distinct user-item pairs of the training events."""
        keys = config.model
        assert isinstance(keys, HyperbolicGraphConfig)
        return EdgeExamples(config, folder, negatives=keys.negatives)

    @classmethod
    def tables(cls, config: HyperbolicGraphConfig, facts: DataFacts) -> dict[str, TableShape]:
        """See `Model`."""
        width = config.dim - 1
        return {ITEMS: TableShape(facts.num_items, width), USERS: TableShape(facts.num_users, width)}

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return self.graph.describe()

    def loss(self, microbatch: Microbatch[Edges], tables: Tables) -> StepLoss:
        """See `Model`: the mean hinge loss of the edges, after propagation through the whole graph."""
        edges, device = microbatch.examples, self.score_signs.device
        users_Ud, items_Vd = (
            tables[name].rows(torch.arange(len(degree), device=device))
            for name, degree in ((USERS, self.graph.user_degree), (ITEMS, self.graph.item_degree))
        )
        layers = propagate(self.graph, users_Ud, items_Vd, self.config.layers)
        users_nd, tangents_Vd = layers.user_tangents[edges.user], layers.item_tangents
        points = edge_points(tangents_Vd, edges.item, edges.negative)
        hinge_nN = hinge(exp_origin(users_nd), *points, self.config.margin)
        loss = hinge_nN.mean(1).sum() / microbatch.num_targets
        return StepLoss(loss, loss.detach(), {}, measures(hinge_nN, users_nd, tangents_Vd[edges.item]))

    def user_item_vectors(self, tables: Mapping[str, Tensor], features: ItemFeatures) -> UserItemVectors:
        """See `RanksUsers`: points of the hyperboloid."""
        self.graph.check_users(len(tables[USERS]), self.config.title)
        layers = propagate(self.graph, tables[USERS], tables[ITEMS], self.config.layers)
        return UserItemVectors(
            users_Ud=exp_origin(layers.user_tangents),
            items_Vd=ranked_points(layers.item_tangents, self.graph.item_degree),
            known_U=self.graph.user_degree > 0,
            folded_Ve=layers.folded_items(self.graph.item_degree),
            fold_in=partial(_visitors, layers=self.config.layers),
        )


def _visitors(total_Be: Tensor, count_B: Tensor, *, layers: int) -> Tensor:
    """The points of visitors; the sums themselves count the items with training events."""
    return exp_origin(fold_in(total_Be, layers))

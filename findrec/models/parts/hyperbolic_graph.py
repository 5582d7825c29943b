"""Graph convolution in the tangent space of the hyperboloid, and ranking by hyperbolic distance.

Table rows are tangent vectors at the origin. With the distinct neighbours N(n) of a node n, each layer is the
mean over a node and its neighbours, and the result is the sum of the layers without the first:

    e_n^(k+1) = (e_n^(k) + sum_{m in N(n)} e_m^(k)) / (1 + |N(n)|),      v_n = e_n^(1) + ... + e_n^(K)

(Sun et al. 2021, doi 10.1145/3442381.3450101). Distances are between the points `exp_o(v_n)`.

Shape letters: U, V rows of the tables of users and items, B users, n edges, N negatives per edge, d width of
tangent vectors, D = d + 1 width of points, K layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from findrec.models.parts.interaction_graph import InteractionGraph
from findrec.ops.lorentz import exp_origin, squared_distance


@dataclass(frozen=True)
class Layers:
    """The vectors of all nodes in each layer: K + 1 tensors `[U, d]` and `[V, d]`."""

    users: list[Tensor]
    items: list[Tensor]

    @property
    def user_tangents(self) -> Tensor:
        """`[U, d]` the tangent vectors of users."""
        return torch.stack(self.users[1:]).sum(0)

    @property
    def item_tangents(self) -> Tensor:
        """`[V, d]` the tangent vectors of items."""
        return torch.stack(self.items[1:]).sum(0)

    def folded_items(self, item_degree: Tensor) -> Tensor:
        """`[V, K d + 1]`, whose sums over the items of a visitor are the input of `fold_in`.

        The rows of the layers 0..K-1, and 1; zero for items without training events, whose rows mean nothing.
        """
        trained_V1 = (item_degree > 0)[:, None].to(self.items[0].dtype)
        return torch.cat([*self.items[:-1], torch.ones_like(trained_V1)], dim=1) * trained_V1


def propagate(graph: InteractionGraph, users_Ud: Tensor, items_Vd: Tensor, layers: int) -> Layers:
    """All layers of the graph convolution of the table rows; differentiable."""
    users, items = [users_Ud], [items_Vd]
    user_size, item_size = 1 + graph.user_degree[:, None], 1 + graph.item_degree[:, None]
    for _ in range(layers):
        of_users_Ud, of_items_Vd = graph.neighbour_sums(users[-1], items[-1])
        users.append((users[-1] + of_users_Ud) / user_size)
        items.append((items[-1] + of_items_Vd) / item_size)
    return Layers(users, items)


def fold_in(total_Be: Tensor, layers: int) -> Tensor:
    """Tangent vectors `[B, d]` of users who are not in the graph, from sums of `Layers.folded_items`.

    They are propagated as if the user were linked to these items, while the items stay as they are. The row
    that such a user lacks is replaced by the mean of the rows of the items. Without known items: zero.
    """
    sums, count_B1 = total_Be[:, :-1].chunk(layers, dim=1), total_Be[:, -1:]
    e_Bd = sums[0] / count_B1.clamp(min=1)
    result_Bd = torch.zeros_like(e_Bd)
    for sum_Bd in sums:
        e_Bd = (e_Bd + sum_Bd) / (1 + count_B1)
        result_Bd = result_Bd + e_Bd
    return result_Bd


def hinge(user_nD: Tensor, positive_nD: Tensor, negative_nND: Tensor, margin: float) -> Tensor:
    """`max(0, d^2(user, positive) - d^2(user, negative) + margin)` of points, `[n, N]`."""
    near_n = squared_distance(user_nD, positive_nD)
    far_nN = squared_distance(user_nD[:, None], negative_nND)
    return (near_n[:, None] - far_nN + margin).clamp(min=0)


def edge_points(items_Vd: Tensor, item_n: Tensor, negative_nN: Tensor) -> tuple[Tensor, Tensor]:
    """The points of the items `[n, D]` and of the negatives `[n, N, D]` of edges, from tangent vectors."""
    points_nND = exp_origin(items_Vd[torch.cat([item_n[:, None], negative_nN], dim=1)])
    return points_nND[:, 0], points_nND[:, 1:]


def ranked_points(tangents_Vd: Tensor, item_degree: Tensor) -> Tensor:
    """`[V, D]` float32, the points that items are scored by.

    Items without training events have no learned position, and one near the origin would be close to every
    user. They get the time-like vector `(2 max_v x_v0, 0, ..., 0)` instead: for each user its Lorentzian
    product is below that of every item with events, so that these items come last, all with one score.
    """
    points_VD = exp_origin(tangents_Vd.double())
    trained_V = item_degree > 0
    points_VD[~trained_V] = 0
    points_VD[~trained_V, 0] = 2 * points_VD[:, 0].max().clamp(min=1)
    return points_VD.float()


def score_signs(dim: int) -> Tensor:
    """`[D]` the signs of the Lorentzian product: -1 for the first coordinate, else +1."""
    signs_D = torch.ones(dim)
    signs_D[0] = -1
    return signs_D


def measures(hinge_nN: Tensor, users_nd: Tensor, items_nd: Tensor) -> Mapping[str, Tensor]:
    """Diagnostics: the share of pairs within the margin, and the mean distances of nodes from the origin."""
    return {
        "within_margin": (hinge_nN.detach() > 0).float().mean(),
        "user_radius": users_nd.detach().norm(dim=-1).mean(),
        "item_radius": items_nd.detach().norm(dim=-1).mean(),
    }

"""The bipartite graph of users and items, for models that propagate vectors along interactions.

The edges are the distinct user-item pairs of the training events. Nodes are rows of the tables `users` and
`items`: they start at 1, and the padding rows 0 have no edges.

Shape letters: E edges, U rows of the table of users, V rows of the table of items, d width, n nodes.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.errors import FindRecError


class InteractionGraph(nn.Module):
    """The adjacency matrix in both directions, as compressed sparse rows on the device of the model.

    It is data, so checkpoints do not contain it. It takes 12 bytes per edge.

    Attributes:
        user_degree: `[U]` float32, the number of distinct items of each user.
        item_degree: `[V]` float32, the number of distinct users of each item.
        digest: identifies the graph.
    """

    user_degree: Tensor
    item_degree: Tensor
    _ones: Tensor
    _of_users: Tensor
    _of_items: Tensor
    _user_rows: Tensor
    _item_rows: Tensor

    def __init__(self, pairs: TrainingPairs, num_users: int, num_items: int) -> None:
        super().__init__()
        _silence_beta_warning()
        size = torch.int32 if len(pairs.item) < 2**31 else torch.int64  # kernels are faster for int32
        user_degree = np.concatenate([[0], np.diff(pairs.offset)])
        item_degree = np.bincount(pairs.item, minlength=num_items + 1)
        if len(user_degree) != num_users + 1 or len(item_degree) != num_items + 1:
            raise ValueError(f"pairs of other data than {num_users:,} users and {num_items:,} items")
        by_item = np.argsort(pairs.item, kind="stable")  # users stay in ascending order

        def register(name: str, values: Any, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.from_numpy(values).to(dtype), persistent=False)

        register("user_degree", user_degree, torch.float32)
        register("item_degree", item_degree, torch.float32)
        register("_of_users", pairs.item, size)  # [E] the items of each user, one user after the other
        register("_user_rows", _starts(user_degree), size)  # [U + 1] where each user begins
        register("_of_items", pairs.user[by_item] + 1, size)
        register("_item_rows", _starts(item_degree), size)
        register("_ones", np.ones(len(pairs.item)), torch.float32)
        digest = hashlib.blake2b(digest_size=8)
        for part in (pairs.offset, pairs.item):
            digest.update(np.ascontiguousarray(part).tobytes())
        self.digest = digest.hexdigest()

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self._ones)

    def describe(self) -> str:
        """The size and the digest of the graph, for the training log."""
        return f"graph of {self.num_edges:,} user-item pairs ({self.digest})"

    def sums_of_items(self, items_Vd: Tensor) -> Tensor:
        """`[U, d]` for each user the sum of the vectors of its items, without a gradient."""
        shape = (len(self.user_degree), len(self.item_degree))
        return self._product(self._user_rows, self._of_users, shape, items_Vd)

    def sums_of_users(self, users_Ud: Tensor) -> Tensor:
        """`[V, d]` for each item the sum of the vectors of its users, without a gradient."""
        shape = (len(self.item_degree), len(self.user_degree))
        return self._product(self._item_rows, self._of_items, shape, users_Ud)

    def neighbour_sums(self, users_Ud: Tensor, items_Vd: Tensor) -> tuple[Tensor, Tensor]:
        """For each node the sum of the vectors of its neighbours: `[U, d]` and `[V, d]`, differentiable."""
        sums: tuple[Tensor, Tensor] = _NeighbourSums.apply(self, users_Ud, items_Vd)  # type: ignore[no-untyped-call]
        return sums

    def check_users(self, num_rows: int, name: str) -> None:
        """Raise `FindRecError` if a table of users, with `num_rows` rows, has other users than the graph."""
        if num_rows != len(self.user_degree):
            raise FindRecError(
                f"{name} was trained with {num_rows - 1:,} users, but the data has "
                f"{len(self.user_degree) - 1:,}: a model of the interaction graph cannot be used with other "
                "users. Train it again on this data"
            )

    def _product(self, rows: Tensor, columns: Tensor, shape: tuple[int, int], x_nd: Tensor) -> Tensor:
        ones = self._ones.to(x_nd.dtype)
        matrix = torch.sparse_csr_tensor(rows, columns, ones, shape, check_invariants=False)
        product: Tensor = matrix @ x_nd.detach().contiguous()
        return product


class _NeighbourSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graph: InteractionGraph, users_Ud: Tensor, items_Vd: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.graph = graph
        return graph.sums_of_items(items_Vd), graph.sums_of_users(users_Ud)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        # The adjacency matrix is symmetric, so the gradient is the same function of the gradient.
        users_Ud, items_Vd = grads
        return None, ctx.graph.sums_of_items(items_Vd), ctx.graph.sums_of_users(users_Ud)


def _starts(degree_n: Any) -> Any:
    """`[n + 1]` where the neighbours of each node begin."""
    return np.concatenate([[0], np.cumsum(degree_n)])


def _silence_beta_warning() -> None:
    """Make the first CSR tensor here: torch warns once a process that they are in beta state."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        one = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.arange(2), one, one.float(), (1, 1), check_invariants=False)

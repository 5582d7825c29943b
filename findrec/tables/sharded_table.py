"""The item table with its rows split over the workers, for catalogues that one worker does not hold.

A worker holds a range of rows (`Shards`) with their gradient and moments. Rows of distinct ids come by
all-to-all and their gradients go back the same way; the exact loss is `sharded_cross_entropy`, the sampled ones
look rows up; the optimizer is the replicated table's. So the placement changes results by rounding alone.

TorchRec shards embeddings too, but not this: its `fbgemm-gpu` updates rows inside the backward pass, where a
gradient can neither be clipped by its norm over all workers nor meet an exact loss that touches every row; on a
CPU it is a wheel of its own, tied to one torch version.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.ops.linear_cross_entropy import OwnBonus
from findrec.tables.base import CatalogueLoss, SavedRows, Scored, Transform
from findrec.tables.exchange import Route, Shards
from findrec.tables.initial import initial_rows
from findrec.tables.negatives import Negatives, estimated_loss
from findrec.tables.optimizer import adamw_rows
from findrec.tables.sharded_loss import sharded_cross_entropy


class ShardedItemTable:
    """`V` trainable rows of width `d` and the padding row 0, of which each worker holds a range (`Table`).

    `lookup`, `push` of ids, `catalogue_loss`, `step` and `all_rows` are collectives. Microbatches of all
    workers are taken in step: the n-th call on one worker meets the n-th on the others.
    """

    sharded = True

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        seed: int,
        loss: LossConfig,
        optim: OptimConfig,
        train_count: Tensor | None = None,
        only_trained: bool = False,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Arguments as of `ItemTable`, which starts with the same rows; `group` are the workers (None: all)."""
        self.num_items = num_items
        self._shards = shards = Shards(num_items + 1, group)
        # Ranges have one size, the last ones filled up with rows of zeros that are no class.
        self.weight = torch.zeros(shards.size, dim)
        filled = max(0, shards.end - shards.first)
        if filled:
            self.weight[:filled] = initial_rows(
                num_items + 1, dim, seed=seed, first=shards.first, end=shards.end
            )
        is_class = torch.zeros(shards.size, dtype=torch.bool)
        is_class[:filled] = True
        classes = None
        if only_trained:
            if train_count is None:
                raise ValueError("only_trained: which items are trained is told by train_count")
            classes = train_count > 0
            is_class[:filled] = classes[shards.first : shards.end]
            self.weight[~is_class] = 0.0
        if shards.first == 0:
            is_class[0] = False
        self.weight = self.weight.to(device)
        self.exp_avg = torch.zeros_like(self.weight)
        self.exp_avg_sq = torch.zeros_like(self.weight)
        self.steps = 0
        self._grad = torch.zeros_like(self.weight)
        self._filled = filled
        self._blocked = (~is_class).nonzero()[:, 0].to(device)
        self._loss = loss
        self._optim = optim
        self._negatives: Negatives | None = None
        if loss.kind != "exact":
            self._negatives = Negatives(
                loss, num_items, train_count=train_count, classes=classes, device=device
            )

    @property
    def first_row(self) -> int:
        """See `Table`."""
        return self._shards.first

    def lookup(self, ids_U: Tensor) -> Tensor:
        """See `Table`."""
        route = Route(self._shards, ids_U)
        return route.to_askers(self.weight[route.place_R]).requires_grad_()

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """See `Table`. Only with ids it is a collective."""
        if ids_U is None:
            self._grad += grad_Ud
            return
        route = Route(self._shards, ids_U)
        self._grad.index_add_(0, route.place_R, route.to_owners(grad_Ud))

    def catalogue_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        *,
        own: OwnBonus | None = None,
        generator: torch.Generator | None = None,
        transform: Transform | None = None,
    ) -> CatalogueLoss:
        """See `Table`. In the exact loss `transform` is given this worker's rows (0 for those filled up), and
        `Scored` holds the gradient of the tokens of all workers in them.
        """
        if self._negatives is not None:
            return estimated_loss(
                *(self, self._negatives, h_Td, target_T, num_targets),
                own=own,
                generator=generator,
                transform=transform,
            )
        rows = vectors = self.weight.detach()
        gradient = self._grad
        if transform is not None:
            ids_n = torch.arange(len(rows), device=rows.device) + self.first_row
            ids_n[self._filled :] = 0
            rows.requires_grad_()
            vectors = transform(ids_n, rows)
            gradient = torch.zeros_like(rows)
        with torch.no_grad():
            found = sharded_cross_entropy(
                *(self._shards, h_Td, vectors.detach().float(), target_T, gradient),
                share=1.0 / num_targets,
                blocked=self._blocked,
                own=None if own is None else replace(own, bonus_TN=own.bonus_TN.detach()),
                tile_bytes=self._loss.tile_mib << 20,
            )
        scored = None if transform is None else Scored(None, rows, vectors, gradient)
        return CatalogueLoss(found.loss, found.dh_Td, found.dbonus_TN, scored)

    def reduce_gradient(self) -> None:
        """See `Table`: every gradient is where its row is already."""

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See `Table`."""
        if self.first_row == 0:
            self._grad[0] = 0.0
        own = float(torch.linalg.vector_norm(self._grad))
        norm = math.sqrt(self._shards.total(own * own, self._grad.device))
        adamw_rows(
            *(self.weight, self._grad, self.exp_avg, self.exp_avg_sq),
            steps=self.steps,
            lr=lr,
            norm=norm,
            optim=self._optim,
        )
        self.steps += 1
        return norm

    def all_rows(self) -> Tensor:
        """See `Table`: gathered anew, so that each worker holds one whole copy of the weights for a while."""
        return self._shards.gather(self.weight).flatten(0, 1)[: self.num_items + 1]

    def state(self) -> dict[str, Tensor]:
        """See `Table`."""
        held = {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {name: value[: self._filled] for name, value in held.items()}

    def start_from(self, saved: SavedRows) -> None:
        """See `Table`; reads this worker's rows alone."""
        end = min(self._shards.end, saved.num_rows)
        if saved.num_rows > self.num_items + 1 or saved.rows("weight", 0, 1).shape[1:] != self.weight.shape[1:]:
            found = (saved.num_rows, *saved.rows("weight", 0, 1).shape[1:])
            want = (self.num_items + 1, self.weight.shape[1])
            raise ValueError(f"item table: rows {found} do not fit into a table {want}")
        if end > self.first_row:
            self.weight[: end - self.first_row] = saved.rows("weight", self.first_row, end)

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """See `Table`; reads this worker's rows alone."""
        want = (self.num_items + 1, self.weight.shape[1])
        for name, value in self.state().items():
            found = (saved.num_rows, *saved.rows(name, 0, 1).shape[1:])
            if found != want:
                raise ValueError(f"item table {name}: the checkpoint holds {found}, this run needs {want}")
            if self._filled:
                value.copy_(saved.rows(name, self.first_row, self._shards.end))
        self.steps = steps

"""The item table: its rows, catalogue loss and optimizer, outside every `nn.Module` and outside DeepSpeed.

DeepSpeed would broadcast a table, gather it whole under ZeRO-3 or refuse its sparse gradients. A step is
`lookup` (a leaf) -> tower -> `catalogue_loss` -> backward through the tower -> `push` -> `step`. This is the
replicated placement: every worker holds all rows, gradients are summed over workers, and every worker makes
the same dense AdamW step (Loshchilov & Hutter 2019), so replicas stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.ops.linear_cross_entropy import OwnBonus, linear_cross_entropy
from findrec.tables.base import CatalogueLoss, Scored, Transform
from findrec.tables.initial import initial_rows
from findrec.tables.negatives import Negatives, estimated_loss
from findrec.tables.optimizer import adamw_rows


class ItemTable:
    """`V` trainable rows of width `d`, plus row 0 (padding), which is zero and stays zero (`Table`)."""

    sharded = False
    first_row = 0

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
    ) -> None:
        """`train_count` `[V + 1]` is the popularity that negatives are drawn by (sampled loss). With
        `only_trained` the loss runs over items of positive count, and the rows of all others are zero.
        """
        weight = initial_rows(num_items + 1, dim, seed=seed)
        self._classes = None  # [V + 1] bool, the items the loss runs over; None: all
        if only_trained:
            if train_count is None:
                raise ValueError("only_trained: which items are trained is told by train_count")
            trained = train_count > 0
            weight[~trained] = 0.0
            self._classes = trained.to(device)
        self.weight = weight.to(device)
        self.exp_avg = torch.zeros_like(self.weight)
        self.exp_avg_sq = torch.zeros_like(self.weight)
        self.steps = 0
        self._grad = torch.zeros_like(self.weight)
        self._loss = loss
        self._optim = optim
        self._negatives: Negatives | None = None
        if loss.kind != "exact":
            self._negatives = Negatives(
                loss, num_items, train_count=train_count, classes=self._classes, device=device
            )

    @property
    def num_items(self) -> int:
        """V, without the padding row."""
        return int(self.weight.shape[0]) - 1

    def lookup(self, ids_U: Tensor) -> Tensor:
        """Rows `[U, d]` of distinct ids as a leaf that collects a gradient; hand that to `push`."""
        rows: Tensor = self.weight[ids_U]
        return rows.requires_grad_()

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """Add the gradient of rows (distinct ids, None for all rows; padding is ignored)."""
        if ids_U is None:
            self._grad += grad_Ud
        else:
            self._grad.index_add_(0, ids_U, grad_Ud)

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
        """Cross-entropy of a microbatch, over `num_targets` = all targets of the step on all workers.

        `h_Td` and `own.bonus_TN` are taken detached; their gradients are returned. The table's own
        gradient is added here, or, with a `transform`, returned on its way there (`Scored`).
        `generator` draws the sampled negatives (CPU).
        """
        if self._negatives is not None:
            return estimated_loss(
                *(self, self._negatives, h_Td, target_T, num_targets),
                own=own,
                generator=generator,
                transform=transform,
            )
        h = h_Td.detach().requires_grad_()
        bonus = None
        if own is not None:
            bonus = own.bonus_TN.detach().requires_grad_()
            own = replace(own, bonus_TN=bonus)
        rows = vectors = self.weight.detach()
        if transform is not None:
            rows.requires_grad_()
            vectors = transform(None, rows)
        leaf = vectors.detach().requires_grad_()
        tile = self._loss.tile_mib << 20
        loss = linear_cross_entropy(h, leaf, target_T, own=own, allowed_V=self._classes, tile_bytes=tile)
        loss = loss / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None
        assert leaf.grad is not None
        scored = None
        if transform is None:
            self.push(None, leaf.grad)
        else:
            scored = Scored(None, rows, vectors, leaf.grad)
        return CatalogueLoss(loss.detach(), h.grad, None if bonus is None else bonus.grad, scored)

    def reduce_gradient(self) -> None:
        """Sum the collected gradient over workers (nothing to do in a single process)."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._grad)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One AdamW step of all rows with the collected gradient; returns its norm before clipping."""
        grad = self._grad
        grad[0] = 0.0
        norm = float(torch.linalg.vector_norm(grad))
        adamw_rows(
            *(self.weight, grad, self.exp_avg, self.exp_avg_sq),
            steps=self.steps,
            lr=lr,
            norm=norm,
            optim=self._optim,
        )
        self.steps += 1
        return norm

    def all_rows(self) -> Tensor:
        """`[V + 1, d]`: the table itself."""
        return self.weight

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, for a checkpoint."""
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def start_from(self, saved: Mapping[str, Tensor]) -> None:
        """Take over the rows `[n + 1, d]` of the first n items; later ones and the optimizer stay as new."""
        weight = saved["weight"]
        if len(weight) > len(self.weight) or weight.shape[1:] != self.weight.shape[1:]:
            found, want = tuple(weight.shape), tuple(self.weight.shape)
            raise ValueError(f"item table: rows {found} do not fit into a table {want}")
        self.weight[: len(weight)] = weight.to(self.weight.device)

    def load_state(self, saved: Mapping[str, Tensor], steps: int) -> None:
        """Take over weights and moments of a checkpoint; raises `ValueError` on another shape."""
        for name, value in self.state().items():
            rows = saved[name]
            if rows.shape != value.shape:
                found, want = tuple(rows.shape), tuple(value.shape)
                raise ValueError(f"item table {name}: the checkpoint holds {found}, this run needs {want}")
            value.copy_(rows)
        self.steps = steps

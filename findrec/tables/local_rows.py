"""The rows of a table that one worker holds: weights, accumulated gradient and optimizer.

The optimizer is AdamW (Loshchilov & Hutter 2019) in one of two forms, for replicated and sharded tables:

* dense, for the exact loss, whose gradient reaches every row in every step;
* lazy, for sampled losses: a step updates only the rows that were looked up in it; weights and moments of
  other rows do not decay. Bias correction uses the number of steps, not the number of updates of a row (as
  `torch.optim.SparseAdam`). No gradient of the size of the table is stored.

Shape letters: n local rows, p rows updated in a step, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from findrec.config import OptimConfig
from findrec.tables.base import SavedRows
from findrec.tables.row_sums import add_rows_


class LocalRows:
    """Rows from `first` on of a table with `num_rows` rows; row 0 of the table stays zero."""

    def __init__(
        self, weight_nd: Tensor, *, first: int, num_rows: int, lazy: bool, optim: OptimConfig
    ) -> None:
        self.weight = weight_nd
        self.exp_avg = torch.zeros_like(weight_nd)
        self.exp_avg_sq = torch.zeros_like(weight_nd)
        self.steps = 0
        self._first, self._num_rows, self._optim = first, num_rows, optim
        self._dense = None if lazy else torch.zeros_like(weight_nd)
        self._parts: list[tuple[Tensor, Tensor]] = []  # lazy: indices and gradients in order of arrival

    def add(self, index_p: Tensor | None, grad_pd: Tensor) -> None:
        """Accumulate the gradient of the rows at indices `0..n - 1`, or of all rows (None, dense only)."""
        if self._dense is None:
            assert index_p is not None, "a lazy optimizer needs the row indices of a gradient"
            self._parts.append((index_p, grad_pd))
        elif index_p is None:
            self._dense += grad_pd
        else:
            add_rows_(self._dense, index_p, grad_pd)

    @property
    def dense_gradient(self) -> Tensor | None:
        """The accumulated gradient `[n, d]`, to be added to in place; None if the optimizer is lazy."""
        return self._dense

    def gradient(self) -> tuple[Tensor | None, Tensor]:
        """The accumulated gradient: ascending indices `[p]` (None: all) and `[p, d]`, without padding."""
        if self._dense is not None:
            if self._first == 0:
                self._dense[0] = 0.0
            return None, self._dense
        if not self._parts:
            return torch.zeros(0, dtype=torch.int64, device=self.weight.device), self.weight[:0]
        indices, grads = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        index_p, row = torch.unique(indices, return_inverse=True)
        grad_pd = add_rows_(self.weight.new_zeros(len(index_p), self.weight.shape[1]), row, grads)
        padding = int(self._first == 0 and len(index_p) > 0 and int(index_p[0]) == 0)
        return index_p[padding:], grad_pd[padding:]

    def clear(self) -> None:
        """Reset the gradient to zero."""
        self._parts.clear()
        if self._dense is not None:
            self._dense.zero_()

    @torch.no_grad()
    def update(self, index_p: Tensor | None, grad_pd: Tensor, *, lr: float, norm: float) -> None:
        """One step with the result of `gradient`, which is modified and then reset.

        `norm` is the norm of the whole table's gradient, over all workers, used to clip it to `clip_table`.
        """
        if 0 < self._optim.clip_table < norm:
            grad_pd.mul_(self._optim.clip_table / norm)
        tensors = (self.weight, self.exp_avg, self.exp_avg_sq)
        if index_p is None:
            self._adamw(*tensors, grad_pd, lr)
        elif len(index_p):
            parts = (self.weight[index_p], self.exp_avg[index_p], self.exp_avg_sq[index_p])
            self._adamw(*parts, grad_pd, lr)
            for values, part in zip(tensors, parts, strict=True):
                values[index_p] = part
        self.steps += 1
        self.clear()

    def _adamw(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, lr: float) -> None:
        beta1, beta2 = self._optim.betas
        adamw(
            [weight],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.full((), float(self.steps), device=grad.device)],  # filled there, not copied
            fused=True,  # one pass over the rows instead of ten
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=self._optim.weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer moments, `[n, d]` each."""
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_weights(self, saved: SavedRows) -> None:
        """Load the weights of saved rows; raises `ValueError` if there are more rows or the width differs."""
        if saved.num_rows > self._num_rows or saved.width != self.weight.shape[1]:
            have, need = (saved.num_rows, saved.width), (self._num_rows, self.weight.shape[1])
            raise ValueError(f"item table: rows of shape {have} do not fit into a table of shape {need}")
        self._copy("weight", saved, min(saved.num_rows, self._first + len(self.weight)))

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """Load rows with their moments after `steps` steps; raises `ValueError` if shapes differ."""
        have, need = (saved.num_rows, saved.width), (self._num_rows, self.weight.shape[1])
        if have != need:
            raise ValueError(f"item table: the checkpoint has the shape {have}, this run needs {need}")
        for name in self.state():
            self._copy(name, saved, self._first + len(self.weight))
        self.steps = steps

    def _copy(self, name: str, saved: SavedRows, end: int) -> None:
        """Copy the rows up to `end` in blocks, to limit the extra memory."""
        step = max(1, (64 << 20) // (4 * self.weight.shape[1]))
        for low in range(self._first, end, step):
            high = min(low + step, end)
            self.state()[name][low - self._first : high - self._first] = saved.rows(name, low, high)

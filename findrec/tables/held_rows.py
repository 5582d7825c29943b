"""The rows of an item table that one worker holds: weights, collected gradient and optimizer.

The optimizer is AdamW (Loshchilov & Hutter 2019) in one of two forms, the same for every placement of rows:

* dense, for the exact loss, whose gradient reaches every row in every step;
* lazy, for the sampled ones: a step updates the rows that were looked up in it, and leaves weights and
  moments of all others as they are, without decay. Bias correction goes by the number of steps, not by a
  row's own updates (as in `torch.optim.SparseAdam`). Nothing of the size of the table is touched, nor held
  as gradient.

Shape letters: n rows held, p rows that take part in a step, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from findrec.config import OptimConfig
from findrec.tables.base import SavedRows


class HeldRows:
    """Rows `first`, `first + 1`, ... of a table of `num_rows`; row 0 of the table is kept at zero."""

    def __init__(
        self, weight_nd: Tensor, *, first: int, num_rows: int, lazy: bool, optim: OptimConfig
    ) -> None:
        self.weight = weight_nd
        self.exp_avg = torch.zeros_like(weight_nd)
        self.exp_avg_sq = torch.zeros_like(weight_nd)
        self.steps = 0
        self._first, self._num_rows, self._optim = first, num_rows, optim
        self._dense = None if lazy else torch.zeros_like(weight_nd)
        self._parts: list[tuple[Tensor, Tensor]] = []  # lazy: places and their gradients, as they came

    def add(self, place_p: Tensor | None, grad_pd: Tensor) -> None:
        """Add to the gradient of rows at places `0..n - 1`, or of all (None, dense only)."""
        if self._dense is None:
            assert place_p is not None, "a lazy optimizer is told which rows a gradient belongs to"
            self._parts.append((place_p, grad_pd))
        elif place_p is None:
            self._dense += grad_pd
        else:
            self._dense.index_add_(0, place_p, grad_pd)

    @property
    def dense_gradient(self) -> Tensor | None:
        """`[n, d]` what was added so far, open to additions in place; None where the optimizer is lazy."""
        return self._dense

    def gradient(self) -> tuple[Tensor | None, Tensor]:
        """What was added so far: places `[p]`, ascending (None: all), and `[p, d]`; the padding has none."""
        if self._dense is not None:
            if self._first == 0:
                self._dense[0] = 0.0
            return None, self._dense
        if not self._parts:
            return torch.zeros(0, dtype=torch.int64, device=self.weight.device), self.weight[:0]
        places, grads = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        place_p, row = torch.unique(places, return_inverse=True)
        grad_pd = self.weight.new_zeros(len(place_p), self.weight.shape[1]).index_add_(0, row, grads)
        padding = int(self._first == 0 and len(place_p) > 0 and int(place_p[0]) == 0)
        return place_p[padding:], grad_pd[padding:]

    def clear(self) -> None:
        """Forget the gradient."""
        self._parts.clear()
        if self._dense is not None:
            self._dense.zero_()

    @torch.no_grad()
    def update(self, place_p: Tensor | None, grad_pd: Tensor, *, lr: float, norm: float) -> None:
        """One step with a gradient as `gradient` gives it (changed here), which is then forgotten.

        `norm` is that of the whole table's gradient, on all workers: it is clipped to `clip_table` by it.
        """
        if 0 < self._optim.clip_table < norm:
            grad_pd.mul_(self._optim.clip_table / norm)
        held = (self.weight, self.exp_avg, self.exp_avg_sq)
        if place_p is None:
            self._adamw(*held, grad_pd, lr)
        elif len(place_p):
            parts = (self.weight[place_p], self.exp_avg[place_p], self.exp_avg_sq[place_p])
            self._adamw(*parts, grad_pd, lr)
            for values, part in zip(held, parts, strict=True):
                values[place_p] = part
        self.steps += 1
        self.clear()

    def _adamw(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, lr: float) -> None:
        beta1, beta2 = self._optim.betas
        adamw(
            *([weight], [grad], [exp_avg], [exp_avg_sq], []),
            [torch.tensor(float(self.steps), device=grad.device)],
            fused=True,  # one pass over the rows, where its operations one by one make ten
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=self._optim.weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, `[n, d]` each."""
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def start_from(self, saved: SavedRows) -> None:
        """Take over the saved rows as far as they go; raises `ValueError` for more or wider ones."""
        if saved.num_rows > self._num_rows or saved.width != self.weight.shape[1]:
            found, want = (saved.num_rows, saved.width), (self._num_rows, self.weight.shape[1])
            raise ValueError(f"item table: rows {found} do not fit into a table {want}")
        self._copy("weight", saved, min(saved.num_rows, self._first + len(self.weight)))

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """Take over saved rows with their moments, after `steps` steps; raises `ValueError` for others."""
        found, want = (saved.num_rows, saved.width), (self._num_rows, self.weight.shape[1])
        if found != want:
            raise ValueError(f"item table: the checkpoint holds {found}, this run needs {want}")
        for name in self.state():
            self._copy(name, saved, self._first + len(self.weight))
        self.steps = steps

    def _copy(self, name: str, saved: SavedRows, end: int) -> None:
        """Rows up to `end`, some at a time: a whole range beside the table would be much."""
        step = max(1, (64 << 20) // (4 * self.weight.shape[1]))
        for low in range(self._first, end, step):
            high = min(low + step, end)
            self.state()[name][low - self._first : high - self._first] = saved.rows(name, low, high)

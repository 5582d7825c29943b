"""The item table: its rows, catalogue loss and optimizer, outside every `nn.Module` and outside DeepSpeed.

DeepSpeed would broadcast a table, gather it whole under ZeRO-3 or refuse its sparse gradients. A step is
`lookup` (a leaf) -> tower -> `catalogue_loss` -> backward through the tower -> `push` -> `step`. This is the
replicated placement: every worker holds all rows, gradients are summed over workers, and every worker makes
the same dense AdamW step (Loshchilov & Hutter 2019), so replicas stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from findrec.config import LossConfig, OptimConfig
from findrec.ops.linear_cross_entropy import OwnBonus, linear_cross_entropy
from findrec.ops.sampled_cross_entropy import generalised_bce, sampled_cross_entropy

# How rows become the vectors that are scored: `transform(ids, rows)`, `ids` None for the whole table.
Transform = Callable[[Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Scored:
    """Vectors made of table rows by a `Transform`, and what the loss says about them."""

    ids: Tensor | None  # [n] distinct, None: all rows
    rows: Tensor  # [n, d] leaf; after the backward pass its gradient goes to `push`
    vectors: Tensor  # [n, d]
    gradient: Tensor  # [n, d] of the loss in `vectors`


@dataclass(frozen=True)
class CatalogueLoss:
    """Loss of one microbatch and what flows back into the tower."""

    loss: Tensor  # [] sum of token losses divided by the step's global target count
    dh: Tensor  # [T, d]
    dbonus: Tensor | None  # [T, N], when a bonus was given
    scored: Scored | None  # when a transform was given


class ItemTable:
    """`V` trainable rows of width `d`, plus row 0 (padding), which is zero and stays zero."""

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
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(num_items + 1, dim, generator=generator) * dim**-0.5 * 0.2
        weight[0] = 0.0
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
        self._proposal = self._make_proposal(train_count)

    @property
    def num_items(self) -> int:
        """V, without the padding row."""
        return int(self.weight.shape[0]) - 1

    def _make_proposal(self, train_count: Tensor | None) -> Tensor | None:
        if self._loss.kind != "sampled":
            return None
        if train_count is None:
            raise ValueError("the sampled loss draws negatives by popularity: train_count is needed")
        # Between popularity (good for frequent items) and uniform (so that no item has a huge weight).
        proposal = (train_count.to(torch.float64) + 1.0) ** 0.75
        proposal[0] = 0.0
        if self._classes is not None:
            proposal[~self._classes.cpu()] = 0.0
        normalised: Tensor = proposal / proposal.sum()
        return normalised.to(self.weight.device)

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
        h = h_Td.detach().requires_grad_()
        bonus = None
        if own is not None:
            bonus = own.bonus_TN.detach().requires_grad_()
            own = replace(own, bonus_TN=bonus)
        sample_S = None if self._loss.kind == "exact" else self._draw(generator)
        ids = None
        if sample_S is not None:
            met = [] if own is None else [own.ids_BN.flatten()]
            ids = torch.unique(torch.cat([sample_S, target_T, *met]))
        rows = self.weight.detach() if ids is None else self.weight[ids]
        vectors = rows
        if transform is not None:
            rows.requires_grad_()
            vectors = transform(ids, rows)
        leaf = vectors.detach().requires_grad_()
        if ids is None or sample_S is None:
            loss = self._exact(h, leaf, target_T, own)
        else:
            loss = self._estimated(h, leaf, ids, target_T, sample_S, own)
        loss = loss / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        scored = None
        if transform is None:
            self.push(ids, leaf.grad)
        else:
            scored = Scored(ids, rows, vectors, leaf.grad)
        assert h.grad is not None
        return CatalogueLoss(loss.detach(), h.grad, bonus.grad if bonus is not None else None, scored)

    def _exact(self, h: Tensor, vectors_Vd: Tensor, target_T: Tensor, own: OwnBonus | None) -> Tensor:
        tile = self._loss.tile_mib << 20
        return linear_cross_entropy(
            h, vectors_Vd, target_T, own=own, allowed_V=self._classes, tile_bytes=tile
        )

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        """`[S]` negatives: with replacement from the proposal, for gBCE distinct and uniform."""
        num = self._loss.negatives
        if self._loss.kind == "gbce":
            pool = torch.arange(1, self.num_items + 1) if self._classes is None else self._classes.nonzero()
            drawn = pool.flatten().cpu()[torch.randperm(len(pool), generator=generator)[:num]]
        else:
            assert self._proposal is not None
            drawn = torch.multinomial(self._proposal.cpu(), num, replacement=True, generator=generator)
        return drawn.to(self.weight.device)

    def _estimated(
        self,
        h: Tensor,
        vectors_nd: Tensor,
        ids_n: Tensor,
        target_T: Tensor,
        sample_S: Tensor,
        own: OwnBonus | None,
    ) -> Tensor:
        """Sampled softmax or gBCE; `vectors_nd` belong to `ids_n`, ascending, with every id used here."""

        def vectors_of(ids: Tensor) -> Tensor:
            return F.embedding(torch.searchsorted(ids_n, ids), vectors_nd)

        target_Td, sample_Sd = vectors_of(target_T), vectors_of(sample_S)
        if self._loss.kind == "gbce":
            return generalised_bce(
                h,
                target_Td,
                sample_Sd,
                target_T,
                sample_S,
                num_items=self.num_items if self._classes is None else int(self._classes.sum()),
                calibration=self._loss.calibration,
                own=own,
            )
        assert self._proposal is not None
        log_expected = (self._proposal[sample_S] * self._loss.negatives).log().to(h.dtype)
        own_row_BNd = None if own is None else vectors_of(own.ids_BN)
        return sampled_cross_entropy(
            h, target_Td, sample_Sd, target_T, sample_S, log_expected, own=own, own_row_BNd=own_row_BNd
        )

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
        clip = self._optim.clip_table
        if 0 < clip < norm:
            grad.mul_(clip / norm)
        beta1, beta2 = self._optim.betas
        adamw(
            *([self.weight], [grad], [self.exp_avg], [self.exp_avg_sq], []),
            [torch.tensor(float(self.steps), device=grad.device)],
            fused=True,  # one pass over the table, where its operations one by one make ten
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=self._optim.weight_decay,
            eps=1e-8,
            maximize=False,
        )
        self.steps += 1
        grad.zero_()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, for a checkpoint."""
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def start_from(self, weight: Tensor) -> None:
        """Take over the rows `[n + 1, d]` of the first n items; later ones and the optimizer stay as new."""
        if len(weight) > len(self.weight) or weight.shape[1:] != self.weight.shape[1:]:
            found, want = tuple(weight.shape), tuple(self.weight.shape)
            raise ValueError(f"item table: rows {found} do not fit into a table {want}")
        self.weight[: len(weight)] = weight.to(self.weight.device)

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Take over weights and moments of a checkpoint; raises `ValueError` on another shape."""
        for name, value in self.state().items():
            if state[name].shape != value.shape:
                found, want = tuple(state[name].shape), tuple(value.shape)
                raise ValueError(f"item table {name}: the checkpoint holds {found}, this run needs {want}")
            value.copy_(state[name])
        self.steps = steps

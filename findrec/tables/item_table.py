"""The item table: its rows, catalogue loss and optimizer, outside every `nn.Module` and outside DeepSpeed.

DeepSpeed would broadcast a table, gather it whole under ZeRO-3 or refuse its sparse gradients. A step is
`lookup` (a leaf) -> tower -> `catalogue_loss` -> backward through the tower -> `push` -> `step`. This is the
replicated placement: every worker holds all rows, gradients are summed over workers, and every worker makes
the same dense AdamW step (Loshchilov & Hutter 2019), so replicas stay equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.ops.linear_cross_entropy import OwnBonus, linear_cross_entropy
from findrec.ops.sampled_cross_entropy import generalised_bce, sampled_cross_entropy


@dataclass(frozen=True)
class CatalogueLoss:
    """Loss of one microbatch and what flows back into the tower."""

    loss: Tensor  # [] sum of token losses divided by the step's global target count
    dh: Tensor  # [T, d]
    dbonus: Tensor | None  # [T, N], when a bonus was given


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
        device: torch.device | str = "cpu",
    ) -> None:
        """`train_count` `[V + 1]` is the popularity that negatives are drawn by (sampled loss)."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(num_items + 1, dim, generator=generator) * dim**-0.5 * 0.2
        weight[0] = 0.0
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
        normalised: Tensor = proposal / proposal.sum()
        return normalised.to(self.weight.device)

    def lookup(self, ids_U: Tensor) -> Tensor:
        """Rows `[U, d]` of distinct ids as a leaf that collects a gradient; hand that to `push`."""
        rows: Tensor = self.weight[ids_U]
        return rows.requires_grad_()

    def push(self, ids_U: Tensor, grad_Ud: Tensor) -> None:
        """Add the gradient of looked-up rows (distinct ids; padding is ignored)."""
        self._grad.index_add_(0, ids_U, grad_Ud)

    def catalogue_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        *,
        own: OwnBonus | None = None,
        generator: torch.Generator | None = None,
    ) -> CatalogueLoss:
        """Cross-entropy of a microbatch, over `num_targets` = all targets of the step on all workers.

        `h_Td` and `own.bonus_TN` are taken detached; their gradients are returned. The table's own
        gradient is added here. `generator` draws the sampled negatives (CPU).
        """
        h = h_Td.detach().requires_grad_()
        bonus = None
        if own is not None:
            bonus = own.bonus_TN.detach().requires_grad_()
            own = OwnBonus(own.ids_BN, own.row_T, own.seen_TN, bonus)
        if self._loss.kind == "exact":
            table = self.weight.detach().requires_grad_()
            tile = self._loss.tile_mib << 20
            loss = linear_cross_entropy(h, table, target_T, own=own, tile_bytes=tile) / num_targets
            leaves: list[tuple[Tensor, Tensor | None]] = [(table, None)]
        else:
            estimate = self._gbce if self._loss.kind == "gbce" else self._sampled
            loss, leaves = estimate(h, target_T, own, generator)
            loss = loss / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        for leaf, ids in leaves:
            assert leaf.grad is not None
            if ids is None:
                self._grad += leaf.grad
            else:
                self._grad.index_add_(0, ids, leaf.grad.view(-1, leaf.shape[-1]))
        assert h.grad is not None
        return CatalogueLoss(loss.detach(), h.grad, bonus.grad if bonus is not None else None)

    def _sampled(
        self, h: Tensor, target_T: Tensor, own: OwnBonus | None, generator: torch.Generator | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        assert self._proposal is not None
        num = self._loss.negatives
        drawn = torch.multinomial(self._proposal.cpu(), num, replacement=True, generator=generator)
        sample_S = drawn.to(h.device)
        log_expected = (self._proposal[sample_S] * num).log().to(h.dtype)
        sample_rows = self.weight[sample_S].requires_grad_()
        target_rows = self.weight[target_T].requires_grad_()
        leaves: list[tuple[Tensor, Tensor | None]] = [(sample_rows, sample_S)]
        leaves.append((target_rows, target_T))
        own_rows = None
        if own is not None:
            own_rows = self.weight[own.ids_BN].requires_grad_()
            leaves.append((own_rows, own.ids_BN.reshape(-1)))
        loss = sampled_cross_entropy(
            h, target_rows, sample_rows, target_T, sample_S, log_expected, own=own, own_row_BNd=own_rows
        )
        return loss, leaves

    def _gbce(
        self, h: Tensor, target_T: Tensor, own: OwnBonus | None, generator: torch.Generator | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        # Without replacement, so that the sampling rate of gBCE is what its name says.
        drawn = torch.randperm(self.num_items, generator=generator)[: self._loss.negatives] + 1
        sample_S = drawn.to(h.device)
        sample_rows = self.weight[sample_S].requires_grad_()
        target_rows = self.weight[target_T].requires_grad_()
        loss = generalised_bce(
            h,
            target_rows,
            sample_rows,
            target_T,
            sample_S,
            num_items=self.num_items,
            calibration=self._loss.calibration,
            own=own,
        )
        return loss, [(sample_rows, sample_S), (target_rows, target_T)]

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
        self.steps += 1
        self.weight.mul_(1.0 - lr * self._optim.weight_decay)
        self.exp_avg.lerp_(grad, 1.0 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = (self.exp_avg_sq / (1.0 - beta2**self.steps)).sqrt_().add_(1e-8)
        self.weight.addcdiv_(self.exp_avg, denominator, value=-lr / (1.0 - beta1**self.steps))
        grad.zero_()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, for a checkpoint."""
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Take over weights and moments of a checkpoint; raises `ValueError` on another shape."""
        for name, value in self.state().items():
            if state[name].shape != value.shape:
                found, want = tuple(state[name].shape), tuple(value.shape)
                raise ValueError(f"item table {name}: the checkpoint holds {found}, this run needs {want}")
            value.copy_(state[name])
        self.steps = steps

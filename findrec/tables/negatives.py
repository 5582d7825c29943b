"""Catalogue losses from a sample of negatives: their draw, and the loss of the rows that this asks for.

The sample is a microbatch's own, keyed by its generator, so that it is the same wherever the microbatch runs
and however the table's rows are placed.

Shape letters: T tokens, S samples, n distinct ids that the loss reads, V items, d width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.config import LossConfig
from findrec.ops.linear_cross_entropy import OwnBonus
from findrec.ops.sampled_cross_entropy import generalised_bce, sampled_cross_entropy
from findrec.tables.base import CatalogueLoss, Scored, Table, Transform


class Negatives:
    """Sampled softmax or gBCE over a catalogue of `num_items`, `classes` (bool `[V + 1]`) of them or all."""

    def __init__(
        self,
        loss: LossConfig,
        num_items: int,
        *,
        train_count: Tensor | None,
        classes: Tensor | None,
        device: torch.device | str,
    ) -> None:
        self._loss, self._num_items, self._classes, self._device = loss, num_items, classes, device
        self._num_classes = num_items if classes is None else int(classes[1:].sum())
        self._upto: Tensor | None = None  # [V + 1] float64, chance to draw this item or an earlier one
        if loss.kind != "sampled":
            return
        if train_count is None:
            raise ValueError("the sampled loss draws negatives by popularity: train_count is needed")
        # Between popularity (good for frequent items) and uniform (so that no item has a huge weight).
        proposal = train_count.to(torch.float64).add_(1.0).pow_(0.75)
        proposal[0] = 0.0
        if classes is not None:
            proposal[~classes] = 0.0
        self._upto = proposal.div_(proposal.sum()).cumsum_(0)
        self._upto /= self._upto[-1].clone()

    def draw(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """`[S]` negatives: with replacement from the proposal, for gBCE distinct and uniform; and `[S]`
        float64, how often each is expected among them (sampled softmax only).
        """
        num = self._loss.negatives
        if self._upto is None:
            pool = torch.arange(1, self._num_items + 1)
            if self._classes is not None:
                pool = pool[self._classes[1:]]
            return pool[torch.randperm(len(pool), generator=generator)[:num]].to(self._device), None
        # What `torch.multinomial` does, draw by draw, but it would sum up the catalogue each time, and
        # refuses more than 2**24 items.
        uniform = torch.rand(num, dtype=torch.float64, generator=generator)
        drawn = torch.searchsorted(self._upto, uniform, right=True)
        expected = (self._upto[drawn] - self._upto[drawn - 1]) * num
        return drawn.to(self._device), expected.to(self._device)

    def loss(
        self,
        h: Tensor,
        vectors_nd: Tensor,
        ids_n: Tensor,
        target_T: Tensor,
        drawn: tuple[Tensor, Tensor | None],
        own: OwnBonus | None,
    ) -> Tensor:
        """Sum over tokens; `vectors_nd` belong to `ids_n`, ascending, with every id used here."""

        def vectors_of(ids: Tensor) -> Tensor:
            return F.embedding(torch.searchsorted(ids_n, ids), vectors_nd)

        sample_S, expected_S = drawn
        target_Td, sample_Sd = vectors_of(target_T), vectors_of(sample_S)
        if expected_S is None:
            return generalised_bce(
                h,
                target_Td,
                sample_Sd,
                target_T,
                sample_S,
                num_items=self._num_classes,
                calibration=self._loss.calibration,
                own=own,
            )
        log_expected_S = expected_S.log().to(h.dtype)
        own_row_BNd = None if own is None else vectors_of(own.ids_BN)
        return sampled_cross_entropy(
            h, target_Td, sample_Sd, target_T, sample_S, log_expected_S, own=own, own_row_BNd=own_row_BNd
        )


def estimated_loss(
    table: Table,
    negatives: Negatives,
    h_Td: Tensor,
    target_T: Tensor,
    num_targets: int,
    *,
    own: OwnBonus | None,
    generator: torch.Generator | None,
    transform: Transform | None,
) -> CatalogueLoss:
    """`Table.catalogue_loss` from rows that are looked up, whose gradient is pushed or returned."""
    h = h_Td.detach().requires_grad_()
    bonus = None
    if own is not None:
        bonus = own.bonus_TN.detach().requires_grad_()
        own = replace(own, bonus_TN=bonus)
    drawn = negatives.draw(generator)
    met = [] if own is None else [own.ids_BN.flatten()]
    ids = torch.unique(torch.cat([drawn[0], target_T, *met]))
    rows = table.lookup(ids)
    vectors = rows if transform is None else transform(ids, rows)
    leaf = vectors.detach().requires_grad_()
    loss = negatives.loss(h, leaf, ids, target_T, drawn, own) / num_targets
    loss.backward()  # type: ignore[no-untyped-call]
    assert h.grad is not None
    assert leaf.grad is not None
    scored = None
    if transform is None:
        table.push(ids, leaf.grad)
    else:
        scored = Scored(ids, rows, vectors, leaf.grad)
    return CatalogueLoss(loss.detach(), h.grad, None if bonus is None else bonus.grad, scored)

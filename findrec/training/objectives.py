"""What one microbatch contributes to a training step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from findrec.datasets.batch import Batch
from findrec.datasets.catalogue import ItemFeatures
from findrec.models.repeat import own_items
from findrec.tables.base import Table, Transform
from findrec.training.tower import Tower


@dataclass
class MicrobatchLoss:
    """Values of one microbatch for the log, detached."""

    cross_entropy: Tensor  # [] share of the step's mean token loss
    aux: dict[str, Tensor] = field(default_factory=dict)  # unweighted
    diagnostics: dict[str, float] = field(default_factory=dict)


def microbatch_seed(seed: int, step: int, microbatch: int) -> int:
    """The key of all randomness of a microbatch, whichever worker runs it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{microbatch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def microbatch_loss(
    tower: Tower,
    table: Table,
    batch: Batch,
    catalogue: ItemFeatures,
    *,
    num_targets: int,
    num_microbatches: int,
    seed: int,
) -> MicrobatchLoss:
    """Forward and backward of one microbatch: every asked-for position wants the item that follows it.

    Token losses are divided by `num_targets`, the count over the whole step on all workers; auxiliary
    terms, which see one microbatch, by `num_microbatches`. Gradients stay in the tower and the table.
    """
    torch.manual_seed(seed)
    rows_Ud = table.lookup(batch.ids)
    out = tower.forward(batch, rows_Ud, catalogue.features(batch.ids))
    own = weights_TR = None
    if out.repeat is not None:
        weights_TR = out.repeat.detach().requires_grad_()
        own = own_items(batch).bonus(weights_TR)
    loss = table.catalogue_loss(
        out.h,
        batch.target,
        num_targets,
        own=own,
        generator=torch.Generator().manual_seed(seed),
        transform=_content(tower, catalogue) if tower.model.content_scores else None,
    )
    surrogate = (out.h * loss.dh).sum()
    if own is not None and out.repeat is not None and weights_TR is not None:
        assert loss.dbonus is not None
        # From the wide bonuses back to R weights here, so that the surrogate makes nothing of their size.
        (dweights_TR,) = torch.autograd.grad(own.bonus_TN, weights_TR, loss.dbonus)
        surrogate = surrogate + (out.repeat * dweights_TR).sum()
    if loss.scored is not None:
        surrogate = surrogate + (loss.scored.vectors * loss.scored.gradient).sum()
    for term in out.aux.values():
        surrogate = surrogate + term.value / num_microbatches
    tower.backward(surrogate)
    assert rows_Ud.grad is not None
    table.push(batch.ids, rows_Ud.grad / tower.backward_factor)
    if loss.scored is not None:
        assert loss.scored.rows.grad is not None
        table.push(loss.scored.ids, loss.scored.rows.grad / tower.backward_factor)
    return MicrobatchLoss(
        cross_entropy=loss.loss,
        aux={name: term.reported / num_microbatches for name, term in out.aux.items()},
        diagnostics=out.diagnostics,
    )


def _content(tower: Tower, catalogue: ItemFeatures) -> Transform:
    """How the table's rows become the vectors that are scored, for a model that scores content."""

    def transform(ids: Tensor | range, rows: Tensor) -> Tensor:
        if isinstance(ids, range):
            return tower.item_transform(rows, catalogue.all_features(rows.device, ids))
        return tower.item_transform(rows, catalogue.features(ids))

    return transform

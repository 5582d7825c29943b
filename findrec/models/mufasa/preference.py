"""Losses beside the next-item prediction: preference alignment and consistency of content with rows.

Shape letters: T target positions, U distinct items of a batch, n sampled positions, m their distinct targets,
d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.devices import copy_to
from findrec.tables.initial_rows import TABLE_STD

MAX_POSITIONS = 1024  # target positions of a microbatch that are contrasted


def preference_loss(h_Td: Tensor, vectors_Ud: Tensor, batch: Batch, temperature: float) -> Tensor:
    """InfoNCE between user vectors and the vectors of the items that follow, by cosines.

    Negatives are the other distinct targets of the batch. An item that is the target of several positions is
    one class, so it is never its own negative, and it counts once however popular it is: this is the logQ
    correction with the frequencies in the batch. Targets that are in no history of the batch are left out.
    """
    place_T = torch.searchsorted(batch.ids, batch.target).clamp(max=len(batch.ids) - 1)
    use_n = ((batch.ids[place_T] == batch.target) & (batch.target > 0)).nonzero().squeeze(1)
    if len(use_n) > MAX_POSITIONS:
        use_n = use_n[copy_to(torch.randperm(len(use_n))[:MAX_POSITIONS], use_n.device)]
    place_m, class_n = torch.unique(place_T[use_n], return_inverse=True)
    if len(place_m) < 2:
        return (h_Td.sum() + vectors_Ud.sum()) * 0.0
    logit_nm = F.normalize(h_Td[use_n], dim=1) @ F.normalize(vectors_Ud[place_m], dim=1).t() / temperature
    return F.cross_entropy(logit_nm, class_n)


def consistency_loss(content_Ud: Tensor, rows_Ud: Tensor, present_U: Tensor) -> Tensor:
    """Mean of |W f - sg(e)|^2 over items with content and a row, in units of the initial variance of rows."""
    rows_Ud = rows_Ud.detach()
    use_U = present_U & rows_Ud.bool().any(1)
    distance_U = (content_Ud - rows_Ud).square().sum(1) / TABLE_STD**2
    return (distance_U * use_U).sum() / use_U.sum().clamp(min=1)

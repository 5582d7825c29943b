"""The altered views of items that FindRec is trained on: wrong content, content only, id only.

What is to be survived is trained: a share of the items of a microbatch has the content of another item, and
the gates are told which (`Views.true`). Others are shown without their row, as items without events are, or
without content. All draws come from torch's global generator on the CPU.

Shape letters: U distinct items of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from findrec.datasets.folder.features import ModalRows
from findrec.devices import copy_to
from findrec.models.findrec.config import ControlConfig


@dataclass(frozen=True)
class Views:
    """What is shown of the items of a microbatch."""

    source_U: Mapping[str, Tensor]  # by modality: index of the item whose content each item is shown with
    true_U: Mapping[str, Tensor]  # by modality: bool, whether that is its own
    row_U: Tensor  # bool, whether the row is shown
    content_U: Tensor  # bool, whether content is shown


def draw_views(features: Mapping[str, ModalRows], known_U: Tensor, config: ControlConfig) -> Views:
    """Draw what is shown; items without events (`known_U` false) or without content keep what they have."""
    num, device = len(known_U), known_U.device
    source_U, true_U = {}, {}
    altered = bool(torch.rand(()) < config.altered)
    for name in features:
        source = torch.arange(num)
        if altered:
            share = config.swapped * float(torch.rand(()))
            drawn = torch.randperm(num)[: int(share * num)]
            source[drawn] = drawn.roll(1)
        source_U[name] = copy_to(source, device)
        true_U[name] = source_U[name] == torch.arange(num, device=device)
    chance_U = copy_to(torch.rand(num), device)
    # Without its row an item must have content, also where it is shown with that of another.
    present_U = torch.stack(
        [rows.present & rows.present[source_U[name]] for name, rows in features.items()]
    ).any(0)
    return Views(
        source_U,
        true_U,
        row_U=known_U & ~((chance_U < config.hide_id) & present_U),
        content_U=~((chance_U > 1 - config.hide_content) & known_U),
    )

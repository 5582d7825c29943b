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
from findrec.devices import copy_all_to
from findrec.models.findrec.config import ControlConfig


@dataclass(frozen=True)
class Views:
    """What is shown of the items of a microbatch."""

    source_U: Mapping[str, Tensor]  # by modality: index of the item whose content each item is shown with
    true_U: Mapping[str, Tensor]  # by modality: bool, whether that is its own
    present_U: Mapping[str, Tensor]  # by modality: bool, whether it is shown with any
    row_U: Tensor  # bool, whether the row is shown
    content_U: Tensor  # bool, whether content is shown


def draw_views(features: Mapping[str, ModalRows], known_U: Tensor, config: ControlConfig) -> Views:
    """Draw what is shown; items without events (`known_U` false) or without content keep what they have."""
    num = len(known_U)
    drawn_U: dict[str, Tensor] = {}
    altered = bool(torch.rand(()) < config.altered)
    for name in features:
        source_U = torch.arange(num)
        if altered:
            share = config.swapped * float(torch.rand(()))
            swapped = torch.randperm(num)[: int(share * num)]
            source_U[swapped] = swapped.roll(1)
        drawn_U[_SOURCE + name], drawn_U[_TRUE + name] = source_U, source_U == torch.arange(num)
    chance_U = torch.rand(num)
    drawn_U[_HIDE_ROW] = chance_U < config.hide_id
    drawn_U[_HIDE_CONTENT] = chance_U > 1 - config.hide_content
    drawn_U = copy_all_to(drawn_U, known_U.device)
    source = {name: drawn_U[_SOURCE + name] for name in features}
    shown = {name: rows.present[source[name]] for name, rows in features.items()}
    # Without its row an item must have content, also where it is shown with that of another.
    both_U = torch.stack([rows.present & shown[name] for name, rows in features.items()]).any(0)
    content_U = ~(drawn_U[_HIDE_CONTENT] & known_U)
    return Views(
        source,
        {name: drawn_U[_TRUE + name] for name in features},
        {name: shown_U & content_U for name, shown_U in shown.items()},
        row_U=known_U & ~(drawn_U[_HIDE_ROW] & both_U),
        content_U=content_U,
    )


_SOURCE, _TRUE, _HIDE_ROW, _HIDE_CONTENT = "source ", "true ", "hide row", "hide content"

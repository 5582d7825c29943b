"""Measures what ids, content and memories contribute to the item vectors and to the output of a FindRec.

The share of a part of an item vector is its length relative to the sum of the lengths of all parts. The
effect of a modality is measured by occlusion (Zeiler & Fergus 2014, section 4.2): the same history is
processed with the modality marked as missing. To test whether gates carry information, they are exchanged
among the items of the history.

Shape letters: B users, L steps, T target positions, U distinct items, d width, E parts of item vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import Out
from findrec.models.capabilities import Explanation, occlude, random_cycle
from findrec.models.parts.layers import gather_positions

if TYPE_CHECKING:
    from findrec.models.findrec.model import FindRec


@torch.no_grad()
def explain(
    model: FindRec,
    batch: Batch,
    x_items: Tensor,
    features: Mapping[str, ModalRows],
    *,
    draws: int = 4,
    seed: int = 0,
) -> Explanation:
    """Run the model in evaluation mode over `batch`, 2 + modalities + `draws` times.

    Inputs are those of `FindRec.forward`. The gates of the result are the shares of the parts of the item at
    each target position, as those of one head. `draws` permutations of the items are drawn from `seed`; none
    for a single item or without learned gates. The mode of the model is restored. Raises `ValueError` for a
    model without modalities.
    """
    items, was_training = model.items, model.training
    if items is None:
        raise ValueError("this model was built without modalities, so there is nothing to explain")
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    try:
        whole: Out = model(batch, x_items, features)
        without, bare = occlude(model, batch, x_items, features)
        shuffled = []
        if items.gates is not None and len(batch.ids) > 2:
            for _ in range(draws):
                # The first of the distinct items is the padding, which keeps its place.
                order_U = torch.cat([torch.zeros(1).long(), 1 + random_cycle(len(batch.ids) - 1, generator)])
                shuffled.append(_with_gates(model, batch, x_items, features, order_U.to(x_items.device)))
    finally:
        model.train(was_training)
    shares_UE = item_shares(model, x_items, features)
    item_T = batch.index.flatten().index_select(0, batch.position)
    experts = ("id", *(f"{name}{kind}" for name in items.names for kind in ("", " remembered")))
    return Explanation(whole, shares_UE[item_T][:, None], experts, without, bare, shuffled)


def item_shares(model: FindRec, x_items: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
    """Shares `[U, E]` of the id, and of content and memory of each modality, in the vectors of items."""
    assert model.items is not None
    rows, latents = model.items.split(x_items), model.items.encode(features)
    _, weights = model.items(rows, latents, features)
    lengths = [torch.linalg.vector_norm(rows.id_nd, dim=1)]
    for name, latent_Ud in latents.items():
        gate_U = weights.gate_n[name]
        lengths.append(gate_U * torch.linalg.vector_norm(latent_Ud, dim=1))
        lengths.append((1 - gate_U) * torch.linalg.vector_norm(rows.memory_nd[name], dim=1))
    length_UE = torch.stack(lengths, dim=1)
    return length_UE / length_UE.sum(1, keepdim=True).clamp(min=1e-12)


def _with_gates(
    model: FindRec, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows], order_U: Tensor
) -> Out:
    """The output with the gates of the items exchanged."""
    assert model.items is not None
    rows, latents = model.items.split(x_items), model.items.encode(features)
    vectors_Ud, _ = model.items(rows, latents, features, order_n=order_U)
    stream_BLd = model.stream(model.inputs(batch, vectors_Ud))
    h_Td = model.finish(gather_positions(stream_BLd, batch), batch)
    return Out(h_Td, None if model.repeat_head is None else model.repeat_head(h_Td))

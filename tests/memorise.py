"""How well a model can memorise: its accuracy on random histories that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from small_models import make_model, row_width
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import SequenceModel
from findrec.models.configs import choose_model

NUM_ITEMS = 50


def hit_rate_of_memorised(
    tree: Mapping[str, Any], *, users: int = 100, length: int = 8, steps: int = 120, width: int = 12
) -> float:
    """HR@1 at the last event of `users` random histories after `steps` of training on all their events.

    The next item is random, so only the history as a whole tells it. Models with content get a random feature
    `text` of `width`. Training is a softmax over all items, by Adam, without the rest of the system.
    """
    config = choose_model({"dropout": 0.0, "repeat": False} | dict(tree))
    dims = {"text": width} if config.content else {}
    torch.manual_seed(0)
    model: SequenceModel = make_model(config, dims, max_length=length, num_items=NUM_ITEMS)
    text = torch.randn(NUM_ITEMS + 1, width)
    item = torch.randint(1, NUM_ITEMS + 1, (users, length + 1))
    time = torch.randint(1, 10_000, (users, length + 1)).cumsum(1)
    batch = Batch.build(
        item[:, :-1].contiguous(),
        torch.full((users,), length),
        torch.arange(users),
        torch.arange(users * length),
        item[:, 1:].flatten(),
        time=time[:, :-1].contiguous(),
        query_time=time[:, 1:].flatten(),
    )
    table = (0.2 * config.dim**-0.5 * torch.randn(NUM_ITEMS + 1, row_width(config, dims))).requires_grad_()
    optimizer = torch.optim.Adam([table, *model.parameters()], lr=1e-2)

    def features(ids: torch.Tensor) -> dict[str, ModalRows]:
        return {name: ModalRows(text[ids], ids > 0) for name in dims}

    def scores() -> torch.Tensor:
        h_Td = model(batch, table[batch.ids], features(batch.ids)).h
        return h_Td @ model.item_transform(table, features(torch.arange(NUM_ITEMS + 1)))[1:].t()

    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(scores(), batch.target - 1).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        best = scores().argmax(1).view(users, length)[:, -1] + 1
    return float((best == item[:, -1]).float().mean())

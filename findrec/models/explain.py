"""What routing and each modality did in a trained FindRec, measured without a change to the network.

Gates are read where the model makes them. What a modality did is found by occlusion (Zeiler & Fergus 2014,
section 4.2): the same history goes through once more with the modality marked missing at every item, and
whatever changes is owed to it. To see whether gates say anything about a position, they are dealt out anew
among the positions asked for: routing that carries information gets worse by that.

Shape letters: B users, L steps, T asked-for positions, U distinct items, H heads, E experts, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from findrec.datasets.batch import Batch, ModalRows
from findrec.models.base import Out
from findrec.models.findrec import FindRec
from findrec.ops.expert_routing import Routed


@dataclass(frozen=True)
class Explanation:
    """The model's output for one batch, and what it would have been."""

    whole: Out
    gates_THE: Tensor  # sum to 1 over experts; each head has experts of its own
    without: dict[str, Out]  # by modality: that one missing at every item
    bare: Out  # every modality missing
    shuffled: list[Out]  # gates dealt out anew; empty where there is nothing to deal out


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
    """Run the model as it evaluates over `batch`, 2 + modalities + `draws` times.

    Takes what `FindRec.forward` takes. `draws` permutations of the positions are drawn from `seed`; there are
    none for a single position or a model without a router. The model's mode is left as it was found.
    Raises `ValueError` for a model that has no modality and so routes nothing.
    """
    if model.control is None:
        raise ValueError("this model was built without any modality: it has no experts to explain")
    experts, was_training = model.control.experts, model.training
    generator = torch.Generator().manual_seed(seed)
    routed: list[Routed] = []
    model.eval()
    try:
        with _hooked(experts, lambda _module, _inputs, out: routed.append(out)):
            whole = model(batch, x_items, features)
        without = {name: model(batch, x_items, withhold(features, [name])) for name in model.encoders}
        bare = model(batch, x_items, withhold(features, list(model.encoders)))
        shuffled = []
        if experts.router is not None and len(batch.position) > 1:
            for _ in range(draws):
                order_T = _no_fixed_point(len(batch.position), generator).to(x_items.device)
                with _hooked(experts.router, lambda _module, _inputs, out, order=order_T: out[order]):
                    shuffled.append(model(batch, x_items, features))
    finally:
        model.train(was_training)
    (seen,) = routed
    return Explanation(whole, seen.gates_THE, without, bare, shuffled)


def withhold(features: Mapping[str, ModalRows], names: list[str]) -> dict[str, ModalRows]:
    """The same features with the modalities `names` missing at every item."""
    return {
        name: ModalRows(torch.zeros_like(rows.values), torch.zeros_like(rows.present))
        if name in names
        else rows
        for name, rows in features.items()
    }


def relative_change(whole: Out, other: Out) -> Tensor:
    """`[T]` how far each user vector moved: `|h - h'| / |h|`, 0 where nothing changed."""
    moved_T = torch.linalg.vector_norm(whole.h - other.h, dim=1)
    share_T: Tensor = moved_T / torch.linalg.vector_norm(whole.h, dim=1).clamp(min=1e-12)
    return share_T


def _no_fixed_point(count: int, generator: torch.Generator) -> Tensor:
    """A drawn order of `count` >= 2 things in which none keeps its place."""
    circle = torch.randperm(count, generator=generator)
    order = torch.empty_like(circle)
    order[circle] = circle.roll(1)
    return order


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

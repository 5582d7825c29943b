"""Measures the effect of routing and of each modality on the output of a trained FindRec.

Gates are captured by a hook. The effect of a modality is measured by occlusion (Zeiler & Fergus 2014, section
4.2): the same history is processed with the modality marked as missing. To test whether gates depend on the
position, they are permuted among the target positions, which makes informative routing worse.

Shape letters: B users, L steps, T target positions, U distinct items, H heads, E experts, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.capabilities import Explanation, occlude, random_cycle
from findrec.ops.expert_routing import Routed

if TYPE_CHECKING:
    from findrec.models.findrec_2025.model import FindRec2025


@torch.no_grad()
def explain(
    model: FindRec2025,
    batch: Batch,
    x_items: Tensor,
    features: Mapping[str, ModalRows],
    *,
    draws: int = 4,
    seed: int = 0,
) -> Explanation:
    """Run the model in evaluation mode over `batch`, 2 + modalities + `draws` times.

    Inputs are those of `FindRec2025.forward`. `draws` permutations of the positions are drawn from `seed`;
    none for a single position or a model without a router. The mode of the model is restored. Raises
    `ValueError` for a model without modalities, which has no routing.
    """
    if model.control is None:
        raise ValueError("this model was built without modalities, so it has no expert routing to explain")
    experts, was_training = model.control.experts, model.training
    generator = torch.Generator().manual_seed(seed)
    routed: list[Routed] = []
    model.eval()
    try:
        with _hooked(experts, lambda _module, _inputs, out: routed.append(out)):
            whole = model(batch, x_items, features)
        without, bare = occlude(model, batch, x_items, features)
        shuffled = []
        if experts.router is not None and len(batch.position) > 1:
            for _ in range(draws):
                order_T = random_cycle(len(batch.position), generator).to(x_items.device)
                with _hooked(experts.router, lambda _module, _inputs, out, order=order_T: out[order]):
                    shuffled.append(model(batch, x_items, features))
    finally:
        model.train(was_training)
    (routing,) = routed
    names = tuple(f"expert {e + 1}" for e in range(routing.gates_THE.shape[2]))
    return Explanation(whole, routing.gates_THE, names, without, bare, shuffled)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

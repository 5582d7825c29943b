"""The trained network (the tower) behind one small interface, with and without DeepSpeed.

The loop knows only `Tower`. `PlainTower` is the single-process reference: it needs no process group and
says what every distributed engine must reproduce. `findrec.cluster.engine` has the DeepSpeed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from findrec.config import OptimConfig
from findrec.datasets.batch import Batch, ModalRows
from findrec.models.base import Out, SequenceModel

MOMENTS = ("exp_avg", "exp_avg_sq")


class Tower(Protocol):
    """A model with its optimizer. Gradients of microbatches add up until `step`."""

    model: SequenceModel
    backward_factor: float  # what `backward` multiplies every gradient by on the way to the table rows

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """Run the model in whatever mode it is in."""

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """`SequenceModel.item_transform`; its graph goes into the same `backward` as the forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Backpropagate one microbatch's share of the step's loss."""

    def step(self, lr: float) -> float:
        """Clip, update all weights, clear gradients; returns the gradient norm before clipping."""

    def weights(self) -> dict[str, Tensor]:
        """All weights and buffers by name on every rank (a collective call)."""

    def whole_model(self) -> SequenceModel:
        """The model to evaluate with: `model`, or a copy where weights are split (a collective call)."""

    def moments(self) -> dict[str, Tensor]:
        """Optimizer moments `<parameter>.<moment>` on every rank (a collective call)."""

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int) -> None:
        """Take over the weights and moments of a checkpoint (a collective call)."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices only: biases, gains, scan parameters and single vectors are left alone."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.endswith("A_log")
        (rest if plain else decay).append(parameter)
    groups = [(decay, weight_decay), (rest, 0.0)]
    return [{"params": params, "weight_decay": wd, "lr": 0.0} for params, wd in groups if params]


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW whose learning rate the loop sets anew for every step."""
    groups = parameter_groups(model, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=1e-8, fused=True)


def set_lr(groups: Iterable[dict[str, object]], lr: float) -> None:
    """Give all parameter groups this step's learning rate."""
    for group in groups:
        group["lr"] = lr


class PlainTower:
    """One process, no DeepSpeed: the reference for every other engine."""

    backward_factor = 1.0

    def __init__(self, model: SequenceModel, optim: OptimConfig) -> None:
        self.model = model
        self._clip = optim.clip_tower
        self._optimizer = make_optimizer(model, optim)

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `Tower`."""
        out: Out = self.model(batch, x_items, features)
        return out

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `Tower`."""
        return self.model.item_transform(rows, features)

    def backward(self, loss: Tensor) -> None:
        """See `Tower`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        """See `Tower`."""
        limit = self._clip if self._clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        set_lr(self._optimizer.param_groups, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        """See `Tower`."""
        return dict(self.model.state_dict())

    def whole_model(self) -> SequenceModel:
        """See `Tower`."""
        return self.model

    def moments(self) -> dict[str, Tensor]:
        """See `Tower`."""
        state = self._optimizer.state
        return {
            f"{name}.{moment}": state[p][moment] if p in state else torch.zeros_like(p)
            for name, p in self.model.named_parameters()
            for moment in MOMENTS
        }

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Tower`."""
        self.model.load_state_dict(dict(weights))
        for name, p in self.model.named_parameters():
            self._optimizer.state[p] = {
                "step": torch.tensor(float(steps)),
                **{moment: moments[f"{name}.{moment}"].clone() for moment in MOMENTS},
            }

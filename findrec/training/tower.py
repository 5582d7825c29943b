"""The interface of the training engine that holds the model (the tower) and its optimizer.

`PlainTower` is the single-process reference: it needs no process group, and distributed engines must
reproduce its results. `findrec.cluster.zero.engine` implements the interface with DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from findrec.config import OptimConfig
from findrec.errors import FindRecError
from findrec.models.base import Microbatch, Model, StepLoss
from findrec.tables.view import Tables

OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq")
Shape = tuple[int, ...]


class Tower(Protocol):
    """A model with its optimizer. Gradients of microbatches are accumulated until `step`."""

    model: Model[Any]
    replicated: bool  # whether every worker holds all weights
    backward_factor: float  # the factor by which `backward` scales the gradients of table rows

    def loss(self, microbatch: Microbatch[Any], tables: Tables) -> StepLoss:
        """The model's loss of a microbatch (possibly a collective call)."""

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the loss of one microbatch."""

    def step(self, lr: float) -> float:
        """Clip gradients, update weights, reset gradients; returns the gradient norm before clipping."""

    def weights(self) -> dict[str, Tensor]:
        """All weights and buffers by name on every rank (a collective call)."""

    def whole_model(self) -> Model[Any]:
        """The model for evaluation: `model`, or a copy if its weights are sharded (a collective call)."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state `<parameter>.<name in OPTIMIZER_STATE>` on every rank (a collective call)."""

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], steps: int) -> None:
        """Load the weights and the optimizer state of a checkpoint (a collective call)."""


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise `FindRecError` if the names or shapes of saved `weights` are not those of `model`."""
    need = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, p in model.named_parameters(remove_duplicate=False):  # in ZeRO stage 3 they are split
        need[name] = tuple(getattr(p, "ds_shape", p.shape))
    if difference := shape_difference(need, {name: tuple(value.shape) for name, value in weights.items()}):
        raise FindRecError(
            f"{checkpoint} was saved by another model, or with other data or another data.max_length: "
            f"{difference}. Give this run another name (name=...), or pass --fresh to delete the old one"
        )


def shape_difference(need: Mapping[str, Shape], saved: Mapping[str, Shape]) -> str | None:
    """Describe the first weights that are missing or differ in shape; None if there are none."""
    for name in sorted(need.keys() | saved.keys()):
        if need.get(name) != saved.get(name):
            return (
                f"the weights {name!r} have the shape {saved.get(name)} there, but this run needs "
                f"{need.get(name)}"
            )
    return None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups with weight decay for matrices only, not for biases, gains and scan parameters."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        plain = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
        (rest if plain else decay).append(parameter)
    groups = [(decay, weight_decay), (rest, 0.0)]
    return [{"params": params, "weight_decay": wd, "lr": 0.0} for params, wd in groups if params]


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW; the learning rate is set before every step."""
    # A model may have no weights besides its tables; torch accepts an empty group, but not an empty list.
    groups = parameter_groups(model, optim.weight_decay) or [{"params": []}]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=1e-8, fused=True)


def zero_state(holder: Tensor, steps: int) -> dict[str, Tensor]:
    """The state of the fused AdamW for the weights `holder` after `steps` steps, with moments of zero.

    All of it is on the device of `holder`: on a GPU the fused kernel reads the number of steps there.
    """
    return {
        "step": torch.full((), float(steps), dtype=torch.float32, device=holder.device),
        **{moment: torch.zeros_like(holder) for moment in OPTIMIZER_STATE},
    }


def set_lr(groups: Iterable[dict[str, object]], lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in groups:
        group["lr"] = lr


class PlainTower:
    """One process, no DeepSpeed: the reference for every other engine."""

    replicated = True
    backward_factor = 1.0

    def __init__(self, model: Model[Any], optim: OptimConfig) -> None:
        self.model = model
        self._clip = optim.clip_tower
        self._optimizer = make_optimizer(model, optim)

    def loss(self, microbatch: Microbatch[Any], tables: Tables) -> StepLoss:
        """See `Tower`."""
        return self.model.loss(microbatch, tables)

    def backward(self, loss: Tensor) -> None:
        """See `Tower`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        """See `Tower`."""
        limit = self._clip if self._clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), limit)
        set_lr(self._optimizer.param_groups, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        """See `Tower`."""
        return dict(self.model.state_dict())

    def whole_model(self) -> Model[Any]:
        """See `Tower`."""
        return self.model

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Tower`."""
        state = self._optimizer.state
        return {
            f"{name}.{moment}": state[p][moment] if p in state else torch.zeros_like(p)
            for name, p in self.model.named_parameters()
            for moment in OPTIMIZER_STATE
        }

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], steps: int) -> None:
        """See `Tower`."""
        self.model.load_state_dict(dict(weights))
        for name, p in self.model.named_parameters():
            state = self._optimizer.state[p] = zero_state(p, steps)
            for moment in OPTIMIZER_STATE:
                state[moment].copy_(optimizer_state[f"{name}.{moment}"])

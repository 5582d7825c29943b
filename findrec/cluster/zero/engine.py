"""The tower under DeepSpeed, ZeRO stages 0 to 3.

DeepSpeed averages gradients over workers, but losses are already normalised by the whole step. So the loss of
each microbatch is multiplied by the number of workers before the backward pass, which the average undoes
(exactly for powers of two). Weights are set before `deepspeed.initialize`; those of a checkpoint, and its
optimizer state, are loaded by `findrec.cluster.zero.state`.

Stage 3 gathers a module's weights when that module is called and releases them after it. So the model's loss
is computed in one call of the engine, and a module that uses the weights of modules inside it without calling
them declares `uses_child_weights`. Modules return tensors or tuples of them, as DeepSpeed searches nothing
else to find where the backward pass begins.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from findrec.cluster.zero.config import deepspeed_config
from findrec.cluster.zero.deepspeed_patches import import_deepspeed
from findrec.cluster.zero.state import ZeroState
from findrec.config import OptimConfig
from findrec.models.base import Microbatch, Model, StepLoss
from findrec.tables.collectives import COLLECTIVES
from findrec.tables.view import Tables
from findrec.training.tower import make_optimizer, set_lr


class _Total(nn.Module):
    """Computes `StepLoss.total` as the output of a module, where stage 3 begins its backward pass.

    The other fields of the loss are in `parts`.
    """

    def __init__(self, model: Model[Any]) -> None:
        super().__init__()
        self.model = model
        self.parts: StepLoss | None = None

    def forward(self, microbatch: Microbatch[Any], tables: Tables) -> Tensor:
        """`StepLoss.total`."""
        self.parts = self.model.loss(microbatch, tables)
        return self.parts.total


class _Loss(nn.Module):
    """The module that the engine calls; it must not return a tensor, which the engine would scale."""

    def __init__(self, model: Model[Any]) -> None:
        super().__init__()
        self.total = _Total(model)

    def forward(self, microbatch: Microbatch[Any], tables: Tables) -> StepLoss:
        """See `Model.loss`."""
        total = self.total(microbatch, tables)
        parts, self.total.parts = self.total.parts, None
        assert parts is not None
        return replace(parts, total=total)


class DeepSpeedTower:
    """`Tower` under ZeRO; needs an initialised process group, of any size."""

    def __init__(
        self,
        model: Model[Any],
        optim: OptimConfig,
        *,
        stage: int,
        accumulation: int,
        device: torch.device,
        offload_optimizer: bool = False,
    ) -> None:
        """`accumulation` is the number of microbatches this worker runs in a step (K / W)."""
        deepspeed = import_deepspeed(device)
        self._stage = stage
        self.replicated = stage < 3
        # With sharded weights, evaluation uses a complete copy of the model.
        self._empty = copy.deepcopy(model).to("meta") if stage == 3 else None
        self.model = model.to(device)
        self._device = device
        self.backward_factor = float(dist.get_world_size())
        loss = _Loss(self.model)
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=loss,
            optimizer=make_optimizer(self.model, optim),
            config=deepspeed_config(
                optim, stage=stage, accumulation=accumulation, offload_optimizer=offload_optimizer
            ),
            dist_init_required=False,
        )
        if stage == 3:
            for parameter in self.model.parameters(recurse=False):  # `Model.loss` may use them directly
                deepspeed.zero.register_external_parameter(loss.total, parameter)
            for module in self.model.modules():
                if getattr(module, "uses_child_weights", False):
                    for parameter in module.parameters():
                        deepspeed.zero.register_external_parameter(module, parameter)
        self._state = ZeroState(self.model, self._optimizer, stage)

    def loss(self, microbatch: Microbatch[Any], tables: Tables) -> StepLoss:
        """See `Tower`."""
        gathers = COLLECTIVES.call("forward pass of the tower") if self._stage == 3 else nullcontext()
        with gathers:
            loss: StepLoss = self.engine(microbatch, tables)
        return loss

    def backward(self, loss: Tensor) -> None:
        """See `Tower`; the engine reduces gradients at each accumulation boundary."""
        with COLLECTIVES.call("backward pass of the tower"):
            self.engine.backward(loss * self.backward_factor, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the microbatch; `step` updates after the last one

    def step(self, lr: float) -> float:
        """See `Tower`."""
        set_lr(self._optimizer.param_groups, lr)
        norm = None
        if self._stage == 0:  # DeepSpeed does not return the norm it clips by
            norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        with COLLECTIVES.call("update of the tower"):
            self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0 if norm is None else norm)

    def weights(self) -> dict[str, Tensor]:
        """See `Tower`."""
        return self._state.weights()

    def whole_model(self) -> Model[Any]:
        """See `Tower`."""
        if self._empty is None:
            return self.model
        whole = copy.deepcopy(self._empty).to_empty(device=self._device)
        whole.load_state_dict(self.weights())
        # Buffers that are not in the state dict are complete on every worker.
        for target, source in zip(whole.buffers(), self.model.buffers(), strict=True):
            target.copy_(source)
        return whole

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Tower`."""
        return self._state.optimizer_state()

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], steps: int) -> None:
        """See `Tower`."""
        self._state.load(weights, optimizer_state, steps)

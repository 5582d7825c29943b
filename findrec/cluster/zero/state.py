"""Reads and writes the weights and optimizer state of a tower under any ZeRO stage, by parameter name.

This is the only module that accesses DeepSpeed's optimizer state; it is tested with DeepSpeed 0.19.8 (pinned
in constraints.txt). Where each stage keeps them:

| stage | weights                         | optimizer state                                                  |
|-------|---------------------------------|------------------------------------------------------------------|
| 0     | the parameters                  | torch's own, by parameter                                        |
| 1, 2  | the parameters, and a flat      | by flat shard: `safe_get_full_optimizer_state` collects a        |
|       | float32 copy of each shard      | parameter's parts                                                |
| 3     | shards `ds_tensor`, the flat    | by flat shard, as in 1 and 2                                     |
|       | float32 ones being the same     |                                                                  |
|       | memory unless offloaded         |                                                                  |

DeepSpeed's setters of a full value (`safe_set_full_...`) fail in stage 3 if a parameter's size is not
divisible by the number of workers; here each worker writes its padded shard instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from findrec.training.tower import OPTIMIZER_STATE, zero_state


class ZeroState:
    """Accesses the state of `model` in `zero`, the optimizer returned by `deepspeed.initialize`."""

    def __init__(self, model: nn.Module, zero: Any, stage: int) -> None:
        self._model, self._zero, self._stage = model, zero, stage

    def weights(self) -> dict[str, Tensor]:
        """The full `state_dict` on every worker (a collective call in stage 3)."""
        if self._stage < 3:
            return dict(self._model.state_dict())
        from deepspeed.utils import safe_get_full_fp32_param

        weights = dict(self._model.state_dict())  # keeps its order; buffers are never split
        for name, p in self._model.named_parameters():
            weights[name] = safe_get_full_fp32_param(p)
        return weights

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<parameter>.<name>` for each name in `OPTIMIZER_STATE`, on every worker (a collective call).

        Zeros before the first step.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer = self._zero if self._stage == 0 else self._zero.optimizer
        self._link()
        state = {}
        for name, p in self._model.named_parameters():
            for moment in OPTIMIZER_STATE:
                if not optimizer.state:
                    value = torch.zeros(getattr(p, "ds_shape", p.shape), device=p.device)
                elif self._stage == 0:
                    value = optimizer.state[p][moment]
                else:
                    value = safe_get_full_optimizer_state(p, moment)
                state[f"{name}.{moment}"] = value
        return state

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], steps: int) -> None:
        """Load full weights and optimizer state (a collective call in stage 3)."""
        self._make_state(steps)
        for name, p in self._model.named_parameters():
            kept = {moment: optimizer_state[f"{name}.{moment}"].to(p.device) for moment in OPTIMIZER_STATE}
            self._set(p, weights[name].to(p.device), kept)
        for name, buffer in self._model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    def _make_state(self, steps: int) -> None:
        """Create the optimizer state, as zeros, that DeepSpeed would create at its first step."""
        if self._stage == 0:
            optimizer, holders = self._zero, list(self._model.parameters())
        elif self._stage == 3:
            optimizer, holders = self._zero.optimizer, self._zero.fp32_partitioned_groups_flat
        else:
            optimizer, holders = self._zero.optimizer, self._zero.single_partition_of_fp32_groups
        for holder in holders:
            optimizer.state[holder] = zero_state(holder, steps)
        self._link()

    def _link(self) -> None:
        # Stages 1 and 2 link parameters to their optimizer state after the first step, when only the first
        # parameter group has any; link again so that every group is reachable.
        if self._stage in (1, 2) and self._zero.optimizer.state:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set(self, p: Any, value: Tensor, optimizer_state: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage == 3:
            with GatheredParameters([p], modifier_rank=0):  # the shards and the tensors that are not sharded
                if dist.get_rank() == 0:
                    p.copy_(value)
            safe_set_local_fp32_param(p, _local_shard(p, value))
            for moment, whole in optimizer_state.items():
                safe_set_local_optimizer_state(p, _local_shard(p, whole), moment)
            return
        p.copy_(value)
        if self._stage == 0:
            for moment, whole in optimizer_state.items():
                self._zero.state[p][moment].copy_(whole)
            return
        safe_set_full_fp32_param(p, value)
        for moment, whole in optimizer_state.items():
            safe_set_full_optimizer_state(p, whole, moment)


def _local_shard(p: Any, value: Tensor) -> Tensor:
    """This worker's shard of a full value, padded as in stage 3."""
    size = p.ds_tensor.numel()
    flat = value.flatten()
    start = size * dist.get_rank()
    shard = flat.new_zeros(size)
    values = flat[start : start + size]
    shard[: len(values)] = values
    return shard

"""Weights and optimizer moments of a tower under DeepSpeed, by parameter name, whatever the ZeRO stage.

The one place that touches DeepSpeed's optimizer state, tested with DeepSpeed 0.19.8 (pinned in
constraints.txt). Where a stage keeps them:

| stage | weights                         | moments                                                          |
|-------|---------------------------------|------------------------------------------------------------------|
| 0     | the parameters                  | torch's own, by parameter                                        |
| 1, 2  | the parameters, and a flat      | by flat shard: `safe_get_full_optimizer_state` collects a        |
|       | float32 copy of each shard      | parameter's parts                                                |
| 3     | shards `ds_tensor`, the flat    | by flat shard, as in 1 and 2                                     |
|       | float32 ones being the same     |                                                                  |
|       | memory unless offloaded         |                                                                  |

DeepSpeed's own setters of a whole value (`safe_set_full_...`) fail in stage 3 where the workers do not divide
a parameter's size; each worker writes its padded part here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from findrec.training.tower import MOMENTS


class ZeroState:
    """Reads and writes what `zero`, the optimizer `deepspeed.initialize` returned, holds of `model`."""

    def __init__(self, model: nn.Module, zero: Any, stage: int) -> None:
        self._model, self._zero, self._stage = model, zero, stage

    def weights(self) -> dict[str, Tensor]:
        """The whole `state_dict` on every worker (collective in stage 3)."""
        if self._stage < 3:
            return dict(self._model.state_dict())
        from deepspeed.utils import safe_get_full_fp32_param

        found = dict(self._model.state_dict())  # in its order; buffers are whole
        for name, p in self._model.named_parameters():
            found[name] = safe_get_full_fp32_param(p)
        return found

    def moments(self) -> dict[str, Tensor]:
        """`<parameter>.<moment>` on every worker (a collective); zeros before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer = self._zero if self._stage == 0 else self._zero.optimizer
        self._link()
        found = {}
        for name, p in self._model.named_parameters():
            for moment in MOMENTS:
                if not optimizer.state:
                    value = torch.zeros(getattr(p, "ds_shape", p.shape), device=p.device)
                elif self._stage == 0:
                    value = optimizer.state[p][moment]
                else:
                    value = safe_get_full_optimizer_state(p, moment)
                found[f"{name}.{moment}"] = value
        return found

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int) -> None:
        """Take over whole values (a collective in stage 3)."""
        self._make_state(steps)
        for name, p in self._model.named_parameters():
            kept = {moment: moments[f"{name}.{moment}"].to(p.device) for moment in MOMENTS}
            self._set(p, weights[name].to(p.device), kept)
        for name, buffer in self._model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    def _make_state(self, steps: int) -> None:
        """Zeros where DeepSpeed would make moments at its first step."""
        if self._stage == 0:
            optimizer, holders = self._zero, list(self._model.parameters())
        elif self._stage == 3:
            optimizer, holders = self._zero.optimizer, self._zero.fp32_partitioned_groups_flat
        else:
            optimizer, holders = self._zero.optimizer, self._zero.single_partition_of_fp32_groups
        for holder in holders:
            optimizer.state[holder] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(holder) for moment in MOMENTS},
            }
        self._link()

    def _link(self) -> None:
        # Stages 1 and 2 link parameters to their moments after the first step, but while only the first
        # parameter group has any; link anew so that every group is reachable.
        if self._stage in (1, 2) and self._zero.optimizer.state:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set(self, p: Any, value: Tensor, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage == 3:
            with GatheredParameters([p], modifier_rank=0):  # the shards, and what is whole on every worker
                if dist.get_rank() == 0:
                    p.copy_(value)
            safe_set_local_fp32_param(p, _own_part(p, value))
            for moment, whole in moments.items():
                safe_set_local_optimizer_state(p, _own_part(p, whole), moment)
            return
        p.copy_(value)
        if self._stage == 0:
            for moment, whole in moments.items():
                self._zero.state[p][moment].copy_(whole)
            return
        safe_set_full_fp32_param(p, value)
        for moment, whole in moments.items():
            safe_set_full_optimizer_state(p, whole, moment)


def _own_part(p: Any, value: Tensor) -> Tensor:
    """This worker's shard of a whole value, padded as stage 3 does."""
    size = p.ds_tensor.numel()
    flat = value.flatten()
    start = size * dist.get_rank()
    part = flat.new_zeros(size)
    mine = flat[start : start + size]
    part[: len(mine)] = mine
    return part

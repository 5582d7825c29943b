"""The restored optimizer state of each ZeRO stage is on the device of the tensors that hold the weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from findrec.cluster.zero.state import ZeroState
from findrec.config import OptimConfig
from findrec.training.tower import make_optimizer

HOLDERS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
HOLDERS[3] = "fp32_partitioned_groups_flat"


@pytest.mark.parametrize(
    ("stage", "offload"),
    [(0, False), *((stage, offload) for stage in (1, 2, 3) for offload in (False, True))],
)
def test_state_is_made_where_its_weights_are_held(stage: int, offload: bool) -> None:
    """On a GPU, or in host memory where the optimizer is offloaded; the devices are fake."""
    held_on = torch.device("cpu" if offload else "cuda:0")
    with FakeTensorMode():
        model = nn.ParameterList([torch.zeros(size, device="cuda:0") for size in (12, 3)])
        optimizer = make_optimizer(model, OptimConfig())
        zero: Any = optimizer
        if stage:
            holder = torch.zeros(15, device=held_on)
            zero = SimpleNamespace(optimizer=optimizer, _lazy_init_hp_params_optimizer_state=lambda: None)
            setattr(zero, HOLDERS[stage], [holder])
        ZeroState(model, zero, stage)._make_state(5)
    states = list(optimizer.state.values())
    assert len(states) == (1 if stage else 2)
    for state in states:
        assert {value.device for value in state.values()} == {held_on}
        assert state["step"].dtype == torch.float32

"""A restored optimizer is what the optimizer itself would have made, on the device of its weights.

On a fake CUDA device PyTorch computes shapes, types and devices only, and needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from findrec.config import OptimConfig
from findrec.training.tower import OPTIMIZER_STATE, PlainTower, make_optimizer, zero_state


@pytest.fixture
def fake_devices() -> Iterator[None]:
    with FakeTensorMode():
        yield


def linear(device: str) -> Any:
    """Weights and a bias; more of a model is not needed."""
    return nn.Linear(4, 3, device=device)


def kinds(state: dict[str, Tensor]) -> dict[str, tuple[torch.device, torch.dtype, torch.Size]]:
    return {name: (value.device, value.dtype, value.shape) for name, value in state.items()}


def own_state(weights: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps after its first step."""
    optimizer = make_optimizer(nn.ParameterList([weights]), OptimConfig())
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    return dict(optimizer.state[weights])


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_zero_state_is_like_the_state_of_the_optimizer(fake_devices: None, device: str) -> None:
    weights = nn.Parameter(torch.zeros(3, 4, device=device))
    assert kinds(zero_state(weights, 7)) == kinds(own_state(weights))


@pytest.mark.filterwarnings("ignore:.*is a no-op:UserWarning")
def test_a_loaded_tower_has_its_optimizer_on_the_device_of_the_weights() -> None:
    """On PyTorch's device without memory, from a checkpoint on the CPU."""
    tower = PlainTower(linear("meta"), OptimConfig())
    saved = {name: torch.zeros(p.shape) for name, p in tower.model.named_parameters()}
    moments = {f"{name}.{moment}": value for name, value in saved.items() for moment in OPTIMIZER_STATE}
    tower.load(saved, moments, 7)
    for p in tower.model.parameters():
        state = tower._optimizer.state[p]
        assert state.keys() == {"step", *OPTIMIZER_STATE}
        assert {value.device for value in state.values()} == {p.device}


def test_a_loaded_tower_has_the_saved_moments_and_steps() -> None:
    tower = PlainTower(linear("cpu"), OptimConfig())
    saved = {name: torch.randn(p.shape) for name, p in tower.model.named_parameters()}
    moments = {
        f"{name}.{moment}": torch.rand(p.shape) for name, p in saved.items() for moment in OPTIMIZER_STATE
    }
    tower.load(saved, moments, 7)
    assert all(torch.equal(value, moments[name]) for name, value in tower.optimizer_state().items())
    assert all(state["step"] == 7 for state in tower._optimizer.state.values())
    tower.optimizer_state()["weight.exp_avg"].zero_()
    assert moments["weight.exp_avg"].all(), "the tower keeps copies"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_loaded_tower_steps_on_a_gpu_as_on_the_cpu() -> None:
    saved = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    moments = {
        f"{name}.{moment}": torch.rand(p.shape) for name, p in saved.items() for moment in OPTIMIZER_STATE
    }
    results = []
    for device in ("cpu", "cuda"):
        tower = PlainTower(linear(device), OptimConfig())
        tower.load(saved, moments, 7)
        tower.model(torch.ones(2, 4, device=device)).square().sum().backward()
        tower.step(0.01)
        results.append([p.detach().cpu() for p in tower.model.parameters()])
    torch.testing.assert_close(results[1], results[0])

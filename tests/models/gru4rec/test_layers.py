"""The layers of GRU4Rec against the equations of its card, and one event at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from findrec.models.gru4rec.layers import GRULayers

DIM, HIDDEN, LENGTH = 6, 9, 13


def make_layers(hidden: int = HIDDEN, layers: int = 2, dropout: float = 0.0) -> GRULayers:
    torch.manual_seed(0)
    made = GRULayers(DIM, hidden, layers, dropout).double()
    for parameter in made.parameters():  # biases are zero at first
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def plain_gru(gru: nn.GRU, x_LI: Tensor) -> Tensor:
    """States `[L, H]` of one history, step by step."""
    w_r, w_z, w_n = gru.weight_ih_l0.chunk(3)
    u_r, u_z, u_n = gru.weight_hh_l0.chunk(3)
    b_r, b_z, b_n = gru.bias_ih_l0.chunk(3)
    c_r, c_z, c_n = gru.bias_hh_l0.chunk(3)
    state, states = torch.zeros(gru.hidden_size, dtype=x_LI.dtype), []
    for x in x_LI:
        reset = torch.sigmoid(w_r @ x + b_r + u_r @ state + c_r)
        update = torch.sigmoid(w_z @ x + b_z + u_z @ state + c_z)
        candidate = torch.tanh(w_n @ x + b_n + reset * (u_n @ state + c_n))
        state = (1 - update) * candidate + update * state
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("hidden", [DIM, HIDDEN])
def test_layers_are_those_of_the_equations(hidden: int) -> None:
    layers = make_layers(hidden)
    x_BLd = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    result = layers(x_BLd)
    assert (layers.project is None) == (hidden == DIM)
    for x_Ld, result_Ld in zip(x_BLd, result, strict=True):
        for gru in layers.grus:
            assert isinstance(gru, nn.GRU)
            x_Ld = plain_gru(gru, x_Ld)
        want = x_Ld if layers.project is None else layers.project(x_Ld)
        torch.testing.assert_close(result_Ld, want)


@pytest.mark.parametrize("split", [0, 1, 5])
def test_histories_can_be_continued_from_any_event_and_one_by_one(split: int) -> None:
    layers = make_layers().eval()
    x_BLd = torch.randn(4, LENGTH, DIM, dtype=torch.float64)
    want = layers(x_BLd)
    _, states = layers.prefill(x_BLd[:, :split], torch.full((4,), split))
    later, after = layers.prefill(x_BLd[:, split:], torch.full((4,), LENGTH - split), states)
    torch.testing.assert_close(later, want[:, split:])
    for step in range(split, LENGTH):
        y_Bd, states = layers.step(x_BLd[:, step], states)
        torch.testing.assert_close(y_Bd, want[:, step])
    torch.testing.assert_close(states, after)


def test_padding_does_not_reach_the_states() -> None:
    layers = make_layers().eval()
    x_BLd, length_B = torch.randn(3, LENGTH, DIM, dtype=torch.float64), torch.tensor([0, 4, LENGTH])
    _, together = layers.prefill(x_BLd, length_B)
    for b, length in enumerate(length_B.tolist()):
        _, alone = layers.prefill(x_BLd[b : b + 1, :length], length_B[b : b + 1])
        torch.testing.assert_close([state[b : b + 1] for state in together], alone)


def test_each_gate_begins_with_the_variance_of_its_own_matrix() -> None:
    torch.manual_seed(0)
    gru = GRULayers(200, 300, 1, 0.0).grus[0]
    assert isinstance(gru, nn.GRU)
    for weight, fans in ((gru.weight_ih_l0, 200 + 300), (gru.weight_hh_l0, 2 * 300)):
        for gate in weight.chunk(3):
            assert gate.var().item() == pytest.approx(2 / fans, rel=0.03)
    assert not gru.bias_ih_l0.any()
    assert not gru.bias_hh_l0.any()

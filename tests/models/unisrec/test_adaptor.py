"""The adaptor of UniSRec against its equation in plain float64, its noise, and missing features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from findrec.datasets.folder.features import ModalRows
from findrec.models.unisrec.adaptor import Adaptor
from findrec.tables.initial_rows import TABLE_STD

WIDTH, DIM, EXPERTS = 10, 6, 4


def make_adaptor(dropout: float = 0.0) -> Adaptor:
    torch.manual_seed(0)
    adaptor = Adaptor(WIDTH, DIM, EXPERTS, dropout).double()
    for parameter in adaptor.parameters():  # gates start even
        parameter.data += 0.3 * torch.randn_like(parameter)
    return adaptor


def make_rows(count: int = 7) -> ModalRows:
    return ModalRows(torch.randn(count, WIDTH, dtype=torch.float64) * 3 + 1, torch.arange(count) != 2)


def plain_adaptor(adaptor: Adaptor, values: Tensor) -> Tensor:
    """One item, one expert at a time, with the whitening as `(x - b) W`."""
    x = (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()
    power = torch.exp(adaptor.gate.weight @ x)
    total = torch.zeros(DIM, dtype=torch.float64)
    for k in range(EXPERTS):
        matrix = adaptor.experts.weight[k * DIM : (k + 1) * DIM]
        shift = -torch.linalg.pinv(matrix) @ adaptor.experts.bias[k * DIM : (k + 1) * DIM]
        total = total + power[k] / power.sum() * (matrix @ (x - shift))
    return total


@pytest.mark.parametrize("noisy", [False, True])
def test_the_adaptor_is_that_of_the_equation(noisy: bool) -> None:
    adaptor, rows = make_adaptor().eval(), make_rows()
    result = adaptor(rows, noisy=noisy)
    for values, present, vector in zip(rows.values, rows.present, result, strict=True):
        want = plain_adaptor(adaptor, values) if present else torch.zeros(DIM, dtype=torch.float64)
        torch.testing.assert_close(vector, want)


def test_noise_and_dropout_are_of_inputs_in_training_only() -> None:
    rows = make_rows()
    for dropout in (0.0, 0.5):
        adaptor = make_adaptor(dropout).train()
        plain = adaptor(rows)
        assert torch.equal(plain, adaptor(rows))
        noisy = [adaptor(rows, noisy=True) for _ in range(2)]
        assert not torch.allclose(noisy[0], noisy[1], atol=1e-3)
        assert not noisy[0][2].any()
        adaptor.eval()
        assert torch.equal(plain, adaptor(rows, noisy=True))


def test_the_noise_has_the_learned_size() -> None:
    """Noise so small that gates, and vectors, change in proportion to it."""
    adaptor, rows = make_adaptor().train(), make_rows(1)
    plain = adaptor(rows)

    def deviation(shift: float) -> float:
        adaptor.noise.weight.data.zero_()
        x = torch.nn.functional.layer_norm(rows.values, (WIDTH,))[0]
        adaptor.noise.weight.data += shift * x / x.square().sum()  # x W_n = shift
        torch.manual_seed(1)
        changes = [(adaptor(rows, noisy=True) - plain).detach() for _ in range(200)]
        return float(torch.stack(changes).std())

    want = torch.nn.functional.softplus(torch.tensor([-3.5, -2.5])) + 0.01
    assert deviation(-2.5) / deviation(-3.5) == pytest.approx(float(want[1] / want[0]), rel=0.03)


def test_vectors_start_as_large_as_rows_of_the_table() -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(300, 64, 8, 0.0)
    vectors = adaptor(ModalRows(5 * torch.randn(100, 300), torch.ones(100, dtype=torch.bool)))
    assert vectors.norm(dim=1).mean().item() == pytest.approx(TABLE_STD, rel=0.1)

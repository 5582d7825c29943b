"""Warm-up and decay of the learning rate."""

import itertools

import pytest

from findrec.config import OptimConfig
from findrec.training.schedule import learning_rate


def test_warms_up_linearly_and_decays_to_the_floor():
    optim = OptimConfig(lr=1.0, warmup=0.1, floor=0.05)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05, abs=2e-3)
    assert learning_rate(50, 100, OptimConfig(lr=1.0, schedule="constant")) == 1.0

"""The AUROC of gates is the probability that true content gets the larger log-odds."""

import importlib.util
from pathlib import Path

import torch

PROGRAM = Path(__file__).parents[2] / "evaluation" / "benchmarks" / "gates.py"


def test_auroc_is_the_share_of_ordered_pairs():
    spec = importlib.util.spec_from_file_location("gates", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    gates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gates)
    torch.manual_seed(0)
    true, wrong = torch.randint(0, 5, (40,)).float() + 1, torch.randint(0, 5, (30,)).float()
    pairs = true[:, None] - wrong[None]
    want = float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
    assert abs(gates.auroc(true, wrong) - want) < 1e-12

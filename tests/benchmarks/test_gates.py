"""The AUROC of gates is the probability that true content gets the larger log-odds."""

import torch
from bench.gates import auroc


def test_auroc_is_the_share_of_ordered_pairs():
    torch.manual_seed(0)
    true, wrong = torch.randint(0, 5, (40,)).float() + 1, torch.randint(0, 5, (30,)).float()
    pairs = true[:, None] - wrong[None]
    want = float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
    assert abs(auroc(true, wrong) - want) < 1e-6

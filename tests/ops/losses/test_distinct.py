"""Distinct random integers: distinct, repeatable, and every one equally likely at every place."""

import pytest
import torch

from findrec.ops.losses.distinct import distinct_integers


@pytest.mark.parametrize(("count", "num"), [(1, 1), (5, 9), (10, 0), (40, 10), (41, 10), (10**9, 2048)])
def test_integers_are_distinct_and_repeatable(count, num):
    drawn, again = (distinct_integers(count, num, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(drawn, again)
    assert drawn.dtype == torch.int64
    assert len(drawn.unique()) == len(drawn) == min(num, count)
    assert drawn.numel() == 0 or 0 <= int(drawn.min()) <= int(drawn.max()) < count


@pytest.mark.parametrize(("count", "num"), [(30, 7), (8, 7)])  # by rejection, by permutation
def test_every_integer_is_equally_likely_at_every_place(count, num):
    generator = torch.Generator().manual_seed(0)
    times = 20_000
    found = torch.zeros(num, count, dtype=torch.float64)
    for _ in range(times):
        found[torch.arange(num), distinct_integers(count, num, generator)] += 1
    expected = times / count
    assert (found - expected).abs().max() < 5 * expected**0.5

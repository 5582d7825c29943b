"""The measured implementations agree with the baseline, and rows include memory."""

from __future__ import annotations

import pytest
import torch
from bench.cross_entropy import BASELINE, bench_cross_entropy, loss_and_gradients


def test_implementations_agree() -> None:
    g = torch.Generator().manual_seed(0)
    h, table = (torch.randn(n, 8, generator=g).requires_grad_() for n in (60, 301))
    target = torch.randint(1, 301, (60,), generator=g)
    want = loss_and_gradients(BASELINE, h, table, target)
    for got, expected in zip(loss_and_gradients("tiled", h, table, target), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # More samples than items: the estimate is close, and its gradients point the same way.
    loss, *grads = loss_and_gradients("sampled", h, table, target)
    torch.testing.assert_close(loss, want[0], rtol=0.2, atol=0.0)
    for got, expected in zip(grads, want[1:], strict=True):
        assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.9


@pytest.mark.slow
def test_rows_and_their_memory() -> None:
    baseline, tiled, sampled = bench_cross_entropy([(512, 100_000, 32)], runs=1)
    assert [row.impl for row in (baseline, tiled, sampled)] == [BASELINE, "tiled", "sampled"]
    assert baseline.shape == tiled.shape == "T512 V100000 d32"
    assert baseline.ratio == 1.0
    assert min(tiled.ratio, sampled.ratio, tiled.median_s, sampled.median_s) > 0
    assert baseline.peak_bytes > 2 * 4 * 512 * 100_000  # the logits and their gradient at least
    # The gradient of the table, a tile of 32 MiB, and what the first call loads.
    assert tiled.peak_bytes < 4 * 32 * 100_000 + (32 << 20) + (40 << 20)

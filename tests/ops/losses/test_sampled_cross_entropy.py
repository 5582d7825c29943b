"""Losses against shared negatives: naive forms in float64, and the estimate against its expectation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.ops.losses.sampled_cross_entropy import generalised_bce, sampled_cross_entropy

NUM_ITEMS = 40


def make(num_tokens, dtype=torch.float64, repeat=False, scale=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, table = (
        (scale * torch.randn(n, 4, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
        for n in (num_tokens, NUM_ITEMS + 1)
    )
    target = torch.randint(1, NUM_ITEMS + 1, (num_tokens,), generator=g)
    if not repeat:
        return h, table, target, None
    row = torch.arange(num_tokens) * 2 // num_tokens
    ids = torch.stack([torch.randperm(NUM_ITEMS, generator=g)[:5] + 1 for _ in range(2)])
    ids[1, 2] = 0
    target[::3] = ids[row[::3], 0]  # some targets come again
    seen = (torch.rand(num_tokens, 5, generator=g) < 0.6) & (ids[row] != 0)
    bonus = torch.randn(num_tokens, 5, generator=g, dtype=torch.float64).to(dtype) * seen
    return h, table, target, RepeatBonus(ids, row, seen, bonus.requires_grad_())


def scores(h, table, repeat):
    logits = h @ table.t()
    return logits if repeat is None else logits.scatter_add(1, repeat.ids_BN[repeat.row_T], repeat.bonus_TN)


def sampled(h, table, target, sample, log_expected=None, repeat=None, **kwargs):
    candidate_rows = None if repeat is None else table[repeat.ids_BN]
    rows = table[target], table[sample]
    return sampled_cross_entropy(
        h, *rows, target, sample, log_expected, repeat=repeat, candidate_row_BNd=candidate_rows, **kwargs
    )


def gbce(h, table, target, sample, repeat=None, **kwargs):
    kwargs = {"num_items": NUM_ITEMS, **kwargs}
    return generalised_bce(h, table[target], table[sample], target, sample, repeat=repeat, **kwargs)


def one_by_one(function, h, repeat):
    """The sum of a loss over tokens, each alone, by plain loops."""
    total = 0.0
    for t in range(len(h)):
        candidate_ids = (
            set() if repeat is None else set(repeat.ids_BN[repeat.row_T[t]][repeat.seen_TN[t]].tolist())
        )
        total = total + function(t, candidate_ids)
    return total


def assert_same(loss, want, h, table, repeat):
    leaves = [h, table] + ([repeat.bonus_TN] if repeat is not None else [])
    torch.testing.assert_close(loss, want)
    grads, want_grads = (torch.autograd.grad(x, leaves) for x in (loss, want))
    for got, expected in zip(grads, want_grads, strict=True):
        free = 1.0 if got.shape == table.shape or got.shape == h.shape else repeat.seen_TN
        torch.testing.assert_close(got * free, expected * free)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 13])
@pytest.mark.parametrize("impl", ["reference", "tiled", "batched"])
def test_candidates_agree_with_a_naive_loop(impl, num_tokens, corrected, repeat):
    h, table, target, bonus = make(num_tokens, repeat=repeat)
    # Duplicates, the targets themselves and repeat candidates among the samples.
    sample = torch.cat([torch.tensor([1, 2, 2, 3, 7, 9, 30]), target, torch.tensor([5])])
    if repeat:
        sample = torch.cat([sample, bonus.ids_BN[:, :2].reshape(-1)])
    log_expected = torch.linspace(-1, 1, len(sample), dtype=torch.float64) if corrected else None
    s = scores(h, table, bonus)

    def naive(t, candidate_ids):
        exact = candidate_ids | {int(target[t])}
        z = sum(s[t, i].exp() for i in exact)
        for place, i in enumerate(sample.tolist()):
            if i not in exact:
                z = z + (s[t, i] - (log_expected[place] if corrected else 0.0)).exp()
        return z.log() - s[t, target[t]]

    want = one_by_one(naive, h, bonus)
    assert_same(sampled(h, table, target, sample, log_expected, bonus, impl=impl), want, h, table, bonus)


@pytest.mark.parametrize("impl", ["tiled", "batched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_samples", "tile_rows"),
    [(1, 1, 9), (17, 60, 17), (17, 33, 7), (17, 1, 1), (1000, 33, 300)],
)
def test_tiles_agree_with_the_reference(num_tokens, num_samples, tile_rows, corrected, repeat, dtype, impl):
    h, table, target, bonus = make(num_tokens, dtype, repeat=repeat)
    sample = torch.randint(1, NUM_ITEMS + 1, (num_samples,), generator=torch.Generator().manual_seed(4))
    log_expected = torch.linspace(-1, 1, num_samples, dtype=torch.float64) if corrected else None
    leaves = [h, table] + ([bonus.bonus_TN] if repeat else [])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    exact_own = bonus and RepeatBonus(bonus.ids_BN, bonus.row_T, bonus.seen_TN, exact[2])
    want = sampled(exact[0], exact[1], target, sample, log_expected, exact_own, impl="reference")
    width = num_samples + 1 + (5 if repeat else 0)
    tile_bytes = tile_rows * width * (8 if dtype == torch.float64 else 4)
    if log_expected is not None and dtype != torch.float64:
        log_expected = log_expected.float()
    found = sampled(h, table, target, sample, log_expected, bonus, impl=impl, tile_bytes=tile_bytes)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6
    )
    # Autograd adds the rows' gradients up in the type of the table.
    rtol = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for got, expected in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(want, exact), strict=True
    ):
        atol = rtol * float(expected.abs().max())
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("impl", ["tiled", "batched"])
def test_a_retained_graph_gives_the_same_gradients_twice(impl):
    h, table, target, repeat = make(13, repeat=True)
    repeat = replace(repeat, longest=9)  # of 7 and 6 tokens
    loss = sampled(h, table, target, torch.arange(1, 20), repeat=repeat, impl=impl)
    leaves = (h, table, repeat.bonus_TN)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    for once, again in zip(first, second, strict=True):
        torch.testing.assert_close(2 * once, again)


@pytest.mark.parametrize("repeat", [False, True])
def test_partition_function_is_unbiased(repeat):
    """The mean of exp(loss + s_target) over draws is the full partition function, to its standard error."""
    h, table, target, bonus = make(6, repeat=repeat, seed=3)
    g = torch.Generator().manual_seed(1)
    q = torch.rand(NUM_ITEMS + 1, generator=g, dtype=torch.float64) + 0.2
    q[0] = 0
    q /= q.sum()
    num_draws = 2000
    with torch.no_grad():
        s = scores(h, table, bonus)
        for t in (0, 5):
            one = None
            if repeat:
                row = bonus.row_T[t : t + 1]
                zero = torch.zeros(1, dtype=torch.int64)
                one = RepeatBonus(
                    bonus.ids_BN[row], zero, bonus.seen_TN[t : t + 1], bonus.bonus_TN[t : t + 1]
                )
            estimates = torch.empty(num_draws, dtype=torch.float64)
            for draw in range(num_draws):
                sample = torch.multinomial(q, 16, replacement=True, generator=g)
                log_expected = (16 * q[sample]).log()
                loss = sampled(h[t : t + 1], table, target[t : t + 1], sample, log_expected, one)
                estimates[draw] = (loss + s[t, target[t]]).exp()
            error = estimates.std() / num_draws**0.5
            full = s[t, 1:].exp().sum()
            assert error < 0.01 * full
            assert (estimates.mean() - full).abs() < 4 * error


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 13])
def test_gbce_agrees_with_its_published_form(num_tokens, calibration, repeat):
    h, table, target, bonus = make(num_tokens, repeat=repeat)
    sample = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(2))[:17] + 1
    alpha = 17 / (NUM_ITEMS - 1)
    beta = alpha * ((1 - 1 / alpha) * calibration + 1 / alpha)
    p = torch.sigmoid(scores(h, table, bonus))

    def naive(t, candidate_ids):
        others = [i for i in sample.tolist() if i != int(target[t])]
        logs = [torch.log(p[t, target[t]] ** beta)] + [torch.log(1 - p[t, i]) for i in others]
        return -sum(logs) / len(logs)

    want = one_by_one(naive, h, bonus)
    assert_same(gbce(h, table, target, sample, bonus, calibration=calibration), want, h, table, bonus)


def test_gbce_stays_finite_where_the_naive_form_does_not():
    h, table, target, _ = make(8, torch.float32, scale=20.0)
    sample = torch.arange(1, 30)
    loss = gbce(h, table, target, sample)
    p = torch.sigmoid(h @ table.t())
    assert (p == 1).any()
    assert (p == 0).any()  # log of either is infinite
    want = gbce(h.double(), table.double(), target, sample)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, table)))


def test_gbce_with_every_item_drawn_is_plain_binary_cross_entropy():
    h, table, target, _ = make(5)
    everything = torch.arange(1, NUM_ITEMS + 1)
    calibrated, plain = (gbce(h, table, target, everything, calibration=t) for t in (1.0, 0.0))
    assert calibrated == plain
    few = everything[:5]
    assert gbce(h, table, target, few, calibration=1.0) < gbce(h, table, target, few, calibration=0.0)


@pytest.mark.parametrize(
    "function", [sampled, partial(sampled, impl="batched"), partial(sampled, impl="reference"), gbce]
)
def test_gradcheck(function):
    h, table, target, repeat = make(4, repeat=True)
    sample = torch.tensor([1, 4, 8, 9, int(target[0]), int(repeat.ids_BN[0, 1])])

    def loss(h, table, bonus):
        again = RepeatBonus(repeat.ids_BN, repeat.row_T, repeat.seen_TN, bonus * repeat.seen_TN)
        return function(h, table, target, sample, repeat=again)

    assert torch.autograd.gradcheck(loss, (h, table, repeat.bonus_TN))


def test_wrong_arguments_are_explained():
    h, table, target, repeat = make(4, repeat=True)
    sample = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"calibration=1\.5 must lie in 0\.\.1"):
        gbce(h, table, target, sample, calibration=1.5)
    with pytest.raises(ValueError, match="must be given together"):
        sampled_cross_entropy(h, table[target], table[sample], target, sample, repeat=repeat)
    with pytest.raises(ValueError, match="impl='plain' is unknown"):
        sampled(h, table, target, sample, impl="plain")
    with pytest.raises(ValueError, match="only impl='reference' gives it a gradient"):
        sampled(h, table, target, sample, torch.zeros(2, requires_grad=True))

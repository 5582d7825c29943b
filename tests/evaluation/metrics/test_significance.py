"""The bootstrap agrees with plain loops, covers simulated truth; Holm agrees with the closure."""

from __future__ import annotations

import math
from itertools import chain, combinations

import numpy as np
import pytest

from findrec.evaluation.metrics import significance
from findrec.evaluation.metrics.significance import compare_models, holm, resampled_means


def slow_means(values_UN: np.ndarray, resamples: int, seed: int) -> list[list[float]]:
    """The definition, one resample after the other, sums without rounding."""
    rng, num_users = np.random.default_rng(seed), len(values_UN)
    means = []
    for _ in range(resamples):
        drawn = values_UN[rng.integers(num_users, size=num_users)]
        means.append([math.fsum(column.tolist()) / num_users for column in drawn.T])
    return means


def slow_quantile(values: list[float], q: float) -> float:
    """Between the two nearest order statistics, in proportion."""
    ordered, position = sorted(values), q * (len(values) - 1)
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@pytest.mark.parametrize("num_users", [1, 2, 17, 400])
@pytest.mark.parametrize("num_columns", [1, 3, 7])
def test_means_agree_with_plain_loops(num_users: int, num_columns: int) -> None:
    values = np.random.default_rng(num_users).standard_normal((num_users, num_columns))
    means = resampled_means(values, 150, seed=5)
    assert means.shape == (150, num_columns)
    np.testing.assert_allclose(means, slow_means(values, 150, seed=5), rtol=0, atol=1e-14)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2, (33, 2)).astype(float)  # sums of 0 and 1 are exact
    whole = resampled_means(values, 500, seed=1)
    for rows in (1, 7, 499):
        monkeypatch.setattr(significance, "_BLOCK_BYTES", 24 * 33 * rows)
        assert np.array_equal(resampled_means(values, 500, seed=1), whole)
    assert not np.array_equal(resampled_means(values, 500, seed=2), whole)


@pytest.mark.parametrize("several", [False, True], ids=["one target a user", "several"])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_comparison_agrees_with_plain_loops(several: bool, level: float) -> None:
    rng = np.random.default_rng(3)
    user = np.sort(rng.integers(0, 50, 120)) if several else np.arange(120)
    better = rng.random(120)
    cases = {
        "m": {"a": better, "b": better * 0.97, "c": rng.random(120)},
        "rank": {"a": np.floor(1e5 * better), "b": np.floor(9e4 * better), "c": np.floor(1e5 * better)},
    }
    comparison = compare_models(cases, user if several else None, resamples=300, seed=9, level=level)

    distinct = sorted(set(user.tolist()))
    assert comparison.users == len(distinct)
    names = [(metric, model) for metric in cases for model in cases[metric]]
    mean_of = {
        name: [math.fsum(cases[name[0]][name[1]][user == u].tolist()) / (user == u).sum() for u in distinct]
        for name in names
    }
    means = np.array(slow_means(np.array([mean_of[name] for name in names]).T, 300, seed=9))
    ends = ((1 - level) / 2, (1 + level) / 2)
    for n, (estimate, name) in enumerate(zip(comparison.estimates, names, strict=True)):
        assert (estimate.metric, estimate.model) == name
        wanted = [math.fsum(mean_of[name]) / len(distinct)]
        wanted += [slow_quantile(means[:, n].tolist(), q) for q in ends]
        assert [estimate.value, estimate.low, estimate.high] == pytest.approx(wanted, rel=1e-12)
    pairs = [(metric, *pair) for metric in cases for pair in combinations(cases[metric], 2)]
    raw = []
    for difference, (metric, first, second) in zip(comparison.differences, pairs, strict=True):
        assert (difference.metric, difference.first, difference.second) == (metric, first, second)
        ours, other = mean_of[metric, first], mean_of[metric, second]
        per_user = [x - y for x, y in zip(ours, other, strict=True)]
        per_resample = [
            row[names.index((metric, first))] - row[names.index((metric, second))] for row in means.tolist()
        ]
        if ours == other:
            per_resample = [0.0] * 300
        wanted = [math.fsum(per_user) / len(distinct)] + [slow_quantile(per_resample, q) for q in ends]
        assert [difference.value, difference.low, difference.high] == pytest.approx(
            wanted, rel=1e-9, abs=1e-12
        )
        below, above = sum(d <= 0 for d in per_resample), sum(d >= 0 for d in per_resample)
        raw.append(min(1, 2 * (1 + min(below, above)) / 301))
        assert difference.p == pytest.approx(raw[-1], rel=1e-12)
    assert [d.p_holm for d in comparison.differences] == pytest.approx(holm(raw).tolist())
    assert 0 < sum(comparison.is_significant(d) for d in comparison.differences) < len(pairs)


def test_identical_models_have_no_difference() -> None:
    values = np.random.default_rng(0).random(301)
    others = {f"other {i}": np.random.default_rng(i).random(301) for i in range(1, 6)}
    comparison = compare_models({"m": {"a": values, **others, "b": values.copy()}}, resamples=1000)
    (same,) = [d for d in comparison.differences if (d.first, d.second) == ("a", "b")]
    assert (same.value, same.low, same.high, same.p, same.p_holm) == (0, 0, 0, 1, 1)
    assert same.effect is None
    assert not comparison.is_significant(same)


def test_a_constant_difference_is_exact() -> None:
    values = np.arange(64) / 64  # every sum and mean is exact in binary
    comparison = compare_models({"m": {"a": values + 0.25, "b": values}}, resamples=999)
    (lead,) = comparison.differences
    assert (lead.value, lead.low, lead.high) == (0.25, 0.25, 0.25)
    assert lead.p == lead.p_holm == 2 / 1000
    assert lead.effect is None  # no user differs from another
    assert comparison.is_significant(lead)


@pytest.mark.parametrize("num_differ", [2, 3, 5, 6, 9])
def test_few_users_are_not_significant(num_differ: int) -> None:
    values = np.zeros(30)
    values[:num_differ] = 1.0
    (lead,) = compare_models({"m": {"a": values, "b": np.zeros(30)}}, resamples=9999).differences
    assert lead.p >= 2.0 ** (1 - num_differ)
    (only,) = compare_models({"m": {"a": np.ones(num_differ), "b": np.zeros(num_differ)}}).differences
    assert only.p == max(2.0 ** (1 - num_differ), 2 / 10_001)


@pytest.mark.parametrize("seed", range(4))
def test_resamples_without_a_difference_count_for_both_sides(seed: int) -> None:
    """Few distinct values, so that many resamples draw the same ones of both: their sums must tie exactly."""
    rng = np.random.default_rng(seed)
    values = 1 / np.log2(1 + rng.integers(2, 4, (14, 2)))
    models = {"a": values[:, 0], "b": values[:, 1]}
    (comparison,) = compare_models({"m": models}, resamples=400).differences
    draws = np.random.default_rng(0)
    signs = []
    for _ in range(400):
        a, b = (sorted(column) for column in values[draws.integers(14, size=14)].T.tolist())
        signs.append(0 if a == b else 1 if math.fsum(a) > math.fsum(b) else -1)
    assert 10 < signs.count(0) < 200
    tail = signs.count(0) + min(signs.count(1), signs.count(-1))
    assert comparison.p == pytest.approx(min(1, 2 * (1 + tail) / 401))


def test_order_and_sign() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.random(60), rng.random(60)
    (one,) = compare_models({"m": {"a": a, "b": b}}, resamples=500).differences
    (other,) = compare_models({"m": {"b": b, "a": a}}, resamples=500).differences
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low), abs=1e-15)
    assert one.p == other.p
    assert one.effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1))


def test_interval_coverage_and_false_positive_rate() -> None:
    """400 simulated evaluations of 80 users; the standard error of the counted shares is about 1.1 %."""
    rng = np.random.default_rng(11)
    covered = false_claims = found_leads = 0
    for trial in range(400):
        hard = rng.exponential(size=80)  # what both models find hard: why pairing pays
        values = {name: hard + rng.exponential(0.3, 80) for name in "ab"} | {"c": hard + 0.4 + rng.random(80)}
        ab, ac, _ = compare_models({"m": values}, resamples=300, seed=trial).differences
        covered += ac.low <= 0.3 - 0.9 <= ac.high
        false_claims += ab.p < 0.05
        found_leads += ac.p_holm < 0.05
    assert 0.91 <= covered / 400 <= 0.98
    assert 0.02 <= false_claims / 400 <= 0.09
    assert found_leads == 400


def test_users_are_drawn_not_cases() -> None:
    """Ten targets a user that share most of their luck: intervals by cases would miss the truth often."""
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(40), 10)
    by_user = by_case = 0
    for trial in range(200):
        lead = np.repeat(rng.standard_normal(40), 10) + 0.2 * rng.standard_normal(400)
        values = {"m": {"a": lead, "b": np.zeros(400)}}
        (clustered,) = compare_models(values, user, resamples=200, seed=trial).differences
        (loose,) = compare_models(values, resamples=200, seed=trial).differences
        by_user += clustered.low <= 0 <= clustered.high
        by_case += loose.low <= 0 <= loose.high
    assert by_user / 200 > 0.88
    assert by_case / 200 < 0.6


def test_holm_is_the_closure_of_bonferroni() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 6):
        p = np.round(rng.random(size) ** 3, 2)  # with ties
        every = range(size)
        subsets = list(chain.from_iterable(combinations(every, n) for n in range(1, size + 1)))
        closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in every]
        assert holm(p).tolist() == pytest.approx(closed, abs=1e-15)
    assert holm([]).tolist() == []
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            holm([0.5, wrong])


def test_invalid_arguments_are_refused() -> None:
    good = np.ones(5)
    with pytest.raises(ValueError, match="same cases"):
        compare_models({"m": {"a": good, "b": np.ones(4)}})
    with pytest.raises(ValueError, match=r"m of b .*not finite"):
        compare_models({"m": {"a": good, "b": np.array([1, 2, np.nan, 4, 5])}})
    with pytest.raises(ValueError, match="5 values"):
        compare_models({"m": {"a": np.ones(6)}}, np.arange(5))
    for few in ({"a": np.ones(1)}, {}):
        with pytest.raises(ValueError, match="two users"):
            compare_models({"m": few})
    with pytest.raises(ValueError, match="100 or more"):
        compare_models({"m": {"a": good}}, resamples=99)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            compare_models({"m": {"a": good}}, level=level)


def test_a_reference_limits_the_pairs() -> None:
    """Fewer pairs, so Holm asks for less; everything else is as among all pairs."""
    rng = np.random.default_rng(3)
    values = {m: {name: rng.random(60) + 0.05 * n for n, name in enumerate("abcd")} for m in ("x", "y")}
    every, some = compare_models(values, resamples=500), compare_models(values, resamples=500, reference="b")
    assert [(d.metric, d.first, d.second) for d in some.differences] == [
        (metric, name, "b") for metric in ("x", "y") for name in "acd"
    ]
    assert some.estimates == every.estimates
    whole = {(d.metric, d.first, d.second): d for d in every.differences}
    for comparison in some.differences:
        sign = 1 if (comparison.metric, comparison.first, "b") in whole else -1
        other = whole[
            (comparison.metric, comparison.first, "b")
            if sign == 1
            else (comparison.metric, "b", comparison.first)
        ]
        assert comparison.value == sign * other.value
        assert comparison.p == other.p
        assert comparison.p_holm <= other.p_holm
    with pytest.raises(ValueError, match="reference model 'e' has no values"):
        compare_models(values, resamples=500, reference="e")

"""Significance of differences between models: a paired bootstrap over users with Holm's correction.

Users are drawn with replacement, with the same draws for all models and metrics (Efron & Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 13 and 16). With d_b the mean difference of resample b of R,
    interval = the (1 - level) / 2 and (1 + level) / 2 quantiles of d_b,
    p = min(1, 2 (1 + min(#{d_b <= 0}, #{d_b >= 0})) / (R + 1)),
so p is below 1 - level approximately if the interval excludes 0. With few users a bootstrap is too
optimistic, so p is at least 2^(1 - n), the minimum of an exact sign test if n users differ. Holm's step-down
correction (Scandinavian Journal of Statistics 6, 1979) bounds the probability of any false positive among all
comparisons by 1 - level. Variation between training seeds is not included.

Shape letters: C cases, U users, N models, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from findrec.evaluation.metrics.metrics import FloatArray, IntArray, user_means
from findrec.progress import progress

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST_RESAMPLES = 100
_BLOCK_BYTES = 64 << 20
_LONG = 10**9  # draws from which a progress bar is shown: about ten seconds on a core
_ROUNDING = 1e-13  # relative to the largest value: smaller resampled differences are rounding errors of 0


@dataclass(frozen=True)
class Estimate:
    """A model's mean over users and its interval."""

    metric: str
    model: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """`first` minus `second`: the mean over users, its interval and p-value."""

    metric: str
    first: str
    second: str
    value: float
    low: float
    high: float
    effect: float | None  # value / standard deviation over users; None if that is 0
    p: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """Estimates of all models by metric, in the given order, and the differences of all pairs."""

    users: int
    resamples: int
    seed: int
    level: float
    estimates: list[Estimate]
    differences: list[Difference]

    def is_significant(self, difference: Difference) -> bool:
        """Whether the difference is significant after Holm's correction."""
        return difference.p_holm < 1 - self.level


def compare_models(
    values: Mapping[str, Mapping[str, FloatArray]],
    user_C: IntArray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    reference: str | None = None,
) -> Comparison:
    """Compare models on the same cases by a paired bootstrap over users.

    Args:
        values: values `[C]` by metric and model, of the same cases in the same order.
        user_C: the user of each case; None: each case is a user. A user has the mean of its cases.
        resamples: number of bootstrap resamples R.
        seed: equal seeds give equal results.
        level: confidence level.
        reference: compare the other models with this one only; None: all pairs. Holm's correction covers all
            compared pairs of all metrics.

    Raises:
        ValueError: for values of different lengths or that are not finite, fewer than two users, fewer than
            100 resamples, a level outside (0, 1) or an unknown reference.
    """
    if not 0 < level < 1:
        raise ValueError(f"the confidence level must be between 0 and 1, not {level}")
    names = [(metric, model) for metric, by_model in values.items() for model in by_model]
    columns = [_user_values(values[metric][model], user_C, f"{metric} of {model}") for metric, model in names]
    sizes = {len(column) for column in columns}
    if len(sizes) > 1:
        raise ValueError(f"models must be compared on the same cases; they have {sorted(sizes)} users")
    if not columns or min(sizes) < 2:
        raise ValueError("a bootstrap needs at least one model and two users")
    values_UN = np.stack(columns, axis=1)
    means_RN = resampled_means(values_UN, resamples, seed)
    ends = ((1 - level) / 2, (1 + level) / 2)

    estimates, column = [], {}
    for n, (metric, model) in enumerate(names):
        column[metric, model] = n
        low, high = np.quantile(means_RN[:, n], ends)
        estimates.append(Estimate(metric, model, float(columns[n].mean()), float(low), float(high)))

    raw = []
    for metric, by_model in values.items():
        pairs = list(combinations(by_model, 2))
        if reference is not None:
            if reference not in by_model:
                raise ValueError(f"the reference model {reference!r} has no values of {metric}")
            pairs = [(name, reference) for name in by_model if name != reference]
        for first, second in pairs:
            i, j = column[metric, first], column[metric, second]
            d_U, d_R = columns[i] - columns[j], means_RN[:, i] - means_RN[:, j]
            rounding = _ROUNDING * max(np.abs(columns[i]).max(), np.abs(columns[j]).max())
            d_R[np.abs(d_R) <= rounding] = 0.0
            low, high = np.quantile(d_R, ends)
            mean, spread = float(d_U.mean()), float(d_U.std(ddof=1))
            effect = mean / spread if spread > rounding else None
            p = _p_value(d_R, int(np.count_nonzero(d_U)))
            raw.append((metric, first, second, mean, float(low), float(high), effect, p))
    adjusted = holm([row[-1] for row in raw])
    differences = [Difference(*row, p_holm=float(p)) for row, p in zip(raw, adjusted, strict=True)]
    return Comparison(len(values_UN), resamples, seed, level, estimates, differences)


def resampled_means(values_UN: FloatArray, resamples: int, seed: int = 0) -> FloatArray:
    """Means `[R, N]` of `values_UN` over users drawn with replacement, with the same draws for all columns.

    Resample b uses the b-th U numbers of `default_rng(seed).integers(U)`, independent of the block size.
    """
    if resamples < FEWEST_RESAMPLES:
        raise ValueError(f"{resamples} resamples are too few: use {FEWEST_RESAMPLES} or more")
    num_users = len(values_UN)
    blocks = []
    with progress("bootstrap", resamples, "resamples", show=resamples * num_users >= _LONG) as bar:
        for counts_BU in _draw_counts(num_users, resamples, seed):
            blocks.append(counts_BU @ values_UN)
            bar.advance(len(counts_BU))
    means: FloatArray = np.concatenate(blocks) / num_users
    return means


def _draw_counts(num_users: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield blocks `[resamples, U]` of how often each user is drawn, as factors of matrix products."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_BYTES // (24 * num_users))
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        drawn = rng.integers(num_users, size=(size, num_users))
        drawn += num_users * np.arange(size)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=size * num_users)
        yield counts.astype(np.float64).reshape(size, num_users)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm-adjusted p-values in the given order; raises `ValueError` for values outside [0, 1]."""
    p_values = np.asarray(p, dtype=np.float64).reshape(-1)
    if not np.all((p_values >= 0) & (p_values <= 1)):
        raise ValueError(f"p-values must be between 0 and 1, not {p_values.tolist()}")
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def resamples_needed(comparisons: int, level: float = LEVEL) -> int:
    """The fewest resamples with which one of so many differences can be significant."""
    return math.ceil(2 * comparisons / (1 - level))


def _user_values(values: FloatArray, user_C: IntArray | None, label: str) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or (user_C is not None and len(values) != len(user_C)):
        expected = "one value per case" if user_C is None else f"{len(user_C)} values"
        raise ValueError(f"{label} must have {expected}, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{label} has values that are not finite")
    return values if user_C is None else user_means(user_C, values)


def _p_value(d_R: FloatArray, num_differ: int) -> float:
    tail = min(int((d_R <= 0).sum()), int((d_R >= 0).sum()))
    least = math.ldexp(1.0, max(-1000, 1 - num_differ))
    return min(1.0, max(2 * (1 + tail) / (len(d_R) + 1), least))

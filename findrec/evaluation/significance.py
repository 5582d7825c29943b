"""Which differences between models are more than the luck of the users: a paired bootstrap and Holm's steps.

Users are drawn with replacement, all models and metrics with the same draws (Efron & Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 13 and 16). With d_b the mean difference of resample b of R,
    interval = the (1 - level) / 2 and (1 + level) / 2 quantiles of d_b,
    p = min(1, 2 (1 + min(#{d_b <= 0}, #{d_b >= 0})) / (R + 1)),
which is the interval read backwards: p falls below 1 - level about where the interval leaves 0. A bootstrap
of few users claims too much, so p never falls below 2^(1 - n), the least an exact sign test can give when n
users differ. Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979) then holds the
probability of one false claim or more, over everything compared, at 1 - level.

The models are taken as trained: what another training seed would change is not in these figures.

Shape letters: C cases, U users, N models, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from findrec.evaluation.metrics import FloatArray, IntArray, user_means
from findrec.progress import progress

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST_RESAMPLES = 100
_BLOCK_BYTES = 64 << 20
_LONG = 10**9  # draws worth a progress bar: about ten seconds on a core
_ROUNDING = 1e-13  # of the largest value: a resampled difference below it is a sum that should be 0


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
    """`first` minus `second`: the mean over users, its interval and how likely luck alone is."""

    metric: str
    first: str
    second: str
    value: float
    low: float
    high: float
    effect: float | None  # value / standard deviation over users; None when that is 0
    p: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """All models by metric, in the order given, and all pairs of them."""

    users: int
    resamples: int
    seed: int
    level: float
    estimates: list[Estimate]
    differences: list[Difference]

    def is_real(self, difference: Difference) -> bool:
        """Whether the difference holds after Holm's correction."""
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

    `values` holds `[C]` numbers by metric and model, of the same cases in the same order; `user_C` says whose
    they are (None: each case is a user). A user counts once, with the mean of its cases. Holm's correction is
    over all pairs of all metrics together; with `reference` the others are compared with that model alone.
    The same seed gives the same digits; beyond the values memory is 64 MB or a few numbers a user, whichever
    is more, and R numbers for each model and metric.

    Raises `ValueError` for values that differ in length or are not finite, for fewer than two users, fewer
    than 100 resamples, a level outside (0, 1) or a reference that is not among the models.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of the intervals must lie between 0 and 1, not at {level}")
    names = [(metric, model) for metric, by_model in values.items() for model in by_model]
    columns = [_users_of(values[metric][model], user_C, f"{metric} of {model}") for metric, model in names]
    sizes = {len(column) for column in columns}
    if len(sizes) > 1:
        raise ValueError(f"models can only be compared on the same cases; they have {sorted(sizes)} users")
    if not columns or min(sizes) < 2:
        raise ValueError("a bootstrap needs a model and two users or more")
    values_UN = np.stack(columns, axis=1)
    means_RN = resampled_means(values_UN, resamples, seed)
    ends = ((1 - level) / 2, (1 + level) / 2)

    estimates, place = [], {}
    for n, (metric, model) in enumerate(names):
        place[metric, model] = n
        low, high = np.quantile(means_RN[:, n], ends)
        estimates.append(Estimate(metric, model, float(columns[n].mean()), float(low), float(high)))

    raw = []
    for metric, by_model in values.items():
        pairs = list(combinations(by_model, 2))
        if reference is not None:
            if reference not in by_model:
                raise ValueError(f"there is no model {reference!r} of {metric} to compare the others with")
            pairs = [(name, reference) for name in by_model if name != reference]
        for first, second in pairs:
            i, j = place[metric, first], place[metric, second]
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
    """`[R, N]` means of `values_UN` over users drawn with replacement, the same draws for every column.

    Resample b draws the b-th U numbers of `default_rng(seed).integers(U)`, whatever the block size.
    """
    if resamples < FEWEST_RESAMPLES:
        raise ValueError(f"{resamples} resamples give no usable interval: take {FEWEST_RESAMPLES} or more")
    num_users = len(values_UN)
    blocks = []
    with progress("bootstrap", resamples, "resamples", show=resamples * num_users >= _LONG) as bar:
        for counts_BU in _draw_counts(num_users, resamples, seed):
            blocks.append(counts_BU @ values_UN)
            bar.advance(len(counts_BU))
    means: FloatArray = np.concatenate(blocks) / num_users
    return means


def _draw_counts(num_users: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each user is drawn, in blocks of resamples: sums over users are then matrix products."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_BYTES // (24 * num_users))
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        drawn = rng.integers(num_users, size=(size, num_users))
        drawn += num_users * np.arange(size)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=size * num_users)
        yield counts.astype(np.float64).reshape(size, num_users)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values, in the order given; raises `ValueError` for what is no probability."""
    given = np.asarray(p, dtype=np.float64).reshape(-1)
    if not np.all((given >= 0) & (given <= 1)):
        raise ValueError(f"p-values lie between 0 and 1; given: {given.tolist()}")
    order = np.argsort(given, kind="stable")
    stepped = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1))
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _users_of(values: FloatArray, user_C: IntArray | None, what: str) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or (user_C is not None and len(values) != len(user_C)):
        wanted = "one number a case" if user_C is None else f"{len(user_C)} numbers"
        raise ValueError(f"{what} must be {wanted}, not of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} holds values that are not finite")
    return values if user_C is None else user_means(user_C, values)


def _p_value(d_R: FloatArray, num_differ: int) -> float:
    tail = min(int((d_R <= 0).sum()), int((d_R >= 0).sum()))
    least = math.ldexp(1.0, max(-1000, 1 - num_differ))
    return min(1.0, max(2 * (1 + tail) / (len(d_R) + 1), least))

"""Altered inputs of robustness suites: item features, or the length of histories.

Each line is one model or baseline with its levels; its reference level is the plain evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from findrec.baseline_configs import BaselineConfig
from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.batches.evaluation import evaluated_users
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.baselines import make_baseline
from findrec.evaluation.scoring.load import load_scorer
from findrec.models.capabilities import LimitedHistory
from findrec.training.build import used_modalities
from findrec.training.runs import TrainingJob

Kind = Literal["noise", "missing", "length"]
KINDS: tuple[Kind, ...] = ("noise", "missing", "length")
SHARES = (0, 10, 20, 30, 50, 70, 100)  # % of the items
LENGTHS = (20, 50, 100, 200, 500, 1000, 2000, 4096)  # latest events
_SEED = 1000  # distinct from the seeds of data.feature_noise


@dataclass(frozen=True)
class Line:
    """One scorer at several levels."""

    model: str
    levels: tuple[int, ...]  # ascending
    reference: int  # the level of the plain evaluation
    draws: Callable[[int], int]  # number of draws at a level
    make: Callable[[int, int], tuple[Scorer, int]]  # (level, draw) -> scorer, history length of models


def longest_history(folder: DataFolder) -> int:
    """Length of the longest history before a test target."""
    return int(folder.test_start[evaluated_users(folder, "test")].max(initial=1))


def suite_lines(
    kind: Kind,
    config: RunConfig,
    jobs: Sequence[TrainingJob],
    folder: DataFolder,
    device: str,
    levels: Sequence[int],
    draws: int,
) -> Iterator[Line]:
    """Yield the lines of a suite, one loaded at a time, for the scorers that use the altered inputs."""
    for job in jobs:
        if kind == "length":
            yield _model_lengths(job, folder, device, levels)
        elif used_modalities(job.config, folder):
            yield _model_features(kind, job, folder, device, levels, draws)
    for baseline in (b for b in config.baselines if isinstance(b, BaselineConfig)):
        if kind == "length":
            yield _baseline_lengths(baseline, folder, levels)
        elif baseline.content:
            yield _baseline_features(kind, baseline, folder, levels, draws)


def _altered(kind: Kind, catalogue: Catalogue, level: int, draw: int) -> Catalogue:
    share = level / 100
    noise, missing = (share, 0.0) if kind == "noise" else (0.0, share)
    return catalogue.altered(noise=noise, missing=missing, seed=_SEED + draw)


def _feature_draws(kind: Kind, draws: int) -> Callable[[int], int]:
    """Number of draws by level: one if nothing is altered or everything is missing."""
    return lambda level: 1 if level == 0 or (kind, level) == ("missing", 100) else draws


def _model_features(
    kind: Kind, job: TrainingJob, folder: DataFolder, device: str, levels: Sequence[int], draws: int
) -> Line:
    scorer, length = load_scorer(job, folder, device), job.config.data.max_length

    def make(level: int, draw: int) -> tuple[Scorer, int]:
        catalogue = _altered(kind, scorer.catalogue, level, draw)
        return scorer.with_catalogue(catalogue), length

    return Line(job.name, _with(levels or SHARES, 0), 0, _feature_draws(kind, draws), make)


def _baseline_features(
    kind: Kind, config: BaselineConfig, folder: DataFolder, levels: Sequence[int], draws: int
) -> Line:
    catalogue = Catalogue(folder, config.content)

    def make(level: int, draw: int) -> tuple[Scorer, int]:
        return make_baseline(config, folder, catalogue=_altered(kind, catalogue, level, draw)), 1

    return Line(config.title, _with(levels or SHARES, 0), 0, _feature_draws(kind, draws), make)


def _model_lengths(job: TrainingJob, folder: DataFolder, device: str, levels: Sequence[int]) -> Line:
    scorer, trained = load_scorer(job, folder, device), job.config.data.max_length
    limit = scorer.model.longest_history if isinstance(scorer.model, LimitedHistory) else None
    longest = longest_history(folder)
    reference = min(trained, longest)
    wanted = levels or [*(n for n in LENGTHS if n < longest), min(longest, LENGTHS[-1])]
    kept = [n for n in wanted if limit is None or n <= limit]
    return Line(job.name, _with(kept, reference), reference, lambda _: 1, lambda level, _: (scorer, level))


def _baseline_lengths(config: BaselineConfig, folder: DataFolder, levels: Sequence[int]) -> Line:
    scorer, longest = make_baseline(config, folder), longest_history(folder)
    wanted = levels or [n for n in LENGTHS if n < longest]

    return Line(
        config.title,
        _with(wanted, longest),
        longest,
        draws=lambda _: 1,
        make=lambda level, _: (scorer.with_short_histories(level), 1),
    )


def _with(levels: Sequence[int], reference: int) -> tuple[int, ...]:
    return tuple(sorted({*levels, reference}))

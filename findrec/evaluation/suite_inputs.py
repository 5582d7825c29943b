"""What a robustness suite changes about a trained run: features of items, or how much of a history is shown.

Every line is one model or baseline with its levels; at its reference level it is exactly what the plain
evaluation ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from findrec.config import RunConfig
from findrec.datasets.batches import evaluated_users
from findrec.datasets.catalogue import Catalogue
from findrec.datasets.folder import DataFolder
from findrec.evaluation.baselines import make_baseline
from findrec.evaluation.load import load_scorer
from findrec.evaluation.scorers import (
    BlockScorer,
    ModelScorer,
    Queries,
    Scorer,
    TextKNN,
    UserBlock,
    VectorScorer,
)
from findrec.training.build import used_modalities
from findrec.training.runs import TRAINED_BASELINES, TrainingJob

Kind = Literal["noise", "missing", "length"]
KINDS: tuple[Kind, ...] = ("noise", "missing", "length")
SHARES = (0, 10, 20, 30, 50, 70, 100)  # % of the items
LENGTHS = (20, 50, 100, 200, 500, 1000, 2000, 4096)  # latest events
_SEED = 1000  # away from data.feature_noise, which is drawn from the seed of the training


@dataclass(frozen=True)
class Line:
    """One scorer at each level. `make(level, draw)` gives it with the events a model is shown then."""

    model: str
    levels: tuple[int, ...]  # ascending
    reference: int  # the level at which nothing differs from the plain evaluation
    draws: Callable[[int], int]  # how many draws tell something at a level
    make: Callable[[int, int], tuple[Scorer, int]]


def longest_history(folder: DataFolder) -> int:
    """Events of the longest history that a test target is ranked from."""
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
    """The lines of a suite, one loaded at a time; none where nothing in the run uses what is varied."""
    baselines = [name for name in config.evaluation.baselines if name not in TRAINED_BASELINES]
    for job in jobs:
        if kind == "length":
            yield _model_lengths(job, folder, device, levels)
        elif used_modalities(job.config, folder):
            yield _model_features(kind, job, folder, device, levels, draws)
    for name in baselines:
        if kind == "length":
            yield _baseline_lengths(name, folder, levels)
        elif name == "text_knn":
            yield _text_features(kind, folder, levels, draws)


def _altered(kind: Kind, catalogue: Catalogue, level: int, draw: int) -> Catalogue:
    share = level / 100
    noise, missing = (share, 0.0) if kind == "noise" else (0.0, share)
    return catalogue.altered(noise=noise, missing=missing, seed=_SEED + draw)


def _feature_draws(kind: Kind, draws: int) -> Callable[[int], int]:
    """Nothing altered, or everything gone, is the same whatever is drawn."""
    return lambda level: 1 if level == 0 or (kind, level) == ("missing", 100) else draws


def _model_features(
    kind: Kind, job: TrainingJob, folder: DataFolder, device: str, levels: Sequence[int], draws: int
) -> Line:
    scorer, shown = load_scorer(job, folder, device), job.config.data.max_length

    def make(level: int, draw: int) -> tuple[Scorer, int]:
        catalogue = _altered(kind, scorer.catalogue, level, draw)
        return ModelScorer(scorer.model, scorer.rows_Vd, catalogue, shown, device, job.name), shown

    return Line(job.name, _with(levels or SHARES, 0), 0, _feature_draws(kind, draws), make)


def _text_features(kind: Kind, folder: DataFolder, levels: Sequence[int], draws: int) -> Line:
    catalogue = Catalogue(folder, ["text"])

    def make(level: int, draw: int) -> tuple[Scorer, int]:
        return TextKNN(folder, catalogue=_altered(kind, catalogue, level, draw)), 1

    return Line("text_knn", _with(levels or SHARES, 0), 0, _feature_draws(kind, draws), make)


def _model_lengths(job: TrainingJob, folder: DataFolder, device: str, levels: Sequence[int]) -> Line:
    scorer, trained = load_scorer(job, folder, device), job.config.data.max_length
    model = job.config.model
    has_positions = model.name == "sasrec" or model.stream.kind == "transformer"  # and no more than it learnt
    longest = longest_history(folder)
    reference = min(trained, longest)
    wanted = levels or [*(n for n in LENGTHS if n < longest), min(longest, LENGTHS[-1])]
    kept = [n for n in wanted if not has_positions or n <= trained]
    return Line(job.name, _with(kept, reference), reference, lambda _: 1, lambda level, _: (scorer, level))


def _baseline_lengths(name: str, folder: DataFolder, levels: Sequence[int]) -> Line:
    scorer, longest = make_baseline(name, folder), longest_history(folder)
    wanted = levels or [n for n in LENGTHS if n < longest]

    def make(level: int, _: int) -> tuple[Scorer, int]:
        if isinstance(scorer, BlockScorer):
            return _ShortBlocks(scorer, level), 1
        return _ShortVectors(scorer, level), 1

    return Line(name, _with(wanted, longest), longest, lambda _: 1, make)


def _with(levels: Sequence[int], reference: int) -> tuple[int, ...]:
    return tuple(sorted({*levels, reference}))


class _ShortBlocks(BlockScorer):
    """A plain scorer that knows the last events of a history alone; the seen filter still knows all."""

    def __init__(self, scorer: BlockScorer, length: int) -> None:
        self.name, self.popularity = scorer.name, scorer.popularity
        self._scorer, self._length = scorer, length
        self._held: tuple[UserBlock, UserBlock] | None = None

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """See `BlockScorer`."""
        if self._held is None or self._held[0] is not block:  # a block is asked for range after range
            self._held = block, block.shortened(self._length)
        return self._scorer.score_block(self._held[1], lo, hi)


class _ShortVectors(VectorScorer):
    """The same for a scorer by vectors."""

    def __init__(self, scorer: VectorScorer, length: int) -> None:
        self.name, self.items_Vd = scorer.name, scorer.items_Vd
        self._scorer, self._length = scorer, length

    def queries(self, block: UserBlock) -> Queries:
        """See `VectorScorer`."""
        return self._scorer.queries(block.shortened(self._length))

"""Checks a leaderboard against its data before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from findrec.config import RunConfig
from findrec.datasets.folder.configured import data_folder_of
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.prepare.pipeline import open_or_prepare
from findrec.errors import FindRecError
from findrec.evaluation.check import check_baseline, check_run
from findrec.evaluation.leaderboard.config import Leaderboard, Run
from findrec.evaluation.metrics.metrics import reported
from findrec.evaluation.protocol import seen_filter
from findrec.evaluation.scoring.load import scorer_class
from findrec.progress import progress
from findrec.training.build import build_tower_model, table_shapes
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints
from findrec.training.runs import main_job, run_folder, training_jobs
from findrec.training.warm_start import find_warm_start


@dataclass(frozen=True)
class Checked:
    """The data of a leaderboard, and what is known of its models before they are trained.

    Attributes:
        folders: data folders by the label of the data set.
        weights: number of weights, with those of the tables, by the labels of data set and row.
    """

    folders: Mapping[str, DataFolder]
    weights: Mapping[tuple[str, str], int]


def check_leaderboard(leaderboard: Leaderboard) -> Checked:
    """Open all data sets, and check every row against them; a data set is prepared on first use.

    Raises `FindRecError` if a data set cannot be opened, a model cannot be trained or evaluated on it, or
    the lines of a table would not be comparable: other data, other candidates or another filter.
    """
    folders, weights = {}, {}
    for data, config in leaderboard.baselines.items():
        try:
            folders[data] = open_or_prepare(config.data)
        except FindRecError as error:
            raise FindRecError(
                f"the data set {data!r} of the leaderboard cannot be opened: {error}"
            ) from None
    cells = [(data, row) for data in folders for row in leaderboard.rows]
    with progress("checking the rows", len(cells), "rows", after_s=1.0) as bar:
        for data, row in cells:
            run, folder = leaderboard.of(data, row)[0], folders[data]  # other seeds change no shapes
            _check_comparable(run, leaderboard.baselines[data], folder)
            try:
                _check_run(run.config, folder, leaderboard.config.metrics)
            except FindRecError as error:
                raise FindRecError(f"row {row!r} on {data}: {error}") from None
            weights[data, row] = count_weights(run.config, folder)
            bar.advance()
    for folder in folders.values():
        for baseline in leaderboard.config.untrained:
            check_baseline(baseline, folder)
    return Checked(folders, weights)


def count_weights(config: RunConfig, folder: DataFolder) -> int:
    """The number of weights of the run's model, with those of its embedding tables."""
    job = main_job(config, Path())
    tower = sum(weight.numel() for weight in build_tower_model(job.config, folder).parameters())
    return tower + sum(shape.num_rows * shape.dim for shape in table_shapes(job.config, folder).values())


def _check_run(config: RunConfig, folder: DataFolder, metrics: list[str]) -> None:
    check_run(config, folder)
    for job in training_jobs(config, run_folder(config)):
        if not list_checkpoints(checkpoint_folder(job.folder)):
            find_warm_start(job.config, folder)
    limit = scorer_class(config.model).list_limit
    if unknown := [metric for metric in metrics if not reported(metric, limit)]:
        raise FindRecError(
            f"{config.model.title} lists {limit} items, so its {unknown[0]} is unknown: leave it out of "
            "`metrics`"
        )


def _check_comparable(run: Run, shared: RunConfig, folder: DataFolder) -> None:
    """Raise `FindRecError` if a row would be tested on other cases or candidates than the rest of a table."""

    def tested_on(config: RunConfig) -> dict[str, object]:
        return {
            "data": str(data_folder_of(config.data)),
            "evaluation.candidates": config.evaluation.candidates,
            "evaluation.mask_seen": seen_filter(config.evaluation.mask_seen, folder),
        }

    ours, others = tested_on(run.config), tested_on(shared)
    for key, value in ours.items():
        if value != others[key]:
            raise FindRecError(
                f"row {run.row!r} on {run.data}: {key} is {value!r}, but {others[key]!r} in the rest of the "
                "table, so the results could not be compared. Make it a data set of its own, under `data`"
            )

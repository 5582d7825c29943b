"""Checks a run against its data before anything is trained."""

from __future__ import annotations

from pathlib import Path

from findrec.baseline_configs import BaselineConfig
from findrec.config import RunConfig
from findrec.datasets.batches.evaluation import evaluation_blocks
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.candidates import Candidates, describe_rule
from findrec.evaluation.scoring.item_similarity import check_most_items
from findrec.evaluation.scoring.load import scorer_class
from findrec.training.build import build_tower_model, check_modalities, table_shapes
from findrec.training.runs import training_jobs


def check_run(config: RunConfig, folder: DataFolder) -> None:
    """Check that all models can be trained and evaluated on the data.

    Raises `FindRecError` if a model cannot be built for the data, a baseline needs missing features, the
    candidates are invalid, or no user can be tested. Each model is built once on the CPU, without its tables
    and without the checkpoints of earlier stages.
    """
    for job in training_jobs(config, Path()):
        build_tower_model(job.config, folder)
        table_shapes(job.config, folder)
        if job.ranked:
            scorer_class(job.config.model)
    for baseline in config.baselines:
        if isinstance(baseline, BaselineConfig):
            check_baseline(baseline, folder)
    check_test_split(config, folder)


def check_baseline(baseline: BaselineConfig, folder: DataFolder) -> None:
    """Raise `FindRecError` if a baseline needs features that the data lacks, or the data is too large."""
    check_modalities(baseline.content, folder, baseline.title)
    if baseline.most_items is not None:
        check_most_items(folder, baseline.most_items, baseline.title)


def check_test_split(config: RunConfig, folder: DataFolder) -> None:
    """Raise `FindRecError` if no user of the test split has a target among the candidates."""
    protocol = RankingProtocol.of(config, folder)
    candidates = Candidates.of(folder, protocol.candidates)
    for users in evaluation_blocks(folder, "test", protocol.users_per_block):
        if len(protocol.query(folder, "test", users, candidates).cases.target):
            return
    raise FindRecError(
        f"no user of {folder.path} can be tested: none has an event in the test split, one before it, and "
        f"a target among evaluation.candidates ({describe_rule(protocol.candidates)}). "
        "Prepare the data with a split that leaves test events, or change evaluation.candidates"
    )

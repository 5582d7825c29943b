"""A loader of windows that a test has cut and planned itself."""

from __future__ import annotations

from findrec.config import parse_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.examples import ExampleLoader
from findrec.datasets.batches.plan import EpochPlan, Windows
from findrec.datasets.batches.windows import WindowExamples
from findrec.datasets.folder.data_folder import DataFolder


def window_loader(
    folder: DataFolder,
    windows: Windows,
    plan: EpochPlan,
    *,
    rank: int,
    world: int,
    first_step: int = 0,
    shuffle_ties: bool = False,
) -> ExampleLoader[Batch]:
    """The loader of one of `world` ranks."""
    config = parse_config({"data": {"shuffle_ties": shuffle_ties}})
    source = WindowExamples(config, folder, windows)
    return ExampleLoader(source, plan, rank=rank, world=world, first_step=first_step)

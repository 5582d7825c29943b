"""Validation during training: exact full-catalogue ranks, distributed over the workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.metrics.metrics import Ranks, summarise
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.distributed import ShardedRowsTable, rank_split_sharded
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.load import make_scorer
from findrec.models.base import SequenceModel
from findrec.ops.precision import full_float32
from findrec.progress import say
from findrec.tables.base import ITEMS, Table
from findrec.tables.exchange import Shards
from findrec.training.tower import Tower
from findrec.training.worker import Worker


def validate(
    config: RunConfig,
    folder: DataFolder,
    tower: Tower,
    tables: Mapping[str, Table],
    catalogue: Catalogue,
    worker: Worker,
) -> dict[str, float]:
    """Exact full-catalogue metrics of the validation targets, equal on every rank."""
    with full_float32(worker.device):  # whatever precision the steps are trained in
        ranks = _rank(config, folder, tower, tables, catalogue, worker)
    protocol = RankingProtocol.of_validation(config, folder)
    row = summarise(_gather_ranks(ranks, folder, worker), folder, "valid", protocol, model=config.model.title)
    if worker.is_rank_zero:
        say(f"  validation: {describe_row(row)}")
    return row


def _rank(
    config: RunConfig,
    folder: DataFolder,
    tower: Tower,
    tables: Mapping[str, Table],
    catalogue: Catalogue,
    worker: Worker,
) -> Ranks:
    """The ranks of this worker's part of the targets."""
    model, table = tower.whole_model().eval(), tables.get(ITEMS)  # None: of an earlier stage
    protocol = RankingProtocol.of_validation(config, folder)
    if isinstance(table, ShardedRowsTable):
        assert isinstance(model, SequenceModel)
        return rank_split_sharded(model, table, catalogue, folder, "valid", protocol)
    weights = {name: each.weight for name, each in tables.items()}
    scorer = make_scorer(config, model, weights, catalogue, worker.device, config.model.title)
    return rank_split(scorer, folder, "valid", protocol, rank=worker.rank, world=worker.world)


def describe_row(row: Mapping[str, Any]) -> str:
    """Format validation metrics as the line that training prints."""
    return f"ndcg@10 {row['ndcg@10']:.4f}  recall@10 {row['recall@10']:.4f}"


def _gather_ranks(ranks: Ranks, folder: DataFolder, worker: Worker) -> Ranks:
    cases, shards = torch.from_numpy(ranks.to_array()).to(worker.device), Shards(folder.num_items + 1)
    (sizes,) = shards.lengths(len(cases), device=worker.device)
    return Ranks.concat([Ranks.from_array(shards.gather_uneven(cases, sizes).cpu().numpy())])

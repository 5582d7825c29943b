"""Validation inside training: exact full-catalogue ranks, shared out over the workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.catalogue import Catalogue
from findrec.datasets.folder import DataFolder
from findrec.evaluation.evaluate import Ranks, rank_split, summarise
from findrec.evaluation.metrics import seen_filter
from findrec.evaluation.scorers import ModelScorer
from findrec.evaluation.sharded import rank_split_sharded
from findrec.progress import say
from findrec.tables.base import Table
from findrec.tables.sharded_table import ShardedItemTable
from findrec.training.tower import Tower
from findrec.training.worker import Worker


def validate(
    config: RunConfig,
    folder: DataFolder,
    tower: Tower,
    table: Table,
    catalogue: Catalogue,
    worker: Worker,
) -> dict[str, float]:
    """Exact full-catalogue metrics on the validation targets; the same on every rank."""
    model = tower.whole_model().eval()
    how = ranking_settings(config, folder)
    if isinstance(table, ShardedItemTable):
        ranks = rank_split_sharded(model, table, catalogue, folder, "valid", **how)
    else:
        scorer = ModelScorer(
            model, table.weight, catalogue, max_length=config.data.max_length, device=worker.device
        )
        ranks = rank_split(scorer, folder, "valid", **how, rank=worker.rank, world=worker.world)
    row = validation_row(_gather_ranks(ranks, worker), config, folder)
    if worker.leads:
        say(f"  validation: {describe_row(row)}")
    return row


def ranking_settings(config: RunConfig, folder: DataFolder) -> dict[str, Any]:
    """The arguments of `rank_split` for a validation in training."""
    return {
        "users_per_block": config.evaluation.users_per_block,
        "max_length": config.data.max_length,
        "mask_seen": seen_filter(config.evaluation.mask_seen, folder),
        "candidates": config.evaluation.candidates,
        "sample": config.evaluation.valid_users,
    }


def validation_row(ranks: Ranks, config: RunConfig, folder: DataFolder) -> dict[str, Any]:
    """The metrics row of all workers' ranks."""
    return summarise(
        *(ranks, folder, "valid"),
        ks=[10],
        model=config.model.name,
        mask_seen=seen_filter(config.evaluation.mask_seen, folder),
        candidates=config.evaluation.candidates,
    )


def describe_row(row: Mapping[str, Any]) -> str:
    """The line that training shows of a validation."""
    return f"ndcg@10 {row['ndcg@10']:.4f}  recall@10 {row['recall@10']:.4f}"


def _gather_ranks(ranks: Ranks, worker: Worker) -> Ranks:
    if worker.world == 1:
        return ranks
    own = torch.from_numpy(ranks.to_array()).to(worker.device)
    sizes: list[Tensor] = [own.new_zeros(1) for _ in range(worker.world)]
    dist.all_gather(sizes, own.new_tensor([own.shape[0]]))
    longest = max(int(s) for s in sizes)
    padded = own.new_zeros(longest, own.shape[1])
    padded[: own.shape[0]] = own
    parts = [torch.empty_like(padded) for _ in range(worker.world)]
    dist.all_gather(parts, padded)
    kept = [part[: int(size)].cpu().numpy() for part, size in zip(parts, sizes, strict=True)]
    return Ranks.concat([Ranks.from_array(part) for part in kept])

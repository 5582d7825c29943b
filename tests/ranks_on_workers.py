"""What a worker does in the tests of ranks with a sharded table."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from planted import make_config

from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.distributed import rank_split_sharded
from findrec.tables.base import ITEMS
from findrec.training.build import build_catalogue, build_tables, build_tower_model

PROTOCOL = RankingProtocol(users_per_block=16, max_length=16, mask_seen=True)


def parts(folder, features, *, placement):
    """Model, table and catalogue, the same for every placement of the table."""
    config = make_config(table=placement)
    modalities = [] if features == "none" else "all"
    config = config.model_copy(update={"model": config.model.model_copy(update={"modalities": modalities})})
    torch.manual_seed(0)
    return (
        build_tower_model(config, folder).eval(),
        build_tables(config, folder)[ITEMS],
        build_catalogue(config, folder),
    )


def work(rank, world, meeting, folder, features, sample, out):
    """One worker: the ranks of its blocks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    folder = DataFolder.open(Path(folder))
    model, table, catalogue = parts(folder, features, placement="sharded")
    assert len(table.weight) < folder.num_items
    ranks = rank_split_sharded(
        model, table, catalogue, folder, "valid", replace(PROTOCOL, sample=sample), piece_rows=7
    )
    np.save(f"{out}.{rank}", ranks.to_array())
    dist.barrier()  # else the first to exit may take the others' gloo threads down
    dist.destroy_process_group()

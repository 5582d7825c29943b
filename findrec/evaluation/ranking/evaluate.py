"""Ranks splits with one or several scorers, and writes the result files.

Blocks of users are cut from the data alone and distributed over the workers, so results depend neither on the
number of workers nor on the tiles inside a block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from findrec.datasets.batches.evaluation import Part, evaluation_blocks
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.metrics.lists import list_metrics
from findrec.evaluation.metrics.metrics import Ranks, strata, summarise
from findrec.evaluation.metrics.sampled import pool_sizes, sampled_row
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.base import Query, Scorer
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.users import IntArray
from findrec.files import replacing

Rows = dict[str, list[dict[str, Any]]]  # metrics rows by split, and those under `strata` and `sampled`


def rank_split(
    scorer: Scorer,
    folder: DataFolder,
    split: Part,
    protocol: RankingProtocol,
    *,
    rank: int = 0,
    world: int = 1,
    list_k: int = 0,
) -> Ranks:
    """Rank every target of a split among the candidates of the protocol.

    Targets that are not on the protocol's allow-list are left out. Worker `rank` of `world` ranks every
    `world`-th block; join the parts with `Ranks.concat`. With `list_k`, each user's first `list_k` items, or
    as many as the scorer lists, are kept too.
    """
    users_per_block = scorer.block_size(protocol.users_per_block, folder.num_items)
    candidates = Candidates.of(folder, protocol.candidates)
    parts = []
    for users in evaluation_blocks(folder, split, users_per_block, protocol.sample)[rank::world]:
        query = protocol.query(folder, split, users, candidates)
        if len(query.cases.target):
            parts.append(_rank_query(scorer, query, list_k))
    return Ranks.concat(parts)


def _rank_query(scorer: Scorer, query: Query, list_k: int) -> Ranks:
    ranking, cases = scorer.rank(query), query.cases
    greater, equal = (count.cpu().numpy() for count in ranking.counts())
    lists = np.zeros((0, 0), dtype=np.int64)
    if list_k:
        ids, _ = ranking.top(list_k if scorer.list_limit is None else min(list_k, scorer.list_limit))
        lists = np.concatenate([query.block.user[:, None], ids.numpy()], axis=1)[np.unique(cases.row.numpy())]
    return Ranks(cases.user.numpy(), cases.target.numpy(), greater, equal, lists, scorer.list_limit)


class Ranked(NamedTuple):
    """Results of one or several scorers."""

    rows: Rows
    ranks: dict[tuple[str, str], Ranks]  # by (model, split)

    def add(self, other: Ranked) -> None:
        """Append other results."""
        for part, rows in other.rows.items():
            self.rows.setdefault(part, []).extend(rows)
        self.ranks.update(other.ranks)


def evaluate_scorers(
    scorers: Iterable[Scorer | Ranked],
    folder: DataFolder,
    protocol: RankingProtocol,
    *,
    splits: Sequence[Part] = ("valid", "test"),
    shards: int = 0,
    scratch: Path | None = None,
) -> Ranked:
    """Evaluate trained models and baselines.

    `scorers` may include earlier results; with a generator only one scorer is in memory at a time. Splits
    without targets are left out. With `shards`, item vectors are distributed over Ray workers through a file
    in `scratch`.

    Returns:
        The ranks, and the metrics rows by split, with the strata of the test split under `strata` and, if the
        protocol samples candidates, its sampled metrics under `sampled`.
    """
    results = Ranked({}, {})
    ranked_splits = [split for split in splits if evaluation_blocks(folder, split, protocol.users_per_block)]
    pool_C = None
    if protocol.sampled is not None and "test" in ranked_splits:
        pool_C = pool_sizes(folder, "test", protocol)
    for scorer in scorers:
        if isinstance(scorer, Ranked):
            results.add(scorer)
            continue
        with scorer.distributed(scratch, shards) as ranker:
            for split in ranked_splits:
                ranks = rank_split(ranker, folder, split, protocol, list_k=max(protocol.ks))
                if len(ranks.user):  # otherwise no target is on the allow-list
                    _add_rows(results, scorer.name, folder, split, protocol, ranks, pool_C)
    return results


def _add_rows(
    results: Ranked,
    model: str,
    folder: DataFolder,
    split: Part,
    protocol: RankingProtocol,
    ranks: Ranks,
    pool_C: IntArray | None,
) -> None:
    row = summarise(ranks, folder, split, protocol, model=model)
    results.rows.setdefault(split, []).append(row | list_metrics(ranks.lists, folder, protocol.ks))
    results.ranks[model, split] = ranks
    if split == "test":
        results.rows.setdefault("strata", []).extend(strata(ranks, folder, split, model=model))
        if pool_C is not None and ranks.limit is None:
            extra = sampled_row(ranks, folder, split, protocol, pool_C, model=model)
            results.rows.setdefault("sampled", []).append(extra)


def write_results(
    run_folder: Path,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    ranks: Mapping[tuple[str, str], Ranks],
    folder: DataFolder,
) -> None:
    """Write `metrics.json` (rows by split) and `ranks.parquet` (one row per case), each in one rename.

    The columns of `ranks.parquet` are model, split, user, target, greater, equal and rank; its metadata names
    the data. Equal results give equal bytes.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("model", "split")}
    for model, split in ranks:
        count = len(ranks[model, split].user)
        columns["model"] += [model] * count
        columns["split"] += [split] * count
    joined = {
        name: np.concatenate([getattr(part, name) for part in ranks.values()] or [np.zeros(0)])
        for name in ("user", "target", "greater", "equal", "rank")
    }
    table = pa.table(
        {**{k: pa.array(v, pa.string()).dictionary_encode() for k, v in columns.items()}, **joined}
    )
    table = table.replace_schema_metadata(
        {"findrec.data": folder.manifest.recipe, "findrec.events_sha256": folder.manifest.events_sha256}
    )
    with replacing(run_folder / "ranks.parquet") as part:
        pq.write_table(table, part)
    with replacing(run_folder / "metrics.json") as part:
        part.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")

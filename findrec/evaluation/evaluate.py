"""Exact ranks of a split for one scorer, all scorers of a run, and the files that hold the results.

Blocks of users are cut from the data alone and shared out over the workers, so neither the number of workers
nor the tiles inside a block can change a digit.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from findrec.datasets.batches import Part, evaluation_blocks
from findrec.datasets.folder import DataFolder
from findrec.evaluation.candidates import Candidates, Rule
from findrec.evaluation.lists import list_metrics
from findrec.evaluation.metrics import Ranks, describe_protocol, strata, summarise
from findrec.evaluation.sampled import pool_sizes, sampled_row
from findrec.evaluation.scorers import BlockScorer, Queries, Scorer, UserBlock, VectorScorer
from findrec.evaluation.shards import ShardedRows, sharded
from findrec.evaluation.topk import TopItems
from findrec.ops.counting import rank_dense
from findrec.ops.target_rank import target_rank

Rows = dict[str, list[dict[str, Any]]]  # metrics rows by split, and those under `strata` and `sampled`
_KEYS_AT_ONCE = (64 << 20) // 24 - 1  # what `rank_dense` holds in one tile

__all__ = [
    "Ranked",
    "Ranks",
    "describe_protocol",
    "evaluate_scorers",
    "rank_split",
    "strata",
    "summarise",
    "write_results",
]


def rank_split(
    scorer: Scorer,
    folder: DataFolder,
    split: Part,
    *,
    users_per_block: int,
    max_length: int,
    mask_seen: bool,
    rank: int = 0,
    world: int = 1,
    list_k: int = 0,
    candidates: Rule = "all",
    shards: ShardedRows | None = None,
    sample: int | None = None,
) -> Ranks:
    """Rank every target of `split` among the whole catalogue (padding excluded), or with `candidates`
    "available" among the items that were on offer at the target's time. With an allow-list among
    `candidates` targets that are not on it, and users who have no others, are left out.

    `max_length` cuts what a model is shown; plain scorers and the seen filter know whole histories.
    `mask_seen` takes the items of a user's history out of the running (never the target). Worker `rank` of
    `world` does every world-th block; join the parts with `Ranks.concat`. With `list_k` each user's first
    `list_k` items are kept too (for coverage). With `shards` (of a `VectorScorer`'s item vectors) other
    workers count and list; lists are then those of exact scores.
    """
    if isinstance(scorer, BlockScorer):  # few enough users to hold their keys for the whole catalogue
        users_per_block = max(1, min(users_per_block, _KEYS_AT_ONCE // folder.num_items))
    offer = Candidates.of(folder, candidates)
    top = TopItems(scorer, offer)
    parts = []
    for users in evaluation_blocks(folder, split, users_per_block, sample)[rank::world]:
        block = UserBlock.read(folder, split, users, max_length)
        parts.append(_rank_block(scorer, folder, block, mask_seen, list_k, top, offer, shards))
    return Ranks.concat(parts)


def _rank_block(
    scorer: Scorer,
    folder: DataFolder,
    block: UserBlock,
    mask_seen: bool,
    list_k: int,
    top: TopItems,
    offer: Candidates,
    shards: ShardedRows | None,
) -> Ranks:
    seen_BN = block.padded_items() if mask_seen else None
    cases, since_V = offer.asked(block.cases), offer.since_V
    if not len(cases.target):
        return Ranks.from_array(np.zeros((0, 4), dtype=np.int64))
    row_C, target_C = cases.row, cases.target
    time_C = None if since_V is None else cases.time
    queries = None
    if isinstance(scorer, VectorScorer):
        queries = scorer.queries(block) if shards is None else scorer.queries(block).cpu()
        device = queries.users_Bd.device
        counts = target_rank(
            queries.users_Bd,
            scorer.items_Vd if shards is None else shards,
            row_C.to(device),
            target_C.to(device),
            own_ids_BN=queries.own_ids_BN,
            own_bonus_BN=queries.own_bonus_BN,
            exclude_ids_BN=seen_BN.to(device) if seen_BN is not None else None,
            since_V=since_V.to(device) if since_V is not None else None,
            time_C=time_C.to(device) if time_C is not None else None,
        )
    else:
        plain = scorer
        counts = rank_dense(
            lambda lo, hi: plain.keys(block, lo, hi),
            folder.num_items,
            row_C,
            target_C,
            num_users=len(block.user),
            exclude_ids_BN=seen_BN,
            since_V=since_V,
            time_C=time_C,
        )
    lists = np.zeros((0, 0), dtype=np.int64)
    if list_k:
        if shards is not None and queries is not None:
            ids = _sharded_list(shards, queries, min(list_k, shards.num_items), seen_BN, offer, block)
        else:
            ids, _ = top.of(block, list_k, mask_seen=mask_seen, queries=queries)
        lists = np.concatenate([block.user[:, None], ids.numpy()], axis=1)[np.unique(row_C.numpy())]
    greater, equal = (count.cpu().numpy() for count in counts)
    return Ranks(cases.user.numpy(), target_C.numpy(), greater, equal, lists)


def _sharded_list(
    shards: ShardedRows, queries: Queries, k: int, seen_BN: Tensor | None, offer: Candidates, block: UserBlock
) -> Tensor:
    late = offer.late(block.cases, len(block.user))
    since_V, time_B = late if late is not None else (None, None)
    ids, _ = shards.top(
        queries.users_Bd,
        k,
        own_ids_BN=queries.own_ids_BN,
        own_bonus_BN=queries.own_bonus_BN,
        exclude_ids_BN=seen_BN,
        since_V=since_V,
        time_B=time_B,
    )
    return ids


class Ranked(NamedTuple):
    """What is to be shown of one scorer or of several."""

    rows: Rows
    ranks: dict[tuple[str, str], Ranks]  # by (model, split)

    def add(self, other: Ranked) -> None:
        """Put the results of others behind these."""
        for part, rows in other.rows.items():
            self.rows.setdefault(part, []).extend(rows)
        self.ranks.update(other.ranks)


def evaluate_scorers(
    scorers: Iterable[Scorer | Ranked],
    folder: DataFolder,
    *,
    splits: Sequence[Part] = ("valid", "test"),
    ks: Sequence[int] = (5, 10, 20, 50),
    users_per_block: int = 256,
    max_length: int = 200,
    mask_seen: bool = False,
    candidates: Rule = "all",
    sampled: int | None = None,
    shards: int = 0,
    scratch: Path | None = None,
) -> Ranked:
    """Evaluate trained models and baselines alike, in the order given (a generator fits one at a time); what
    was evaluated before is taken as it is.

    Returns the metrics rows by split (a split without targets is left out), the parts of the test split
    under `strata`, and the ranks: what `write_results` takes. With `sampled` also rows of the test split
    under `sampled`, as if targets had been ranked among so many drawn items: an extra. With `shards` item
    vectors are spread over so many Ray workers, by way of a file in `scratch`; block scorers stay here.
    """
    done = Ranked({}, {})
    rows = done.rows
    there = [split for split in splits if evaluation_blocks(folder, split, users_per_block)]
    pool_C = None
    if sampled is not None and "test" in there:
        pool_C = pool_sizes(
            *(folder, "test"), users_per_block=users_per_block, mask_seen=mask_seen, candidates=candidates
        )
    for scorer in scorers:
        if isinstance(scorer, Ranked):
            done.add(scorer)
            continue
        with contextlib.ExitStack() as stack:
            spread = None
            if shards and isinstance(scorer, VectorScorer):
                assert scratch is not None
                spread = stack.enter_context(sharded(scorer.items_Vd, scratch, shards))
            for split in there:
                found = rank_split(
                    scorer,
                    folder,
                    split,
                    users_per_block=users_per_block,
                    max_length=max_length,
                    mask_seen=mask_seen,
                    list_k=max(ks),
                    candidates=candidates,
                    shards=spread,
                )
                if not len(found.user):  # no target is on the allow-list
                    continue
                how: Any = {"ks": ks, "model": scorer.name, "mask_seen": mask_seen, "candidates": candidates}
                row = summarise(found, folder, split, **how) | list_metrics(found.lists, folder, ks)
                rows.setdefault(split, []).append(row)
                done.ranks[scorer.name, split] = found
                if split == "test":
                    rows.setdefault("strata", []).extend(strata(found, folder, split, model=scorer.name))
                    if sampled is not None and pool_C is not None:
                        extra = sampled_row(found, folder, split, pool_C, sampled, **how)
                        rows.setdefault("sampled", []).append(extra)
    return done


def write_results(
    run_folder: Path,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    ranks: Mapping[tuple[str, str], Ranks],
    folder: DataFolder,
) -> None:
    """Write `metrics.json` (rows by split) and `ranks.parquet` (one line a case), each in one rename.

    Columns of the latter: model, split, user, target, greater, equal, rank; its metadata name the data. Both
    files hold nothing but results, so that the same results give the same bytes.
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
    temporary = run_folder / f".ranks.parquet.{os.getpid()}"
    pq.write_table(table, temporary)
    temporary.replace(run_folder / "ranks.parquet")
    temporary = run_folder / f".metrics.json.{os.getpid()}"
    temporary.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(run_folder / "metrics.json")

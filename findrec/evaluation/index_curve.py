"""What each index of a run costs and finds: recall against exact search, rate, latency, memory.

Queries are users of the test split as the run's model sees them, lists are made as they would be served:
bonuses of own items, seen filter and items on offer included, by the run's own protocol. The time the model
takes for a user vector is not counted. `recall` is the share of the exact list that an index's list holds, a
mean over users. Rates are medians of runs that alternate over the settings of one index, in blocks of
users; latencies those of users who come one at a time.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from findrec.bench.timer import time_alternating
from findrec.config import RunConfig
from findrec.datasets.batches import evaluated_users
from findrec.datasets.folder import DataFolder
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.candidates import Candidates
from findrec.evaluation.index import Gpus, ItemIndex, build_index, choose_gpus, need_faiss
from findrec.evaluation.index_store import (
    IndexMark,
    index_folder,
    keep_setting,
    load_index,
    read_mark,
    save_index,
)
from findrec.evaluation.metrics import describe_protocol, seen_filter
from findrec.evaluation.report import draw_users
from findrec.evaluation.run import load_scorer
from findrec.evaluation.scorers import ModelScorer, Queries, UserBlock
from findrec.evaluation.topk import Late, Top, exact_top
from findrec.progress import say
from findrec.training.checkpoint import best_checkpoint_path
from findrec.training.runs import checkpoint_folder, read_run_config, training_jobs

EXACT = "exact"  # the row of exact search, in torch
SERVED_RECALL = 0.99  # the fastest setting that reaches it is noted in index.json
_RUNS = 5
_WIDTHS = (16, 32, 64, 128, 256)  # efSearch of a graph
_SINGLES, _SINGLES_S, _FEWEST = 1000, 3.0, 100  # users asked one at a time; seconds after which these do


@dataclass(frozen=True)
class Point:
    """One setting of one index."""

    factory: str
    setting: str
    recall: float
    queries_per_s: float
    p50_ms: float
    p99_ms: float
    singles: int  # users the latencies are of
    exact_share: float  # of the lists that the index could not fill, so that all items were scored
    index_bytes: int
    build_s: float


@dataclass(frozen=True)
class IndexCurve:
    """All settings of all indexes of a run's model, and what they were measured on."""

    run: str
    model: str
    checkpoint: str
    k: int
    users: int
    items: int
    dim: int
    threads: int
    gpus: Gpus
    protocol: str
    points: list[Point]
    chosen: dict[str, str]  # factory -> the setting its index.json notes


@dataclass(frozen=True)
class _Asked:
    """One block of users, or one user, ready to be searched for."""

    queries: Queries
    seen_BN: Tensor | None
    late: Late | None


@dataclass(frozen=True)
class _Searched:
    """Something that makes lists, and what is known of it before it is asked."""

    factory: str
    search: Callable[[_Asked], Top]
    set: Callable[[str], None] = lambda setting: None
    num_exact: Callable[[], int] = lambda: 0
    index_bytes: int = 0
    build_s: float = 0.0


def measure_indexes(
    run_folder: Path,
    factories: Sequence[str] = (),
    *,
    settings: Sequence[str] = (),
    k: int = 10,
    users: int = 2000,
    threads: int | None = None,
    gpus: str | None = None,
) -> IndexCurve:
    """Build, save and measure indexes of a run's best checkpoint.

    No `factories`: those of `default_factories`. `settings` (`nprobe=8`) go to the indexes that have such a
    parameter; none: a range of each. At most `users` test users are asked for lists of `k`. `threads` is for
    FAISS and torch alike; default: the run's. Raises `FindRecError` for a run without test users or usable
    checkpoint, and for what `build_index` refuses.
    """
    placed = choose_gpus(gpus)
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data, verify=False)
    if not len(evaluated_users(folder, "test")):
        raise FindRecError(
            f"{folder.path} has no user with an event in the test split and one before it: there is nobody "
            "to ask for. Prepare the data with a split that leaves test events"
        )
    job = training_jobs(config, run_folder)[0]
    scorer = load_scorer(job, folder)
    checkpoint = best_checkpoint_path(checkpoint_folder(job.folder))
    assert checkpoint is not None, "load_scorer has found one"
    threads = threads or max(1, config.cluster.threads or torch.get_num_threads())
    with num_threads(threads):
        mask_seen = seen_filter(config.evaluation.mask_seen, folder)
        blocks, singles = _ask(config, scorer, folder, users, mask_seen)
        since_V = Candidates.of(folder, config.evaluation.candidates).since_V
        factories = list(dict.fromkeys(factories or default_factories(folder.num_items)))
        items_Vd, k = scorer.items_Vd, min(k, folder.num_items)

        def exact(asked: _Asked) -> Top:
            return exact_top(asked.queries, items_Vd, k, asked.seen_BN, asked.late)

        truth = [exact(asked)[0] for asked in blocks]
        points = _measure(_Searched(EXACT, exact), [""], blocks, singles, truth)
        chosen = {}
        for factory in factories:
            say(f"index {factory}")
            start = time.perf_counter()
            built = build_index(items_Vd, factory, since_V)
            save_index(built, run_folder, checkpoint, time.perf_counter() - start)
            del built  # what is measured is what a user will load
            index = load_index(run_folder, factory, items_Vd, checkpoint, since_V, gpus=placed)
            mark = read_mark(index_folder(run_folder, factory))
            tried = applicable(index, settings)
            found = _measure(_of_index(index, k, mark), tried, blocks, singles, truth)
            chosen[factory] = choose(found)
            keep_setting(index_folder(run_folder, factory), chosen[factory])
            points += found
    return IndexCurve(
        run=run_folder.name,
        model=job.name,
        checkpoint=checkpoint.name,
        k=k,
        users=sum(len(ids) for ids in truth),
        items=folder.num_items,
        dim=items_Vd.shape[1],
        threads=threads,
        gpus=placed,
        protocol=describe_protocol(folder, mask_seen, config.evaluation.candidates),
        points=points,
        chosen=chosen,
    )


def default_factories(num_items: int) -> list[str]:
    """Exact search, lists of about sqrt(V) / 4 items in a power of two of lists, and a graph."""
    lists = 2 ** round(math.log2(4 * math.sqrt(num_items)))
    most = 2 ** int(math.log2(max(1, num_items // 39)))  # FAISS wants 39 items to learn a list from
    return ["Flat", f"IVF{max(1, min(lists, most))},Flat", "HNSW32"]


def applicable(index: ItemIndex, settings: Sequence[str]) -> list[str]:
    """Those of `settings` that the index has parameters for, or a range of its main parameter; or "".

    Raises `FindRecError` for what is no setting.
    """
    faiss = need_faiss()
    space = faiss.ParameterSpace()
    space.initialize(index.raw)
    ranges = space.parameter_ranges
    names = {ranges.at(place).name for place in range(ranges.size())}
    for setting in settings:
        if not re.fullmatch(r"\w+=\d+(\.\d+)?(,\w+=\d+(\.\d+)?)*", setting):
            raise FindRecError(
                f"{setting!r} is no setting: give e.g. nprobe=8, efSearch=64 or nprobe=8,ht=20"
            )
    if settings:
        return [s for s in settings if {part.split("=")[0] for part in s.split(",")} <= names] or [""]
    if "nprobe" in names:
        lists = faiss.extract_index_ivf(index.raw).nlist
        return [f"nprobe={2**power}" for power in range(int(math.log2(lists)) + 1)]
    return [f"efSearch={width}" for width in _WIDTHS] if "efSearch" in names else [""]


def choose(points: Sequence[Point]) -> str:
    """The setting to serve: the fastest of a recall of `SERVED_RECALL`, else the one that finds most."""
    enough = [point for point in points if point.recall >= SERVED_RECALL]
    if enough:
        return max(enough, key=lambda point: point.queries_per_s).setting
    return max(points, key=lambda point: (point.recall, point.queries_per_s)).setting


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """FAISS and torch with `count` threads each, for a while."""
    faiss = need_faiss()
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


def _of_index(index: ItemIndex, k: int, mark: IndexMark) -> _Searched:
    return _Searched(
        index.factory,
        lambda asked: index.top(asked.queries, k, seen_BN=asked.seen_BN, late=asked.late),
        index.set,
        lambda: index.num_exact,
        mark.bytes,
        mark.build_s,
    )


def _ask(
    config: RunConfig, scorer: ModelScorer, folder: DataFolder, users: int, mask_seen: bool
) -> tuple[list[_Asked], list[_Asked]]:
    """Drawn test users in blocks, and the first of them in random order one by one."""
    drawn = draw_users(folder, "test", users, seed=config.training.seed)
    offer = Candidates.of(folder, config.evaluation.candidates)
    blocks = []
    for lo in range(0, len(drawn), config.evaluation.users_per_block):
        rows = drawn[lo : lo + config.evaluation.users_per_block]
        block = UserBlock.read(folder, "test", rows, config.data.max_length)
        seen_BN = block.padded_items() if mask_seen else None
        blocks.append(_Asked(scorer.queries(block), seen_BN, offer.late(block.cases, len(rows))))
    everyone = [(asked, row) for asked in blocks for row in range(len(asked.queries.users_Bd))]
    order = np.random.default_rng(config.training.seed).permutation(len(everyone))
    return blocks, [_single(*everyone[place]) for place in order[:_SINGLES]]


def _single(asked: _Asked, row: int) -> _Asked:
    """One user of a block, without the padding that others made necessary."""
    users, own, bonus = asked.queries.users_Bd, asked.queries.own_ids_BN, asked.queries.own_bonus_BN
    if own is not None and bonus is not None:
        there = own[row] > 0
        own, bonus = own[row : row + 1, there], bonus[row : row + 1, there]
    seen, late = asked.seen_BN, asked.late
    return _Asked(
        Queries(users[row : row + 1], own, bonus),
        None if seen is None else seen[row : row + 1, seen[row] > 0],
        None if late is None else (late[0], late[1][row : row + 1]),
    )


def _measure(
    searched: _Searched,
    settings: Sequence[str],
    blocks: Sequence[_Asked],
    singles: Sequence[_Asked],
    truth: Sequence[Tensor],
) -> list[Point]:
    def all_blocks(setting: str) -> list[Tensor]:
        searched.set(setting)
        return [searched.search(asked)[0] for asked in blocks]

    num_users = sum(len(ids) for ids in truth)
    found, filled = {}, {}
    for setting in settings:
        before = searched.num_exact()
        found[setting] = recall(all_blocks(setting), truth)
        filled[setting] = (searched.num_exact() - before) / num_users
    timed = time_alternating({s: partial(all_blocks, s) for s in settings}, runs=_RUNS, warmup=0)
    points = []
    for setting in settings:
        searched.set(setting)
        took = _latencies(searched.search, singles)
        p50, p99 = np.percentile(took, [50, 99]) * 1e3
        points.append(
            Point(
                factory=searched.factory,
                setting=setting,
                recall=found[setting],
                queries_per_s=num_users / timed[setting].median_s,
                p50_ms=float(p50),
                p99_ms=float(p99),
                singles=len(took),
                exact_share=filled[setting],
                index_bytes=searched.index_bytes,
                build_s=searched.build_s,
            )
        )
    return points


def recall(lists: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mean over users of the share of the true list `[B, k]` (0: no more) that the other holds; or 1."""
    shares = []
    for ids_Bk, true_Bk in zip(lists, truth, strict=True):
        there = (true_Bk[:, :, None] == ids_Bk[:, None, :]).any(2) & (true_Bk > 0)
        count = (true_Bk > 0).sum(1)
        shares.append((there.sum(1) / count)[count > 0])
    share = torch.cat(shares)
    return float(share.double().mean()) if len(share) else 1.0


def _latencies(search: Callable[[_Asked], Top], singles: Sequence[_Asked]) -> list[float]:
    """Seconds of each single query, until all are asked or enough of them took long enough."""
    for asked in singles[:10]:
        search(asked)
    took: list[float] = []
    for asked in singles:
        start = time.perf_counter()
        search(asked)
        took.append(time.perf_counter() - start)
        if len(took) >= _FEWEST and sum(took) > _SINGLES_S:
            break
    return took

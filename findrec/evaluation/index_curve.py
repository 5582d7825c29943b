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
from findrec.datasets.batches import evaluated_users
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.candidates import Candidates
from findrec.evaluation.faiss_library import GPU_MOST, Gpus, choose_gpus, need_faiss
from findrec.evaluation.index import ItemIndex, build_index
from findrec.evaluation.index_queries import Query, drawn_queries, single_queries
from findrec.evaluation.index_store import index_folder, keep_setting, load_index, read_mark, save_index
from findrec.evaluation.load import load_scorer
from findrec.evaluation.metrics import describe_protocol, seen_filter
from findrec.evaluation.topk import Top, exact_top
from findrec.progress import say
from findrec.training.runs import checkpoint_folder, read_run_config, training_jobs
from findrec.training.validations import best_checkpoint_path

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
    served: bool = False  # whether index.json notes this setting


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


@dataclass(frozen=True)
class _Searched:
    """Something that makes lists, and what is known of it before it is asked."""

    factory: str
    search: Callable[[Query], Top]
    index_bytes: int
    build_s: float = 0.0
    set: Callable[[str], None] = lambda setting: None
    num_exact: Callable[[], int] = lambda: 0


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
    mask_seen = seen_filter(config.evaluation.mask_seen, folder)
    items_Vd, k = scorer.items_Vd, min(k, folder.num_items)
    held_V = Candidates.of(folder, "all").since_V  # allow-lists and times are for each search to heed
    with num_threads(threads):
        blocks = drawn_queries(config, scorer, folder, users, mask_seen)
        singles = single_queries(blocks, _SINGLES, config.training.seed)

        def exact(query: Query) -> Top:
            return exact_top(query.users, items_Vd, k, query.seen_BN, query.late)

        truth = [exact(query)[0] for query in blocks]
        whole = _Searched(EXACT, exact, index_bytes=4 * folder.num_items * items_Vd.shape[1])
        points = _measure(whole, [""], blocks, singles, truth)
        for factory in dict.fromkeys(factories or default_factories(folder.num_items)):
            say(f"index {factory}")
            start = time.perf_counter()
            built = build_index(items_Vd, factory, held_V)
            save_index(built, run_folder, checkpoint, time.perf_counter() - start)
            del built  # what is measured is what a user will load
            index = load_index(run_folder, factory, items_Vd, checkpoint, held_V, gpus=placed)
            found = _measure(
                _of_index(index, run_folder, k), applicable(index, settings), blocks, singles, truth
            )
            served = choose(found)
            keep_setting(index_folder(run_folder, factory), served.setting)
            points += [Point(**{**vars(p), "served": p is served}) for p in found]
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
        most = min(lists, GPU_MOST) if index.on_gpu else lists
        return [f"nprobe={2**power}" for power in range(int(math.log2(most)) + 1)]
    return [f"efSearch={width}" for width in _WIDTHS] if "efSearch" in names else [""]


def choose(points: Sequence[Point]) -> Point:
    """The one to serve: the fastest of a recall of `SERVED_RECALL`, else the one that finds most."""
    enough = [point for point in points if point.recall >= SERVED_RECALL]
    if enough:
        return max(enough, key=lambda point: point.queries_per_s)
    return max(points, key=lambda point: (point.recall, point.queries_per_s))


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


def _of_index(index: ItemIndex, run_folder: Path, k: int) -> _Searched:
    mark = read_mark(index_folder(run_folder, index.factory))
    return _Searched(
        index.factory,
        lambda query: index.top(query.users, k, seen_BN=query.seen_BN, late=query.late),
        mark.bytes,
        mark.build_s,
        index.set,
        lambda: index.num_exact,
    )


def _measure(
    searched: _Searched,
    settings: Sequence[str],
    blocks: Sequence[Query],
    singles: Sequence[Query],
    truth: Sequence[Tensor],
) -> list[Point]:
    def all_blocks(setting: str) -> list[Tensor]:
        searched.set(setting)
        return [searched.search(query)[0] for query in blocks]

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


def _latencies(search: Callable[[Query], Top], singles: Sequence[Query]) -> list[float]:
    """Seconds of each single query, until all are asked or enough of them took long enough."""
    for query in singles[:10]:
        search(query)
    took: list[float] = []
    for query in singles:
        start = time.perf_counter()
        search(query)
        took.append(time.perf_counter() - start)
        if len(took) >= _FEWEST and sum(took) > _SINGLES_S:
            break
    return took

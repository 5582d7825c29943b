"""Measures the indexes of a run: recall against exact search, query rate, latency and memory.

Queries are the vectors of test users. Lists are made under the run's protocol, as in serving: with
repeat-consumption bonuses, the seen filter and item availability. The model's own time is not included.
`recall` is the mean over users of the share of the exact list that the index's list contains. Query rates are
medians of alternating runs over blocks of users; latencies are those of queries of single users.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from findrec.datasets.batches.evaluation import evaluated_users
from findrec.datasets.folder.configured import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.index.index import ItemIndex, build_index
from findrec.evaluation.index.queries import VectorQuery, drawn_queries, single_queries
from findrec.evaluation.index.store import index_folder, keep_setting, load_index, read_metadata, save_index
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.base import Top
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.load import load_inner_product
from findrec.evaluation.scoring.user_vectors import top_items
from findrec.evaluation.search.faiss_library import GPU_MOST, Gpus, choose_gpus, need_faiss
from findrec.progress import say
from findrec.timer import time_alternating
from findrec.training.checkpoints.checkpoint import checkpoint_folder
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.runs import main_job, read_run_config

EXACT = "exact"  # the row of exact search, in torch
SERVED_RECALL = 0.99  # the fastest setting with this recall is saved in index.json
_RUNS = 5
_WIDTHS = (16, 32, 64, 128, 256)  # efSearch of a graph
_SINGLES, _SINGLES_S, _FEWEST = 1000, 3.0, 100  # single queries; after so many seconds the fewest suffice


@dataclass(frozen=True)
class Point:
    """One setting of one index."""

    factory: str
    setting: str
    recall: float
    queries_per_s: float
    p50_ms: float
    p99_ms: float
    singles: int  # number of single queries whose latency was measured
    exact_share: float  # share of lists that the index could not fill and that were made by exact search
    index_bytes: int
    build_s: float
    served: bool = False  # whether this setting is saved in index.json


@dataclass(frozen=True)
class IndexCurve:
    """Measurements of all settings of all indexes of a run's model."""

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
class _Searcher:
    """A search method with its size, build time and settings."""

    factory: str
    search: Callable[[VectorQuery], Top]
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

    `factories` are FAISS factory strings (default: `default_factories`), `settings` search settings such as
    `nprobe=8` for the indexes that have the parameter (default: a range of values). At most `users` test
    users are used; `threads` (default: the run's) are for FAISS and torch. Raises `FindRecError` if the run
    has no test users or no usable checkpoint, and as `build_index`.
    """
    gpu_mode = choose_gpus(gpus)
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data, verify=False)
    if not len(evaluated_users(folder, "test")):
        raise FindRecError(
            f"{folder.path} has no user with an event in the test split and one before it. Prepare the data "
            "with a split that leaves test events"
        )
    job = main_job(config, run_folder)
    scorer = load_inner_product(job, folder)
    checkpoint = best_checkpoint_path(checkpoint_folder(job.folder))
    assert checkpoint is not None, "load_inner_product has loaded it"
    threads = threads or max(1, config.cluster.threads or torch.get_num_threads())
    protocol = RankingProtocol.of(config, folder)
    items_Vd, k = scorer.items_Vd, min(k, folder.num_items)
    held_V = Candidates.of(folder, "all").since_V  # allow-lists and times are applied by each search
    with num_threads(threads):
        blocks = drawn_queries(scorer, folder, protocol, users, config.training.seed)
        singles = single_queries(blocks, _SINGLES, config.training.seed)

        def exact(query: VectorQuery) -> Top:
            return top_items(query.users, items_Vd, k, query.seen_BN, query.times)

        truth = [exact(query)[0] for query in blocks]
        exact_search = _Searcher(EXACT, exact, index_bytes=4 * folder.num_items * items_Vd.shape[1])
        points = _measure(exact_search, [""], blocks, singles, truth)
        for factory in dict.fromkeys(factories or default_factories(folder.num_items)):
            say(f"index {factory}")
            start = time.perf_counter()
            built = build_index(items_Vd, factory, held_V)
            save_index(built, run_folder, checkpoint, time.perf_counter() - start)
            del built  # measure the saved index, as a user will load it
            index = load_index(run_folder, factory, items_Vd, checkpoint, held_V, gpus=gpu_mode)
            searcher = _index_searcher(index, run_folder, k)
            measured = _measure(searcher, applicable(index, settings), blocks, singles, truth)
            served = choose(measured)
            keep_setting(index_folder(run_folder, factory), served.setting)
            points += [replace(point, served=point is served) for point in measured]
    return IndexCurve(
        run=run_folder.name,
        model=job.name,
        checkpoint=checkpoint.name,
        k=k,
        users=sum(len(ids) for ids in truth),
        items=folder.num_items,
        dim=items_Vd.shape[1],
        threads=threads,
        gpus=gpu_mode,
        protocol=protocol.describe(folder),
        points=points,
    )


def default_factories(num_items: int) -> list[str]:
    """Exact search, IVF with about 4 sqrt(V) lists (a power of two), and a graph."""
    lists = 2 ** round(math.log2(4 * math.sqrt(num_items)))
    most = 2 ** int(math.log2(max(1, num_items // 39)))  # FAISS warns below 39 items per list
    return ["Flat", f"IVF{max(1, min(lists, most))},Flat", "HNSW32"]


def applicable(index: ItemIndex, settings: Sequence[str]) -> list[str]:
    """The `settings` whose parameters the index has; default: a range of its main parameter, or `[""]`.

    Raises `FindRecError` for a malformed setting.
    """
    faiss = need_faiss()
    space = faiss.ParameterSpace()
    space.initialize(index.raw)
    ranges = space.parameter_ranges
    names = {ranges.at(n).name for n in range(ranges.size())}
    for setting in settings:
        if not re.fullmatch(r"\w+=\d+(\.\d+)?(,\w+=\d+(\.\d+)?)*", setting):
            raise FindRecError(
                f"{setting!r} is not a setting: give e.g. nprobe=8, efSearch=64 or nprobe=8,ht=20"
            )
    if settings:
        return [s for s in settings if {part.split("=")[0] for part in s.split(",")} <= names] or [""]
    if "nprobe" in names:
        lists = faiss.extract_index_ivf(index.raw).nlist
        most = min(lists, GPU_MOST) if index.on_gpu else lists
        return [f"nprobe={2**power}" for power in range(int(math.log2(most)) + 1)]
    return [f"efSearch={width}" for width in _WIDTHS] if "efSearch" in names else [""]


def choose(points: Sequence[Point]) -> Point:
    """The setting to serve: the fastest with a recall of `SERVED_RECALL`, else the one of highest recall."""
    enough = [point for point in points if point.recall >= SERVED_RECALL]
    if enough:
        return max(enough, key=lambda point: point.queries_per_s)
    return max(points, key=lambda point: (point.recall, point.queries_per_s))


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run FAISS and torch with `count` threads each."""
    faiss = need_faiss()
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


def _index_searcher(index: ItemIndex, run_folder: Path, k: int) -> _Searcher:
    metadata = read_metadata(index_folder(run_folder, index.factory))
    return _Searcher(
        index.factory,
        lambda query: index.top(query.users, k, seen_BN=query.seen_BN, times=query.times),
        metadata.bytes,
        metadata.build_s,
        index.set,
        lambda: index.num_exact,
    )


def _measure(
    searcher: _Searcher,
    settings: Sequence[str],
    blocks: Sequence[VectorQuery],
    singles: Sequence[VectorQuery],
    truth: Sequence[Tensor],
) -> list[Point]:
    def all_blocks(setting: str) -> list[Tensor]:
        searcher.set(setting)
        return [searcher.search(query)[0] for query in blocks]

    num_users = sum(len(ids) for ids in truth)
    recalls, exact_shares = {}, {}
    for setting in settings:
        before = searcher.num_exact()
        recalls[setting] = recall(all_blocks(setting), truth)
        exact_shares[setting] = (searcher.num_exact() - before) / num_users
    timed = time_alternating({s: partial(all_blocks, s) for s in settings}, runs=_RUNS, warmup=0)
    points = []
    for setting in settings:
        searcher.set(setting)
        latencies = _latencies(searcher.search, singles)
        p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
        points.append(
            Point(
                factory=searcher.factory,
                setting=setting,
                recall=recalls[setting],
                queries_per_s=num_users / timed[setting].median_s,
                p50_ms=float(p50),
                p99_ms=float(p99),
                singles=len(latencies),
                exact_share=exact_shares[setting],
                index_bytes=searcher.index_bytes,
                build_s=searcher.build_s,
            )
        )
    return points


def recall(lists: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mean over users of the share of the true list `[B, k]` (0: padding) that is in the other; or 1."""
    shares = []
    for ids_Bk, true_Bk in zip(lists, truth, strict=True):
        hit_Bk = (true_Bk[:, :, None] == ids_Bk[:, None, :]).any(2) & (true_Bk > 0)
        count = (true_Bk > 0).sum(1)
        shares.append((hit_Bk.sum(1) / count)[count > 0])
    share = torch.cat(shares)
    return float(share.double().mean()) if len(share) else 1.0


def _latencies(search: Callable[[VectorQuery], Top], singles: Sequence[VectorQuery]) -> list[float]:
    """Seconds of each single query; stops early after `_FEWEST` queries and `_SINGLES_S` seconds."""
    for query in singles[:10]:
        search(query)
    seconds: list[float] = []
    for query in singles:
        start = time.perf_counter()
        search(query)
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= _FEWEST and sum(seconds) > _SINGLES_S:
            break
    return seconds

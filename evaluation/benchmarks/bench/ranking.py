"""Benchmark of full-catalogue ranking against a matrix product, FAISS, torch and RecBole.

Vectors are standard normal; every user has one target. Targets are `trained` (planted at log-uniform ranks,
similar to a trained model), `uniform` (random items) or `half` of each; only our speed depends on them. Runs
alternate; figures are medians. `exact` is whether the ranks equal those of float64 scores, checked on the
first users; lists of 100 have no ranks beyond. `peak_bytes` is the memory that one run adds to a fresh
process that holds the vectors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.memory import peak_bytes
from bench.peers import default_peers
from torch import Tensor

from findrec.errors import FindRecError
from findrec.evaluation.search.faiss_library import need_faiss
from findrec.ops.ranking.item_rows import FileRows
from findrec.ops.ranking.target_rank import target_rank
from findrec.paths import checkout, home
from findrec.progress import say
from findrec.timer import time_alternating

Figures = dict[str, Any]
SIZES = (12_000, 100_000, 1_000_000)
PRODUCT, FAISS, RECBOLE = "float32 product", "faiss.IndexFlatIP", "RecBole 1.2.1"
OURS = {
    "findrec": ("auto", "int16"),
    "findrec, float32": ("float32", "float32"),
    "findrec, torch": ("torch", "float32"),
    "findrec, torch bfloat16": ("bfloat16", "bfloat16"),
}
TOP = 100
FEW_USERS = 64  # for slow implementations, and those that store users x items
_TILE = 4096  # items of a product's tile: its scores fit in a cache
_CHECKED = 16  # users whose ranks are compared with the reference


@dataclass(frozen=True)
class Problem:
    """Users, items and, for each kind of targets, one target per user."""

    users_Bd: Tensor
    items_Vd: Tensor  # [V + 1, d]
    targets: dict[str, Tensor]

    @staticmethod
    def make(num_users: int, num_items: int, width: int, seed: int = 0) -> Problem:
        """Draw a problem; planting takes some milliseconds per user."""
        draw = torch.Generator().manual_seed(seed)
        users_Bd = torch.randn(num_users, width, generator=draw)
        items_Vd = torch.randn(num_items + 1, width, generator=draw)
        rank_B = (torch.rand(num_users, generator=draw) * np.log(num_items)).exp().long().clamp(1, num_items)
        planted = []
        for b in range(0, num_users, 16):
            scores_bV = users_Bd[b : b + 16] @ items_Vd[1:].T
            planted += [
                1 + int(score_V.kthvalue(num_items + 1 - int(rank)).indices)
                for score_V, rank in zip(scores_bV, rank_B[b : b + 16], strict=True)
            ]
        trained = torch.tensor(planted)
        uniform = torch.randint(1, num_items + 1, (num_users,), generator=draw)
        half = torch.where(torch.arange(num_users) % 2 == 0, trained, uniform)
        return Problem(users_Bd, items_Vd, {"half": half, "trained": trained, "uniform": uniform})

    def save(self, folder: Path) -> None:
        """Save the arrays for the processes that measure memory and run RecBole."""
        np.save(folder / "users.npy", self.users_Bd.numpy())
        np.save(folder / "items.npy", self.items_Vd.numpy())
        for name, target_B in self.targets.items():
            np.save(folder / f"{name}.npy", target_B.numpy())


def make_run(impl: str, problem: Problem, targets: str = "half") -> Callable[[], Tensor | None]:
    """Return a function that ranks all users once; counting ones return the items above each target."""
    users_Bd, items_Vd, target_B = problem.users_Bd, problem.items_Vd, problem.targets[targets]
    if impl in OURS:
        rank_impl: Any = OURS[impl][0]
        row_B = torch.arange(len(users_Bd))
        return lambda: target_rank(users_Bd, items_Vd, row_B, target_B, impl=rank_impl)[0]
    if impl == PRODUCT:
        return functools.partial(_product, users_Bd, items_Vd)
    if impl == FAISS:
        return _faiss_run(users_Bd, items_Vd)
    torch_run = {"torch matmul+topk": _top, "torch counting": _count}[impl]
    return functools.partial(torch_run, users_Bd, items_Vd, target_B)


def _tiles(users_bd: Tensor, items_Vd: Tensor, tile: int) -> Iterator[tuple[int, Tensor]]:
    spare = torch.empty(len(users_bd) * tile)
    for lo in range(1, len(items_Vd), tile):
        some = items_Vd[lo : lo + tile]
        out = spare[: len(users_bd) * len(some)].view(len(users_bd), -1)
        yield lo, torch.mm(users_bd, some.T, out=out)


def _product(users_Bd: Tensor, items_Vd: Tensor) -> None:
    for _ in _tiles(users_Bd, items_Vd, _TILE):
        pass


def _top(users_Bd: Tensor, items_Vd: Tensor, _: Tensor) -> None:
    best_Bk = torch.empty(len(users_Bd), 0)
    for _lo, scores_BT in _tiles(users_Bd, items_Vd, 4 * _TILE):
        tile_Bk = scores_BT.topk(min(TOP, scores_BT.shape[1])).values
        both = torch.cat([best_Bk, tile_Bk], dim=1)
        best_Bk = both.topk(min(TOP, both.shape[1])).values


def _count(users_Bd: Tensor, items_Vd: Tensor, target_B: Tensor) -> Tensor:
    t_B1 = (users_Bd * items_Vd[target_B]).sum(1, keepdim=True)
    above_B = torch.zeros(len(users_Bd), dtype=torch.int64)
    for _, scores_BT in _tiles(users_Bd, items_Vd, _TILE):
        above_B += (scores_BT > t_B1).sum(1)
    return above_B


def _faiss_run(users_Bd: Tensor, items_Vd: Tensor) -> Callable[[], None]:
    faiss = need_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(items_Vd.shape[1])
    index.add(items_Vd[1:].numpy())
    queries = users_Bd.numpy()
    return lambda: index.search(queries, TOP) and None


def _measured_run(impl: str, folder: str, threads: int, few: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    read = {
        name: torch.from_numpy(np.load(Path(folder) / f"{name}.npy")) for name in ("users", "items", "half")
    }
    problem = Problem(read["users"][:few], read["items"], {"half": read["half"][:few]})
    tiny = Problem(read["users"][:1], read["items"][:100], {"half": torch.ones(1).long()})
    make_run(impl, tiny)()  # loads libraries
    return make_run(impl, problem)


def bench_ranking(
    sizes: Sequence[int] = SIZES,
    *,
    num_users: int = 1024,
    width: int = 128,
    runs: int = 5,
    peers: Path | None = None,
) -> list[Figures]:
    """Measure rows for each number of items; without its environment, the row of RecBole is skipped."""
    rows = []
    for num_items in sizes:
        problem = Problem.make(num_users, num_items, width)
        with tempfile.TemporaryDirectory(prefix="findrec-") as scratch:
            problem.save(Path(scratch))
            rows += _measure(problem, Path(scratch), runs, peers or default_peers())
    return rows


def _measure(problem: Problem, folder: Path, runs: int, peers: Path) -> list[Figures]:
    num_users = len(problem.users_Bd)
    few = min(FEW_USERS, num_users)
    few_problem = _first(problem, few)
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    count: dict[str, int] = {}
    for impl in (PRODUCT, *OURS, FAISS, "torch matmul+topk", "torch counting"):
        slow = impl == "findrec, torch bfloat16"
        if slow and not multiplies_bfloat16():
            say(f"No row of {impl}: this CPU only emulates bfloat16 products, a hundred times slower")
            continue
        count[impl] = few if slow else num_users
        for targets in problem.targets if impl == "findrec" else ("half",):
            timed[impl, targets] = make_run(impl, few_problem if slow else problem, targets)
    with _recbole(peers, folder, few) as recbole:
        if recbole is not None:
            timed[RECBOLE, "half"], count[RECBOLE] = recbole, few
        timings = time_alternating({json.dumps(key): run for key, run in timed.items()}, runs=runs, warmup=1)
        recbole_bytes = recbole.peak_bytes if recbole is not None else 0
    rows = []
    truth = _truth(problem)
    base = num_users / timings[json.dumps((PRODUCT, "half"))].median_s
    for impl, targets in timed:
        rate = count[impl] / timings[json.dumps((impl, targets))].median_s
        peak = recbole_bytes
        if impl != RECBOLE:
            peak = peak_bytes(_measured_run, impl, str(folder), torch.get_num_threads(), count[impl])
        rows.append(
            {
                "impl": impl,
                "targets": targets,
                "users": count[impl],
                "items": len(problem.items_Vd) - 1,
                "dim": problem.users_Bd.shape[1],
                "dtype": OURS[impl][1] if impl in OURS else "float32",
                "users_per_s": rate,
                "times_product": rate / base,
                "peak_bytes": peak,
                "exact": _is_exact(impl, problem, targets, truth),
            }
        )
    return rows


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products."""
    with contextlib.suppress(OSError):
        return any(
            flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16 ")
        )
    return False


def _first(problem: Problem, num_users: int) -> Problem:
    targets = {name: target_B[:num_users] for name, target_B in problem.targets.items()}
    return Problem(problem.users_Bd[:num_users], problem.items_Vd, targets)


def _truth(problem: Problem) -> dict[str, Tensor]:
    """Numbers of items above the first users' targets, by float64 scores."""
    users_bd = problem.users_Bd[:_CHECKED]
    row = torch.arange(len(users_bd)).repeat(len(problem.targets))
    target = torch.cat([target_B[:_CHECKED] for target_B in problem.targets.values()])
    greater, _ = target_rank(users_bd, problem.items_Vd, row, target, impl="exact")
    return dict(zip(problem.targets, greater.view(-1, len(users_bd)), strict=True))


def _is_exact(impl: str, problem: Problem, targets: str, truth: dict[str, Tensor]) -> bool:
    if impl not in OURS and impl != "torch counting":
        return False
    greater_b = make_run(impl, _first(problem, _CHECKED), targets)()
    return greater_b is not None and bool(torch.equal(greater_b, truth[targets]))


class _Recbole:
    """RecBole's full-sort evaluation in its own environment; each line sent to the process is one run."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.peak_bytes = process, 0

    def __call__(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer.strip().isdigit():
            raise FindRecError(f"RecBole's process ended ({answer!r}): out of memory?")
        self.peak_bytes = int(answer)


@contextlib.contextmanager
def _recbole(peers: Path, folder: Path, num_users: int) -> Iterator[_Recbole | None]:
    python = peers / "bin" / "python"
    if not python.is_file():
        say(f"No row of RecBole: no environment {peers}; see evaluation/benchmarks/model.py")
        yield None
        return
    worker = (checkout() or home()) / "evaluation" / "benchmarks" / "peers" / "ranking.py"
    command = [str(python), str(worker), str(folder), str(num_users), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Recbole(process)
        finally:
            process.kill()


def bench_file(
    num_items: int, *, num_users: int = 1024, width: int = 128, folder: Path | None = None
) -> Figures:
    """Measure a catalogue that is read from a file by tiles, with uniform targets, in one run.

    The temporary file, in `folder`, has 4 bytes per number.
    """
    with tempfile.TemporaryDirectory(prefix="findrec-", dir=folder) as scratch:
        path = Path(scratch) / "items.npy"
        stored = np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(num_items + 1, width))
        draw = np.random.default_rng(0)
        for lo in range(0, num_items + 1, 1 << 18):
            stored[lo : lo + (1 << 18)] = draw.standard_normal(stored[lo : lo + (1 << 18)].shape, np.float32)
        del stored
        threads = torch.get_num_threads()
        peak = peak_bytes(_file_run, str(path), num_users, threads, str(Path(scratch) / "seconds"))
        seconds = float((Path(scratch) / "seconds").read_text())
    return {
        "impl": "findrec, from a file",
        "targets": "uniform",
        "users": num_users,
        "items": num_items,
        "dim": width,
        "dtype": "int16",
        "users_per_s": num_users / seconds,
        "pairs_per_s": num_users * num_items / seconds,
        "peak_bytes": peak,
        "exact": None,  # not checked: the reference would take hours
    }


def _file_run(path: str, num_users: int, threads: int, result: str) -> Callable[[], None]:
    torch.set_num_threads(threads)
    items = FileRows(path)
    draw = torch.Generator().manual_seed(1)
    users_Bd = torch.randn(num_users, items.width, generator=draw)
    target_B = torch.randint(1, items.num_items + 1, (num_users,), generator=draw)
    row_B = torch.arange(num_users)
    target_rank(users_Bd[:1], users_Bd, row_B[:1], row_B[1:2])  # loads the library

    def run() -> None:
        start = time.perf_counter()
        target_rank(users_Bd, items, row_B, target_B)
        Path(result).write_text(str(time.perf_counter() - start))

    return run

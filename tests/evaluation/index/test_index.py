"""Index lists agree with full scoring under all filters; invalid input is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from findrec.datasets.folder.data_folder import ALWAYS, NEVER
from findrec.errors import FindRecError
from findrec.evaluation.index.index import ItemIndex, build_index
from findrec.evaluation.scoring.base import Times, Top
from findrec.evaluation.scoring.user_vectors import UserVectors, top_items
from findrec.evaluation.search import faiss_library

faiss = pytest.importorskip("faiss")

USERS, ITEMS, DIM = 23, 700, 8
EXACT = {"Flat": "", "IVF4,Flat": "nprobe=4", "RR8,Flat": "", "RR8,IVF4,Flat": "nprobe=4"}
ROUGH = {"IVF16,Flat": "nprobe=2", "HNSW8": "efSearch=24", "IVF4,PQ4x4": "nprobe=2", "SQ8": "", "PQ4x4": ""}
ROUGH |= {"PQ4x4,RFlat": "", "NSG8": "", "PCAR6,Flat": ""}  # NSG cannot select, PCA shifts scores
FILTERS = ("nothing", "seen", "own", "late", "allowed", "all of it")


@pytest.fixture(scope="module")
def items_Vd() -> Tensor:  # noqa: N802
    torch.manual_seed(0)
    items = torch.randn(ITEMS + 1, DIM)
    items[0] = 0
    return items


def make_query(what: str, users: int = USERS) -> tuple[UserVectors, Tensor | None, Times | None]:
    """Users with histories of all lengths, one of everything; an allow-list of one item in nine."""
    torch.manual_seed(1)
    users_Bd = torch.randn(users, DIM)
    own_BN = torch.stack([torch.randperm(ITEMS)[:90] + 1 for _ in range(users)])
    own_BN[torch.arange(90)[None] >= torch.randint(0, 90, (users, 1))] = 0
    seen_BM = torch.stack([torch.randperm(ITEMS) + 1 for _ in range(users)])
    seen_BM[torch.arange(ITEMS)[None] >= torch.randint(0, 60, (users, 1))] = 0
    seen_BM[0] = torch.arange(ITEMS) + 1  # everything
    seen_BM[-1] = torch.arange(ITEMS)  # all but one
    seen_BM[:, :60] = torch.where(own_BN[:, :60] > 0, seen_BM[:, :60], 0)
    since_V = torch.randint(0, 10, (ITEMS + 1,))
    time_B = torch.randint(3, 12, (users,))
    if what in ("allowed", "all of it"):
        since_V = torch.where(torch.arange(ITEMS + 1) % 9 == 0, since_V, NEVER)
    if what == "allowed":
        since_V, time_B = torch.where(since_V == NEVER, NEVER, ALWAYS), torch.zeros(users, dtype=torch.int64)
    has_own, has_seen = what in ("own", "all of it"), what in ("seen", "all of it")
    queries = (
        UserVectors(users_Bd, own_BN, 2 * torch.randn(own_BN.shape)) if has_own else UserVectors(users_Bd)
    )
    late = Times(since_V, time_B) if what in ("late", "allowed", "all of it") else None
    return queries, seen_BM if has_seen else None, late


def built(factory: str, items_Vd: Tensor, known: dict[str, ItemIndex] = {}) -> ItemIndex:  # noqa: B006
    """The index of a factory with the setting named for it, built once."""
    if factory not in known:
        known[factory] = build_index(items_Vd, factory)
        known[factory].set({**EXACT, **ROUGH}[factory])
    known[factory].num_exact = 0
    return known[factory]


def truth(items_Vd: Tensor, k: int, query: tuple[UserVectors, Tensor | None, Times | None]) -> Top:
    queries, seen_BM, late = query
    return top_items(queries, items_Vd, k, seen_BM, late)


def same(actual: Top, expected: Top) -> None:
    """The same items (up to the order of scores that rounding cannot tell apart) and scores."""
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-4)
    differ = actual[0] != expected[0]
    gaps = (expected[1][:, 1:] - expected[1][:, :-1]).abs()
    assert not differ.any() or float(gaps[expected[0][:, 1:] > 0].min()) < 1e-4
    assert differ.float().mean() < 0.01


@pytest.mark.parametrize("what", FILTERS)
@pytest.mark.parametrize("factory", EXACT)
@pytest.mark.parametrize("k", [1, 10, ITEMS + 5])
def test_exact_indexes_agree_with_full_scoring(factory: str, what: str, k: int, items_Vd: Tensor) -> None:
    index = built(factory, items_Vd)
    query = make_query(what)
    actual = index.top(query[0], k, seen_BN=query[1], times=query[2])
    assert actual[0].shape == (USERS, min(k, ITEMS))
    same(actual, truth(items_Vd, min(k, ITEMS), query))
    assert index.num_exact == 0, "nothing was left to full scoring"
    alone = make_query(what)
    for b in (0, 5, USERS - 1):  # a user at a time, as a service asks
        queries = UserVectors(*(None if x is None else x[b : b + 1] for x in vars(alone[0]).values()))  # type: ignore[arg-type]
        seen = None if alone[1] is None else alone[1][b : b + 1]
        late = None if alone[2] is None else alone[2].rows(slice(b, b + 1))
        one = index.top(queries, k, seen_BN=seen, times=late)
        same(one, (actual[0][b : b + 1], actual[1][b : b + 1]))


@pytest.mark.parametrize("what", FILTERS)
@pytest.mark.parametrize("factory", ROUGH)
def test_approximate_indexes_give_full_valid_lists(factory: str, what: str, items_Vd: Tensor) -> None:
    index = built(factory, items_Vd)
    query = make_query(what)
    ids, scores = index.top(query[0], 10, seen_BN=query[1], times=query[2])
    expected, _ = truth(items_Vd, 10, query)
    assert ((ids > 0) == (expected > 0)).all()
    if what in ("nothing", "seen"):
        torch.testing.assert_close(
            scores, (query[0].users_Bd[:, None] * items_Vd[ids]).sum(2).where(ids > 0, -torch.inf)
        )
    hits, whole = 0, truth(items_Vd, ITEMS, query)[0]
    for b in range(USERS):
        shown = [v for v in ids[b].tolist() if v]
        assert len(set(shown)) == len(shown)
        assert set(shown) <= set(whole[b].tolist()), "an item that must not be shown"
        hits += len(set(shown) & set(expected[b].tolist()))
    assert hits / int((expected > 0).sum()) > 0.4


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_an_allow_list_is_selected_not_fetched(
    factory: str, items_Vd: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(items_Vd, factory)
    fetched: list[int] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(index.raw, name)

        def search(self, users: Any, k: int, **how: Any) -> Any:
            fetched.append(k)
            return index.raw.search(users, k, **how)

    queries, _, late = make_query("allowed")
    monkeypatch.setattr(index, "_searcher", Spy())
    index.top(queries, 7, times=late)
    assert fetched == [7]
    monkeypatch.setattr(index, "_selects", False)
    index.top(queries, 7, times=late)
    assert fetched[1] == 7 + ITEMS - ITEMS // 9


def test_items_outside_the_index_are_never_listed(items_Vd: Tensor) -> None:
    since_V = torch.full((ITEMS + 1,), ALWAYS)
    since_V[1::2] = NEVER
    queries, seen_BM, _ = make_query("seen")
    own = make_query("own")[0]
    for factory in ("Flat", "HNSW8"):
        index = build_index(items_Vd, factory, since_V)
        assert index.raw.ntotal == ITEMS // 2
        for query in (queries, own):
            ids, _ = index.top(query, ITEMS, seen_BN=seen_BM)
            assert (ids % 2 == 0).all()
            if factory == "Flat":
                late = Times(since_V, torch.zeros(USERS, dtype=torch.int64))
                same(index.top(query, 10, seen_BN=seen_BM), truth(items_Vd, 10, (query, seen_BM, late)))
    with pytest.raises(FindRecError, match="nothing to index"):
        build_index(items_Vd, "Flat", torch.full((ITEMS + 1,), NEVER))


def test_short_lists_are_filled_by_exact_search(items_Vd: Tensor) -> None:
    index = build_index(items_Vd, "IVF64,Flat")
    index.set("nprobe=1")  # eleven items to a list, on average
    queries, _, _ = make_query("nothing")
    same(index.top(queries, 200), truth(items_Vd, 200, (queries, None, None)))
    assert index.num_exact == USERS


def test_user_vectors_with_nan_get_empty_lists(items_Vd: Tensor) -> None:
    index = build_index(items_Vd, "HNSW8")
    users = torch.randn(3, DIM)
    users[1, 2] = torch.nan
    ids, scores = index.top(UserVectors(users), 5)
    assert (ids[1] == 0).all()
    assert (scores[1] == -torch.inf).all()
    assert (ids[[0, 2]] > 0).all()
    users[1] = torch.inf  # some scores are inf, some no number
    ids, scores = index.top(UserVectors(users), 5)
    assert not scores[1].isnan().any()
    assert index.top(UserVectors(users[:0]), 5)[0].shape == (0, 5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_item_vectors_with_nan_are_refused(items_Vd: Tensor, value: float) -> None:
    items = items_Vd.clone()
    items[7, 3] = items[9, 0] = value
    with pytest.raises(FindRecError, match=r"2 of 700 item vectors are not finite .* item 7"):
        build_index(items, "Flat")
    items = items_Vd.clone()
    items[0] = value  # padding is no item
    build_index(items, "Flat")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("HSNW32", "HSNW32"),
        ("", "cannot build"),
        ("IVF1024,Flat", r"1024.*IVF64,Flat \(no more lists than items\)"),
        ("IVF4,PQ3", r"cannot build an index 'IVF4,PQ3' of 700 items of width 8"),
        ("LSH", "LSH.*METRIC_L2"),
    ],
)
def test_invalid_factories_are_refused(factory: str, message: str, items_Vd: Tensor) -> None:
    with pytest.raises(FindRecError, match=message) as error:
        build_index(items_Vd, factory)
    assert "faiss/" not in str(error.value)


def test_invalid_queries_are_refused(items_Vd: Tensor) -> None:
    index = build_index(items_Vd, "IVF4,Flat")
    with pytest.raises(FindRecError, match="user vectors have width 9, index 'IVF4,Flat' has width 8"):
        index.top(UserVectors(torch.randn(2, 9)), 5)
    with pytest.raises(ValueError, match="k=0"):
        index.top(UserVectors(torch.randn(2, 8)), 0)
    with pytest.raises(FindRecError, match=r"cannot be searched with 'efSearch=3'.*nprobe=8"):
        index.set("efSearch=3")


def test_without_faiss(items_Vd: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(FindRecError, match=r"pip install faiss-cpu .*never both"):
        build_index(items_Vd, "Flat")


class FakeGpus:
    """Stands in for what a GPU build of FAISS adds, with the limits of its indexes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shards: list[bool] = []
        self.fetched: list[int] = []
        for name, value in {
            "StandardGpuResources": object,
            "get_num_gpus": lambda: 2,
            "GpuMultipleClonerOptions": type("Options", (), {"shard": False}),
            "GpuParameterSpace": faiss.ParameterSpace,
            "index_cpu_to_all_gpus": self.move,
        }.items():
            monkeypatch.setattr(faiss, name, value, raising=False)

    def move(self, raw: Any, co: Any) -> Any:
        if isinstance(raw, faiss.IndexHNSW):
            raise RuntimeError("This index type is not implemented on GPU.")
        self.shards.append(co.shard)
        copy, fetched = faiss.clone_index(raw), self.fetched

        class OnGpu(type(copy)):  # type: ignore[misc]
            def search(self, users: Any, k: int) -> Any:  # no search parameters
                fetched.append(k)
                assert k <= 2048, "GPU index only supports k <= 2048"
                return copy.search(users, k)

        copy_of = copy
        on_gpu = OnGpu.__new__(OnGpu)
        on_gpu.__dict__.update(copy_of.__dict__)
        return on_gpu


@pytest.mark.parametrize("gpus", ["replicate", "shard"])
def test_lists_too_long_for_gpus_use_exact_search(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpus(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        assert faiss_library.choose_gpus() == "replicate"
        assert faiss_library.choose_gpus(gpus) == gpus
    torch.manual_seed(0)
    items, users = torch.randn(3001, DIM), torch.randn(6, DIM)
    index = build_index(items, "Flat", gpus=gpus)
    assert index.on_gpu
    assert fake.shards == [gpus == "shard"]
    for k in (10, 2048, 2049):
        same(index.top(UserVectors(users), k), top_items(UserVectors(users), items, k))
    assert fake.fetched == [10, 2048]
    assert index.num_exact == 6
    since_V = torch.where(torch.arange(3001) % 2 == 0, ALWAYS, NEVER)
    late = Times(since_V, torch.zeros(6, dtype=torch.int64))
    same(index.top(UserVectors(users), 10, times=late), top_items(UserVectors(users), items, 10, None, late))
    assert fake.fetched[-1] == 10 + 1500, "GPU indexes cannot select items"
    graph = build_index(items, "HNSW8", gpus=gpus)
    assert not graph.on_gpu


def test_missing_gpus_are_reported() -> None:
    if faiss_library.choose_gpus() != "none":
        pytest.skip("there are GPUs")
    with pytest.raises(FindRecError, match="FAISS finds no GPU here"):
        faiss_library.choose_gpus("shard")
    with pytest.raises(FindRecError, match="give none, replicate or shard"):
        faiss_library.choose_gpus("all")


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs faiss-gpu and a GPU")
@pytest.mark.parametrize("gpus", ["replicate", "shard"])
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
@pytest.mark.parametrize("what", FILTERS)
def test_real_gpus_agree_with_full_scoring(factory: str, gpus: Any, what: str, items_Vd: Tensor) -> None:
    index: ItemIndex = build_index(items_Vd, factory, gpus=gpus)
    assert index.on_gpu
    index.set(EXACT[factory])
    query = make_query(what)
    same(index.top(query[0], 10, seen_BN=query[1], times=query[2]), truth(items_Vd, 10, query))
